// bfloat16 and IEEE half as storage types, and their conversions.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../layer.h"

namespace spectral_ext::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Conversions round to nearest even. They have no branches, so that compilers vectorize them.

inline float to_compute(float x) { return x; }
inline double to_compute(double x) { return x; }

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_compute(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float to_compute(Float16 x) {
  // Moved into place, the exponent is short by 112; a multiplication mends that, also for
  // subnormals.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  uint32_t bits = bits_of(float_of(magnitude) * float_of(0x77800000u));
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
  return float_of(bits | (x.bits & 0x8000u) << 16);
}

template <class T>
inline T from_compute(compute_t<T> x) {
  if constexpr (sizeof(T) >= 4) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
  } else {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Subnormal results: adding 0.5 leaves the rounded half in the low bits of the sum.
    const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? small : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return {static_cast<uint16_t>(half | sign)};
  }
}

}  // namespace spectral_ext::cpu
