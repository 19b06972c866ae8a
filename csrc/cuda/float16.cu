#include "kernels.h"
#include "schedule.cuh"

namespace spectral_ext::cuda {
Kernels float16_kernels() { return {forward_kernel<Float16>, backward_kernel<Float16>}; }
}  // namespace spectral_ext::cuda
