// The kernels for x86-64 processors with AVX2, FMA and F16C (2013 and later). The target is set by
// a pragma after all headers: with a compiler flag, inline functions of the standard library would
// be compiled for AVX2 too, and the linker might keep those for every processor.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "levels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define SPECTRAL_EXT_AVX2
#define SPECTRAL_EXT_FMA
#define SPECTRAL_EXT_VECTOR_BYTES 32
#include "kernels.inl"

namespace spectral_ext::cpu {
const Level kAvx2 = {"avx2", kKernels<float>, kKernels<double>, kKernels<BFloat16>,
                     kKernels<Float16>};
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
