// The inner loops of the CPU backend. kernels.inl holds their one source; each kernels_<level>.cpp
// compiles it for an instruction level, and kernels<T>() returns the best that this processor runs.
#pragma once

#include <cstdint>
#include <limits>

#include "../layer.h"
#include "dtypes.h"

namespace spectral_ext::cpu {

/// Partial sums are scaled by powers of two up to ± this one: the reciprocals are in range too.
template <class A>
constexpr int kMaxScaleExponent = std::numeric_limits<A>::max_exponent - 28;

template <class T>
struct Kernels {
  using A = compute_t<T>;

  /// Copies rows [first, first + count) of a weight into `packed`, row after row, as A.
  void (*pack)(const T* weight, const Shape& shape, int64_t first, int64_t count, A* packed);

  /// One read of `count` rows of `columns` elements, four rows at a time while they are in cache:
  /// t[r] = row_r · v (if v is not null; t is given otherwise), s += scale · t[r] · row_r (if s is
  /// not null). Returns the scale: if 0 was given, the power of two that brings the first t to
  /// about 1, so that t · row neither overflows nor underflows whatever the size of the weights.
  A (*gram)(const T* rows, int64_t count, int64_t columns, const A* v, A* t, A* s, A scale);

  /// y[j] = Σ_b partial[b · stride + j] · common / scale[b], over `divisor`. Returns Σ y².
  double (*combine)(const A* partial, int64_t stride, int64_t blocks, const A* scale, A common,
                    A divisor, A* y, int64_t n);

  /// y = w / sigma, in compute precision by a product with 1 / sigma. y is of the same type or, for
  /// float, of a half type. `streaming` writes past the caches.
  void (*divide)(const T* w, void* y, DType y_dtype, int64_t n, double sigma, bool streaming);

  /// Σ a · b.
  double (*dot)(const T* a, const T* b, int64_t n);

  /// out = scale · g − coefficient · x; a null g is zero. out is of the same type as g or, for half
  /// types, of float.
  void (*rank_one)(const T* g, const A* x, A scale, A coefficient, void* out, DType out_dtype,
                   int64_t n, bool streaming);

  /// Makes streamed writes visible before whatever is written next.
  void (*fence)();
};

template <class T>
const Kernels<T>& kernels();

/// The instruction level that kernels() chose, for people: "baseline" or "avx2".
const char* instruction_level();

}  // namespace spectral_ext::cpu
