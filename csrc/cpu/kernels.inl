// The kernels of kernels.h for one instruction level. The including file has included every header,
// switched the compiler to its level, and defined SPECTRAL_EXT_VECTOR_BYTES (and SPECTRAL_EXT_FMA,
// SPECTRAL_EXT_AVX2 where they hold). All is in an unnamed namespace: a function for one level must
// never be merged with its namesake for another.
//
// Vectors are the GCC/Clang extension, of numbers in compute precision; loads and stores convert,
// and are unaligned unless they stream.

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

// Vectors of half types.
#if defined(SPECTRAL_EXT_AVX2)
typedef __m128i Halves;

inline __m256 widened(Float16, __m128i halves) { return _mm256_cvtph_ps(halves); }

inline __m256 widened(BFloat16, __m128i halves) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

inline __m128i narrowed(Float16, __m256 x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline __m128i narrowed(BFloat16, __m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan);
  const __m256i words = _mm256_srli_epi32(kept, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
#else
typedef uint16_t Halves __attribute__((vector_size(SPECTRAL_EXT_VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(SPECTRAL_EXT_VECTOR_BYTES)));

#if defined(__SSE2__)
inline Words words_of(Halves halves) {
  const __m128i bits = _mm_cvtsi64_si128(bits_as<int64_t>(halves));
  return bits_as<Words>(_mm_unpacklo_epi16(bits, _mm_setzero_si128()));
}

inline Halves halves_of(Words words) {  // with the sign extended, as the packing takes them
  const __m128i bits = _mm_srai_epi32(_mm_slli_epi32(bits_as<__m128i>(words), 16), 16);
  return bits_as<Halves>(_mm_cvtsi128_si64(_mm_packs_epi32(bits, bits)));
}
#else
inline Words words_of(Halves halves) { return __builtin_convertvector(halves, Words); }
inline Halves halves_of(Words words) { return __builtin_convertvector(words, Halves); }
#endif

template <class T>
inline Vector<float> widened(T, Halves halves) {
  return widen<Vector<float>>(T{}, words_of(halves));
}

template <class T>
inline Halves narrowed(T, Vector<float> x) {
  return halves_of(narrow<Words>(T{}, x));
}
#endif

template <class T>
inline Vector<compute_t<T>> load(const T* p) {
  using A = compute_t<T>;
  if constexpr (std::is_same_v<T, A>) {
    return *reinterpret_cast<const Vector<A>*>(p);
  } else {
    Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    return widened(T{}, halves);
  }
}

template <class T>
inline void store(T* p, Vector<compute_t<T>> x) {
  using A = compute_t<T>;
  if constexpr (std::is_same_v<T, A>) {
    *reinterpret_cast<Vector<A>*>(p) = x;
  } else {
    const Halves halves = narrowed(T{}, x);
    std::memcpy(p, &halves, sizeof halves);
  }
}

/// Past the caches where the level can; p is aligned to what is written.
template <class T>
inline void stream(T* p, Vector<compute_t<T>> x) {
#if defined(SPECTRAL_EXT_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    _mm256_stream_ps(p, x);
  } else if constexpr (std::is_same_v<T, double>) {
    _mm256_stream_pd(p, x);
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrowed(T{}, x));
  }
#elif defined(__SSE2__)
  if constexpr (std::is_same_v<T, float>) {
    _mm_stream_ps(p, x);
  } else if constexpr (std::is_same_v<T, double>) {
    _mm_stream_pd(p, x);
  } else {
    store(p, x);
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

/// Writes value(i) to out[i] for i of [0, n), where vector(i) is the value of the whole vector from
/// i on. Vectors of `out` are aligned.
template <class Out, class VectorValue, class Value>
inline void write(Out* out, int64_t n, bool streaming, VectorValue vector, Value value) {
  constexpr int64_t lanes = kLanes<compute_t<Out>>;
  const auto place = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) / sizeof(Out));
  const auto tail = [=](int64_t i) { out[i] = from_compute<Out>(value(i)); };
  const auto all = [=](auto put) {
    int64_t i = 0;
    for (; i < std::min((lanes - place % lanes) % lanes, n); ++i) tail(i);
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
      for (int64_t k = 0; k < 4; ++k) put(out + i + k * lanes, vector(i + k * lanes));
    }
    for (; i + lanes <= n; i += lanes) put(out + i, vector(i));
    for (; i < n; ++i) tail(i);
  };
  if (streaming) {
    all([](Out* p, auto x) { stream(p, x); });
  } else {
    all([](Out* p, auto x) { store(p, x); });
  }
}

