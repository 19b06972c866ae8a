#include "kernels.h"
#include "schedule.cuh"

namespace spectral_ext::cuda {
Kernels float64_kernels() { return {forward_kernel<double>, backward_kernel<double>}; }
}  // namespace spectral_ext::cuda
