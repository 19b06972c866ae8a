#include "kernels.h"
#include "schedule.cuh"

namespace spectral_ext::cuda {
Kernels float32_kernels() { return {forward_kernel<float>, backward_kernel<float>}; }
}  // namespace spectral_ext::cuda
