// The kernels for what every processor of the architecture has: SSE2 on x86-64, NEON on ARM64.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "levels.h"

#if defined(__aarch64__)
#define SPECTRAL_EXT_FMA
#endif
#define SPECTRAL_EXT_VECTOR_BYTES 16
#include "kernels.inl"

namespace spectral_ext::cpu {
const Level kBaseline = {"baseline", kKernels<float>, kKernels<double>, kKernels<BFloat16>,
                         kKernels<Float16>};
}