/// Writes f(x) for every x, where f takes numbers and vectors.
template <class T, class Y, class F>
inline void map(const T* x, Y* y, int64_t n, bool streaming, F f) {
  write(
      y, n, streaming, [=](int64_t i) { return f(load(x + i)); },
      [=](int64_t i) { return f(to_compute(x[i])); });
}

template <class T>
inline void convert(const T* x, compute_t<T>* y, int64_t n) {
  map(x, y, n, false, [](auto value) { return value; });
}

template <class T>
void pack(const T* weight, const Shape& shape, int64_t first, int64_t count, compute_t<T>* packed) {
  const int64_t rows = shape.rows, inner = shape.inner, columns = shape.columns();
  if (shape.outer == 1) {
    convert(weight + first * inner, packed, count * inner);
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
        convert(weight + (o * rows + first + r) * inner, packed + r * columns + o * inner, inner);
      }
    }
  }
}

// While four rows are read twice, the next four come from memory: the products ask for the first
// `ahead` of them, the sums for the others.

/// Asks for the cache line of p[offset], which may lie behind the end of the memory of p.
template <class T>
inline void prefetch(const T* p, int64_t offset) {
  const auto address = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(offset) * sizeof(T);
  __builtin_prefetch(reinterpret_cast<const void*>(address));
}

template <class T, int kRows>
inline void dot_rows(const T* rows, int64_t columns, const compute_t<T>* v, compute_t<T>* t,
                     int ahead) {
  using A = compute_t<T>;
  // Long float sums are made of pieces, so that rounding errors do not grow with the length.
  constexpr int64_t n = kLanes<A>, kPiece = 1024;
  double total[kRows] = {};
  int64_t j = 0;
  while (j + 2 * n <= columns) {
    Vector<A> sum[kRows][2] = {};
    const int64_t stop = std::min(columns, j + kPiece);
    for (; j + 2 * n <= stop; j += 2 * n) {
      for (int r = 0; r < kRows; ++r) {
        if (r < ahead) prefetch(rows, (kRows + r) * columns + j);
        sum[r][0] += load(rows + r * columns + j) * load(v + j);
        sum[r][1] += load(rows + r * columns + j + n) * load(v + j + n);
      }
    }
    for (int r = 0; r < kRows; ++r)
      total[r] += static_cast<double>(lane_sum<A>(sum[r][0] + sum[r][1]));
  }
  A tail[kRows] = {};
  for (; j < columns; ++j) {
    for (int r = 0; r < kRows; ++r) tail[r] += to_compute(rows[r * columns + j]) * v[j];
  }
  for (int r = 0; r < kRows; ++r) t[r] = static_cast<A>(total[r] + static_cast<double>(tail[r]));
}

