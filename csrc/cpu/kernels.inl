// The kernels of kernels.h for one instruction level. The including file has included every header,
// switched the compiler to its level, and defined SPECTRAL_EXT_VECTOR_BYTES (and SPECTRAL_EXT_FMA,
// SPECTRAL_EXT_AVX2 where they hold). All is in an unnamed namespace: a function for one level must
// never be merged with its namesake for another.
//
// Vectors are the GCC/Clang extension; loads and stores are unaligned unless they stream.

namespace spectral_ext::cpu {
namespace {

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(SPECTRAL_EXT_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type
      __attribute__((vector_size(SPECTRAL_EXT_VECTOR_BYTES), aligned(8), may_alias));
};
template <class A>
using Vector = typename VectorOf<A>::type;

template <class A>
constexpr int64_t kLanes = SPECTRAL_EXT_VECTOR_BYTES / sizeof(A);

template <class A>
inline Vector<A> load(const A* p) {
  return *reinterpret_cast<const Vector<A>*>(p);
}

template <class A>
inline void store(A* p, Vector<A> x) {
  *reinterpret_cast<Vector<A>*>(p) = x;
}

/// Past the caches where the level can; p is aligned to the vector.
template <class A>
inline void stream(A* p, Vector<A> x) {
#if defined(SPECTRAL_EXT_AVX2)
  if constexpr (sizeof(A) == 4) {
    _mm256_stream_ps(p, x);
  } else {
    _mm256_stream_pd(p, x);
  }
#elif defined(__SSE2__)
  if constexpr (sizeof(A) == 4) {
    _mm_stream_ps(p, x);
  } else {
    _mm_stream_pd(p, x);
  }
#else
  store(p, x);
#endif
}

void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class A>
inline A lane_sum(Vector<A> x) {
  A total = 0;
  for (int64_t k = 0; k < kLanes<A>; ++k) total += x[k];
  return total;
}

template <class T>
void pack(const T* weight, const Shape& shape, int64_t first, int64_t count, compute_t<T>* packed) {
  const int64_t rows = shape.rows, inner = shape.inner, columns = shape.columns();
  if (shape.outer == 1) {
    const T* source = weight + first * inner;
    for (int64_t i = 0; i < count * inner; ++i) packed[i] = to_compute(source[i]);
  } else if (inner == 1) {
    // A transposition, in strips of columns that keep their cache lines from row to row.
    constexpr int64_t kStrip = 16;
    for (int64_t o = 0; o < columns; o += kStrip) {
      const int64_t width = std::min(kStrip, columns - o);
      for (int64_t r = 0; r < count; ++r) {
        const T* source = weight + o * rows + first + r;
        for (int64_t k = 0; k < width; ++k)
          packed[r * columns + o + k] = to_compute(source[k * rows]);
      }
    }
  } else {
    for (int64_t o = 0; o < shape.outer; ++o) {
      for (int64_t r = 0; r < count; ++r) {
        const T* source = weight + (o * rows + first + r) * inner;
        for (int64_t i = 0; i < inner; ++i)
          packed[r * columns + o * inner + i] = to_compute(source[i]);
      }
    }
  }
}

template <class A, int kRows>
inline void dot_rows(const A* rows, int64_t columns, const A* v, A* t) {
  // Long float sums are made of pieces, so that rounding errors do not grow with the length.
  constexpr int64_t n = kLanes<A>, kPiece = 1024;
  double total[kRows] = {};
  int64_t j = 0;
  while (j + 2 * n <= columns) {
    Vector<A> sum[kRows][2] = {};
    const int64_t stop = std::min(columns, j + kPiece);
    for (; j + 2 * n <= stop; j += 2 * n) {
      for (int r = 0; r < kRows; ++r) {
        sum[r][0] += load(rows + r * columns + j) * load(v + j);
        sum[r][1] += load(rows + r * columns + j + n) * load(v + j + n);
      }
    }
    for (int r = 0; r < kRows; ++r)
      total[r] += static_cast<double>(lane_sum<A>(sum[r][0] + sum[r][1]));
  }
  A tail[kRows] = {};
  for (; j < columns; ++j) {
    for (int r = 0; r < kRows; ++r) tail[r] += rows[r * columns + j] * v[j];
  }
  for (int r = 0; r < kRows; ++r) t[r] = static_cast<A>(total[r] + static_cast<double>(tail[r]));
}

template <class A, int kRows>
inline void accumulate_rows(const A* rows, int64_t columns, const A* t, A scale, A* s) {
  A weight[kRows];
  for (int r = 0; r < kRows; ++r) weight[r] = t[r] * scale;
  constexpr int64_t n = kLanes<A>;
  int64_t j = 0;
  for (; j + n <= columns; j += n) {
    Vector<A> sum = load(s + j);
    for (int r = 0; r < kRows; ++r) sum += weight[r] * load(rows + r * columns + j);
    store(s + j, sum);
  }
  for (; j < columns; ++j) {
    for (int r = 0; r < kRows; ++r) s[j] += weight[r] * rows[r * columns + j];
  }
}

/// t = rows · v of the next rows and s += Σ weight · row of the ones before, in one loop: while the
/// next rows come from memory, the ones before are read again from the cache.
template <class A, int kRows>
inline void dot_and_accumulate_rows(const A* next, const A* rows, int64_t columns, const A* v, A* t,
                                    const A* weight, A* s) {
  constexpr int64_t n = kLanes<A>, kPiece = 1024;
  double total[kRows] = {};
  int64_t j = 0;
  while (j + 2 * n <= columns) {
    Vector<A> sum[kRows][2] = {};
    const int64_t stop = std::min(columns, j + kPiece);
    for (; j + 2 * n <= stop; j += 2 * n) {
      for (int64_t k = 0; k < 2; ++k) {
        const int64_t place = j + k * n;
        const Vector<A> x = load(v + place);
        Vector<A> y = load(s + place);
        for (int r = 0; r < kRows; ++r) {
          sum[r][k] += load(next + r * columns + place) * x;
          y += weight[r] * load(rows + r * columns + place);
        }
        store(s + place, y);
      }
    }
    for (int r = 0; r < kRows; ++r)
      total[r] += static_cast<double>(lane_sum<A>(sum[r][0] + sum[r][1]));
  }
  A tail[kRows] = {};
  for (; j < columns; ++j) {
    for (int r = 0; r < kRows; ++r) {
      tail[r] += next[r * columns + j] * v[j];
      s[j] += weight[r] * rows[r * columns + j];
    }
  }
  for (int r = 0; r < kRows; ++r) t[r] = static_cast<A>(total[r] + static_cast<double>(tail[r]));
}

/// The scale for sums of t · row, if none is chosen yet (0).
template <class A, int kRows>
inline A choose_scale(const A* t, A scale) {
  if (scale != 0) return scale;
  A largest = 0;
  for (int r = 0; r < kRows; ++r) largest = std::max(largest, std::fabs(t[r]));
  if (!(largest > 0 && std::isfinite(largest))) return 0;
  return std::ldexp(A(1),
                    std::clamp(-std::ilogb(largest), -kMaxScaleExponent<A>, kMaxScaleExponent<A>));
}

template <class A, int kRows>
inline A gram_rows(const A* rows, int64_t columns, const A* v, A* t, A* s, A scale) {
  if (v != nullptr) dot_rows<A, kRows>(rows, columns, v, t);
  if (s == nullptr) return scale;
  scale = choose_scale<A, kRows>(t, scale);
  accumulate_rows<A, kRows>(rows, columns, t, scale == 0 ? A(1) : scale, s);
  return scale;
}

template <class A>
A gram(const A* rows, int64_t count, int64_t columns, const A* v, A* t, A* s, A scale) {
  constexpr int64_t kRows = 4, kFirstCache = 32 << 10;
  const int64_t step = kRows * columns;
  int64_t r = 0;
  // Rows that the first cache holds are best read twice one after the other.
  if (v != nullptr && s != nullptr && count >= kRows &&
      step * static_cast<int64_t>(sizeof(A)) > kFirstCache) {
    dot_rows<A, kRows>(rows, columns, v, t);
    for (; r + 2 * kRows <= count; r += kRows) {
      scale = choose_scale<A, kRows>(t + r, scale);
      A weight[kRows];
      for (int64_t k = 0; k < kRows; ++k) weight[k] = t[r + k] * (scale == 0 ? A(1) : scale);
      dot_and_accumulate_rows<A, kRows>(rows + r * columns + step, rows + r * columns, columns, v,
                                        t + r + kRows, weight, s);
    }
    scale = choose_scale<A, kRows>(t + r, scale);
    accumulate_rows<A, kRows>(rows + r * columns, columns, t + r, scale == 0 ? A(1) : scale, s);
    r += kRows;
  }
  for (; r + kRows <= count; r += kRows) {
    scale = gram_rows<A, kRows>(rows + r * columns, columns, v, t + r, s, scale);
  }
  for (; r < count; ++r) {
    scale = gram_rows<A, 1>(rows + r * columns, columns, v, t + r, s, scale);
  }
  return scale;
}

template <class A>
double combine(const A* partial, int64_t stride, int64_t blocks, const A* scale, A common,
               A divisor, A* y, int64_t n) {
  for (int64_t b = 0; b < blocks; ++b) {
    const A* source = partial + b * stride;
    const A ratio = common / scale[b];
    for (int64_t j = 0; j < n; ++j) y[j] = (b == 0 ? 0 : y[j]) + source[j] * ratio;
  }
  double norm2 = 0;
  for (int64_t j = 0; j < n; ++j) {
    y[j] /= divisor;
    norm2 += static_cast<double>(y[j]) * static_cast<double>(y[j]);
  }
  return norm2;
}

/// Calls body(vector offset) and tail(element offset) over [0, n); vectors of `out` are aligned.
template <class A, class Body, class Tail>
inline void for_vectors(const A* out, int64_t n, Body body, Tail tail) {
  int64_t i = 0;
  const auto misaligned = reinterpret_cast<uintptr_t>(out) % SPECTRAL_EXT_VECTOR_BYTES / sizeof(A);
  const int64_t head = misaligned == 0 ? 0 : kLanes<A> - static_cast<int64_t>(misaligned);
  for (; i < std::min(head, n); ++i) tail(i);
  for (; i + 4 * kLanes<A> <= n; i += 4 * kLanes<A>) {
    for (int64_t k = 0; k < 4; ++k) body(i + k * kLanes<A>);
  }
  for (; i + kLanes<A> <= n; i += kLanes<A>) body(i);
  for (; i < n; ++i) tail(i);
}

/// Writes f(to_compute(x)) for every x, where f takes numbers and vectors.
template <class T, class Y, class F>
void map(const T* x, Y* y, int64_t n, bool streaming, F f) {
  if constexpr (sizeof(T) >= 4 && std::is_same_v<T, Y>) {
    const auto tail = [=](int64_t i) { y[i] = f(x[i]); };
    if (streaming) {
      for_vectors(y, n, [=](int64_t i) { stream(y + i, f(load(x + i))); }, tail);
    } else {
      for_vectors(y, n, [=](int64_t i) { store(y + i, f(load(x + i))); }, tail);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = from_compute<Y>(f(to_compute(x[i])));
  }
}

template <class T, class Y>
void divide_into(const T* w, Y* y, int64_t n, double sigma, bool streaming) {
  using A = compute_t<T>;
  // 1/σ of the unrounded σ: two roundings in all, as many as a division by the rounded σ has.
  const A inverse = static_cast<A>(1 / sigma);
  if (std::isnormal(inverse)) {
    map(w, y, n, streaming, [=](auto x) { return x * inverse; });
  } else {
    const A divisor = static_cast<A>(sigma);
    map(w, y, n, streaming, [=](auto x) { return x / divisor; });
  }
}

template <class T>
void divide(const T* w, void* y, DType y_dtype, int64_t n, double sigma, bool streaming) {
  if constexpr (std::is_same_v<T, float>) {
    if (y_dtype == DType::kBFloat16)
      return divide_into(w, static_cast<BFloat16*>(y), n, sigma, streaming);
    if (y_dtype == DType::kFloat16)
      return divide_into(w, static_cast<Float16*>(y), n, sigma, streaming);
  }
  divide_into(w, static_cast<T*>(y), n, sigma, streaming);
}

template <class T>
double dot(const T* a, const T* b, int64_t n) {
  using A = compute_t<T>;
  constexpr int64_t lanes = kLanes<A>, kUnroll = 4, kPiece = 4096;
  double total = 0;
  int64_t i = 0;
  while (i + kUnroll * lanes <= n) {
    Vector<A> sum[kUnroll] = {};
    const int64_t stop = std::min(n, i + kPiece);
    for (; i + kUnroll * lanes <= stop; i += kUnroll * lanes) {
      for (int64_t k = 0; k < kUnroll; ++k) {
        if constexpr (sizeof(T) >= 4) {
          sum[k] += load(a + i + k * lanes) * load(b + i + k * lanes);
        } else {
          Vector<A> x, y;
          for (int64_t l = 0; l < lanes; ++l) {
            x[l] = to_compute(a[i + k * lanes + l]);
            y[l] = to_compute(b[i + k * lanes + l]);
          }
          sum[k] += x * y;
        }
      }
    }
    total += static_cast<double>(lane_sum<A>((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
  for (; i < n; ++i)
    total += static_cast<double>(to_compute(a[i])) * static_cast<double>(to_compute(b[i]));
  return total;
}

template <class T, class Out>
void rank_one_into(const T* g, const compute_t<T>* x, compute_t<T> scale, compute_t<T> coefficient,
                   Out* out, int64_t n, bool streaming) {
  if (g == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = from_compute<Out>(-coefficient * x[i]);
  } else if constexpr (sizeof(T) >= 4) {
    const auto tail = [=](int64_t i) { out[i] = scale * g[i] - coefficient * x[i]; };
    const auto value = [=](int64_t i) { return scale * load(g + i) - coefficient * load(x + i); };
    if (streaming) {
      for_vectors(out, n, [=](int64_t i) { stream(out + i, value(i)); }, tail);
    } else {
      for_vectors(out, n, [=](int64_t i) { store(out + i, value(i)); }, tail);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = from_compute<Out>(scale * to_compute(g[i]) - coefficient * x[i]);
    }
  }
}

template <class T>
void rank_one(const T* g, const compute_t<T>* x, compute_t<T> scale, compute_t<T> coefficient,
              void* out, DType out_dtype, int64_t n, bool streaming) {
  if constexpr (sizeof(T) < 4) {
    if (out_dtype == DType::kFloat32)
      return rank_one_into(g, x, scale, coefficient, static_cast<float*>(out), n, streaming);
  }
  rank_one_into(g, x, scale, coefficient, static_cast<T*>(out), n, streaming);
}

template <class T>
constexpr Kernels<T> kKernels = {
    pack<T>, gram<compute_t<T>>, combine<compute_t<T>>, divide<T>, dot<T>, rank_one<T>, fence};

}  // namespace
}  // namespace spectral_ext::cpu
