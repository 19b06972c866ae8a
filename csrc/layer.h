// One layer as the kernels see it: plain pointers, sizes and settings. No torch here.
//
// Only dense weights reach a kernel (their elements fill one block of memory, in any order of the
// dimensions). The dimension that gives the rows splits such a block into outer × rows × inner:
//
//   contiguous, dim 0        outer = 1
//   channels_last, dim 0     outer = 1, columns in another order
//   ConvTranspose, dim 1     outer = in_channels, inner = kernel elements
//   a transposed matrix      inner = 1
//
// Column c = o * inner + i of the kernels is in storage order; ColumnOrder maps it to the order of
// v.
#pragma once

#include <cstdint>

namespace spectral_ext {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

/// The size of the type that sums and saved vectors have: double for double weights, else float.
constexpr int64_t compute_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

/// That type, for elements of type T.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using compute_t = typename ComputeType<T>::type;

/// The dimensions of the columns in storage order, outermost first, with their strides in v.
/// count 0 means that both orders are the same.
struct ColumnOrder {
  static constexpr int kMaxDims = 8;
  int count = 0;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];
};

struct Shape {
  int64_t outer, rows, inner;
  ColumnOrder column_order;

  int64_t columns() const { return outer * inner; }
  int64_t numel() const { return outer * rows * inner; }
};

/// The forward of one layer. u, v have the weight's dtype, or with `wide_vectors` the compute type,
/// which u_saved, v_saved, sigma, residual and iterations have.
struct Layer {
  Shape shape;
  DType dtype;
  DType output_dtype;  // the same, or a half type for float32 weights
  bool wide_vectors;
  bool v_first;
  int n_power_iterations;
  double eps;
  double tol;    // 0: all iterations are made
  double scale;  // c of W · c / σ
  bool soft;     // a weight whose σ is at most c is left alone
  const void* weight;
  void* output;  // may be the weight itself
  void* u;
  void* v;
  int64_t u_stride, v_stride;
  void* u_saved;
  void* v_saved;
  void* sigma;
  void *residual, *iterations;  // null: not wanted
};

/// The backward of one layer. A null grad_output or grad_sigma is zero.
struct LayerGradient {
  Shape shape;
  DType dtype;       // of gradient and output
  DType grad_dtype;  // of grad_weight: the same, or float32 for a half output
  double scale;
  bool soft;
  bool detach_sigma;  // σ is a constant of the output
  const void* grad_output;
  const void* grad_sigma;
  const void* output;
  const void* u;  // as saved by the forward
  const void* v;
  const void* sigma;
  void* grad_weight;
};

/// Whether the output is the weight as it is: where σ, as the caller sees it, is zero or within a
/// soft bound.
inline bool is_left_alone(double sigma, double scale, bool soft) {
  return soft ? sigma <= scale : sigma == 0;
}

/// An entry, before the division by the norm, of the unit vector that u and v restart from:
/// reference.py. With `alternating` those of even index have the other sign.
inline double start_entry(int64_t i, bool alternating) {
  const double x = 1 + static_cast<double>(40503 * i % 65536) / 65536;
  return alternating && i % 2 == 0 ? -x : x;
}

/// By how much the square of ‖u‖·‖v‖ may be off 1 from rounding alone; vectors that are off by more
/// are averages of unit vectors, and divided by their norms in evaluation.
inline double slack_of_vectors(DType dtype, bool wide_vectors) {
  const bool is_half = dtype == DType::kBFloat16 || dtype == DType::kFloat16;
  return is_half && !wide_vectors ? 1.0 / 32 : 1e-4;
}

}  // namespace spectral_ext
