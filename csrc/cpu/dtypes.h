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

// Conversions round to nearest even. They work on the bits of a number, or of a vector of numbers:
// F is float and U is uint32_t, or both are vectors of these. So they have no branches.

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class F, class U>
inline F widen(BFloat16, U half) {
  return bits_as<F>(half << 16);
}

template <class F, class U>
inline F widen(Float16, U half) {
  // Moved into place, the exponent is short by 112; a multiplication mends that, also for
  // subnormals.
  const U magnitude = (half & 0x7fffu) << 13;
  const U finite = bits_as<U>(bits_as<F>(magnitude) * 0x1p112f);
  const U infinite = magnitude >= 0x0f800000u ? U{} + 0x7f800000u : U{};  // or NaN
  return bits_as<F>(finite | infinite | (half & 0x8000u) << 16);
}

template <class U, class F>
inline U narrow(BFloat16, F x) {
  const U bits = bits_as<U>(x);
  const U rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? U{} + 0x7fc0u : rounded;
}

template <class U, class F>
inline U narrow(Float16, F x) {
  const U bits = bits_as<U>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Subnormal results: adding 0.5 leaves the rounded half in the low bits of the sum.
  const U small = bits_as<U>(bits_as<F>(magnitude) + 0.5f) - 0x3f000000u;
  const U normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  U half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? U{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? U{} + 0x7e00u : half;
  return half | sign;
}

template <class T>
inline compute_t<T> to_compute(T x) {
  if constexpr (sizeof(T) >= 4) {
    return x;
  } else {
    return widen<float>(x, uint32_t{x.bits});
  }
}

template <class T>
inline T from_compute(compute_t<T> x) {
  if constexpr (sizeof(T) >= 4) {
    return x;
  } else {
    return {static_cast<uint16_t>(narrow<uint32_t>(T{}, x))};
  }
}

}  // namespace spectral_ext::cpu
