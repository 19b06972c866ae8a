#include "kernels.h"
#include "schedule.cuh"

namespace spectral_ext::cuda {
Kernels bfloat16_kernels() { return {forward_kernel<BFloat16>, backward_kernel<BFloat16>}; }
}  // namespace spectral_ext::cuda
