// Passes over rows that are too wide for rows.cuh, in tiles of columns. A row does not stay
// anywhere between its dot product and its share of the sums, so the plan asks for the two one
// after the other, and W is read twice per iteration. v is read from global memory, where L2 serves
// it.
#pragma once

#include "rows.cuh"

namespace spectral_ext::cuda {

/// As Rows, for any width.
template <class T>
struct WideRows {
  const T* weight;
  int64_t rows, inner, columns;
  bool vectors;

  __device__ __forceinline__ explicit WideRows(const ForwardLayer<T>& layer)
      : weight(layer.weight),
        rows(layer.table.shape.rows),
        inner(layer.table.shape.inner),
        columns(layer.table.shape.outer * inner),
        vectors(inner % Vector<T>::kLanes == 0 && is_aligned(weight)) {}

  __device__ __forceinline__ int64_t place(int64_t row, int64_t column) const {
    if (columns > INT32_MAX) return (column / inner * rows + row) * inner + column % inner;
    const auto c = static_cast<uint32_t>(column),
               n = static_cast<uint32_t>(inner);  // several times faster
    return (static_cast<int64_t>(c / n) * rows + row) * inner + c % n;
  }

  /// The vector that begins at a column; zeros beyond the row.
  __device__ __forceinline__ Vector<T> load(int64_t row, int64_t column) const {
    if (vectors) return load_vector(weight + place(row, column));
    Vector<T> x = {};
    for (int e = 0; e < Vector<T>::kLanes; ++e) {
      if (column + e < columns) x.lane[e] = weight[place(row, column + e)];
    }
    return x;
  }
};

template <class T>
__device__ __forceinline__ void wide_dots(const ForwardLayer<T>& layer, const Piece& piece) {
  using A = compute_t<T>;
  constexpr int kLanes = Vector<T>::kLanes;
  const WideRows<T> rows(layer);
  const A divisor = piece.initial ? A(1) : divisor_of_y(layer, piece);
  double total = 0;
  for (int64_t row = piece.begin; row < piece.end; ++row) {
    double dot = 0;  // of pieces short enough for A
    for (int64_t c = thread_index() * kLanes; c < rows.columns; c += kThreads * kLanes) {
      const Vector<T> x = rows.load(row, c);
      A sum = 0;
#pragma unroll
      for (int e = 0; e < kLanes; ++e) {
        if (c + e >= rows.columns) continue;
        const A v = piece.initial ? layer.v_at(place_in_v(layer.table.shape.column_order, c + e))
                                  : layer.y()[c + e] / divisor;
        sum += to_compute(x.lane[e]) * v;
      }
      dot += sum;
    }
    const A t = static_cast<A>(block_sum(dot));
    if (thread_index() == 0) layer.t()[row] = t;
    const double value = t;
    total += value * (layer.table.update ? value : static_cast<double>(layer.u_at(row)));
  }
  if (thread_index() == 0) layer.block_sums(piece.iteration)[piece.index] = total;
}

template <class T>
__device__ __forceinline__ void wide_sums(const ForwardLayer<T>& layer, const Piece& piece) {
  using A = compute_t<T>;
  constexpr int kLanes = Vector<T>::kLanes;
  const WideRows<T> rows(layer);
  A scale = largest_scale<A>();
  for (int64_t row = piece.begin; row < piece.end; ++row) {
    const A t = piece.initial ? layer.u_at(row) : layer.t()[row];
    if (is_too_large(t, scale)) scale = scale_for(t);
  }
  if (thread_index() == 0) layer.scale()[piece.index] = scale;
  A* const partial = layer.partial() + piece.index * rows.columns;
  for (int64_t c = thread_index() * kLanes; c < rows.columns; c += kThreads * kLanes) {
    A sums[kLanes] = {};
    for (int64_t row = piece.begin; row < piece.end; ++row) {
      const A factor = (piece.initial ? layer.u_at(row) : layer.t()[row]) * scale;
      const Vector<T> x = rows.load(row, c);
#pragma unroll
      for (int e = 0; e < kLanes; ++e) sums[e] += factor * to_compute(x.lane[e]);
    }
#pragma unroll
    for (int e = 0; e < kLanes; ++e) {
      if (c + e < rows.columns) partial[c + e] = sums[e];
    }
  }
}

template <class T>
__device__ __forceinline__ void read_wide_rows(const ForwardLayer<T>& layer, const Piece& piece) {
  if (piece.dots) wide_dots(layer, piece);
  if (piece.sums) wide_sums(layer, piece);
}

}  // namespace spectral_ext::cuda