template <class T, int kRows>
inline void accumulate_rows(const T* rows, int64_t columns, const compute_t<T>* t,
                            compute_t<T> scale, compute_t<T>* s, int ahead) {
  using A = compute_t<T>;
  A weight[kRows];
  for (int r = 0; r < kRows; ++r) weight[r] = t[r] * scale;
  constexpr int64_t n = kLanes<A>;
  int64_t j = 0;
  for (; j + 2 * n <= columns; j += 2 * n) {
    Vector<A> sum[2] = {load(s + j), load(s + j + n)};
    for (int r = 0; r < kRows; ++r) {
      if (r >= ahead) prefetch(rows, (kRows + r) * columns + j);
      sum[0] += weight[r] * load(rows + r * columns + j);
      sum[1] += weight[r] * load(rows + r * columns + j + n);
    }
    store(s + j, sum[0]);
    store(s + j + n, sum[1]);
  }
  for (; j + n <= columns; j += n) {
    Vector<A> sum = load(s + j);
    for (int r = 0; r < kRows; ++r) sum += weight[r] * load(rows + r * columns + j);
    store(s + j, sum);
  }
  for (; j < columns; ++j) {
    for (int r = 0; r < kRows; ++r) s[j] += weight[r] * to_compute(rows[r * columns + j]);
  }
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

template <class T, int kRows>
inline compute_t<T> gram_rows(const T* rows, int64_t columns, const compute_t<T>* v,
                              compute_t<T>* t, compute_t<T>* s, compute_t<T> scale) {
  using A = compute_t<T>;
  const int ahead = v == nullptr ? 0 : s == nullptr ? kRows : kRows / 2;
  if (v != nullptr) dot_rows<T, kRows>(rows, columns, v, t, ahead);
  if (s == nullptr) return scale;
  scale = choose_scale<A, kRows>(t, scale);
  accumulate_rows<T, kRows>(rows, columns, t, scale == 0 ? A(1) : scale, s, ahead);
  return scale;
}

template <class T>
compute_t<T> gram(const T* rows, int64_t count, int64_t columns, const compute_t<T>* v,
                  compute_t<T>* t, compute_t<T>* s, compute_t<T> scale) {
  constexpr int kRows = 4;
  int64_t r = 0;
  for (; r + kRows <= count; r += kRows) {
    scale = gram_rows<T, kRows>(rows + r * columns, columns, v, t + r, s, scale);
  }
  for (; r < count; ++r) {
    scale = gram_rows<T, 1>(rows + r * columns, columns, v, t + r, s, scale);
  }
  return scale;
}

template <class A>
double combine(const A* partial, int64_t stride, int64_t blocks, const A* scale, A common,
               A divisor, A* y, int64_t n) {
  constexpr int64_t kStrip = 32;
  double norm2 = 0;
  for (int64_t first = 0; first < n; first += kStrip) {
    const int64_t count = std::min(kStrip, n - first);
    double total[kStrip] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const A* source = partial + b * stride + first;
      const A ratio = common / scale[b];
      for (int64_t k = 0; k < count; ++k) total[k] += static_cast<double>(source[k] * ratio);
    }
    for (int64_t k = 0; k < count; ++k) {
      y[first + k] = static_cast<A>(total[k] / static_cast<double>(divisor));
      norm2 += static_cast<double>(y[first + k]) * static_cast<double>(y[first + k]);
    }
  }
  return norm2;
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
  constexpr int64_t lanes = kLanes<A>, kUnroll = 4, kPiece = 2048;
  double total = 0;
  int64_t i = 0;
  while (i + kUnroll * lanes <= n) {
    Vector<A> sum[kUnroll] = {};
    const int64_t stop = std::min(n, i + kPiece);
    for (; i + kUnroll * lanes <= stop; i += kUnroll * lanes) {
      for (int64_t k = 0; k < kUnroll; ++k) {
        sum[k] += load(a + i + k * lanes) * load(b + i + k * lanes);
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
  if (g == nullptr) return map(x, out, n, streaming, [=](auto x) { return -coefficient * x; });
  write(
      out, n, streaming, [=](int64_t i) { return scale * load(g + i) - coefficient * load(x + i); },
      [=](int64_t i) { return scale * to_compute(g[i]) - coefficient * x[i]; });
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
constexpr Kernels<T> kKernels = {pack<T>,     gram<T>, combine<compute_t<T>>, divide<T>, dot<T>,
                                 rank_one<T>, fence};

}  // namespace
}  // namespace spectral_ext::cpu
