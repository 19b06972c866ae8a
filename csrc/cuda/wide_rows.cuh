// Passes over rows that are too wide for rows.cuh, in tiles of columns. A row does not stay
// anywhere between its dot product and its share of the sums, so the plan asks for the two one
// after the other, and W is read twice per iteration. v is read from global memory, where L2 serves
// it.
#pragma once

#include "rows.cuh"

namespace spectral_ext::cuda {

template <class T>
__device__ __forceinline__ void wide_dots(const ForwardLayer<T>& layer, const Piece& piece) {
  using A = compute_t<T>;
  constexpr int kLanes = Vector<T>::kLanes;
  const Rows<T> rows(layer);
  const A divisor =
      piece.initial ? A(1) : static_cast<A>(at_least(layer.norm_of_y(), layer.table.eps));
  double total = 0;
  for (int64_t row = piece.begin; row < piece.end; ++row) {
    double dot = 0;  // of pieces short enough for A
    for (int64_t c = threadIdx.x * kLanes; c < rows.columns; c += kThreads * kLanes) {
      const Vector<T> x = rows.load(row, c);
      A sum = 0;
#pragma unroll
      for (int e = 0; e < kLanes; ++e) {
        if (c + e >= rows.columns) continue;
        const A v = piece.initial ? layer.v_at(place_in_v(layer.table.shape.column_order, c + e))
                                  : layer.y[c + e] / divisor;
        sum += to_compute(x.lane[e]) * v;
      }
      dot += sum;
    }
    const A t = static_cast<A>(block_sum(dot));
    if (threadIdx.x == 0) layer.t[row] = t;
    const double value = t;
    total += value * (layer.table.update ? value : static_cast<double>(layer.u_at(row)));
  }
  if (threadIdx.x == 0) layer.block_sums[piece.index] = total;
}

template <class T>
__device__ __forceinline__ void wide_sums(const ForwardLayer<T>& layer, const Piece& piece) {
  using A = compute_t<T>;
  constexpr int kLanes = Vector<T>::kLanes;
  const Rows<T> rows(layer);
  A scale = largest_scale<A>();
  for (int64_t row = piece.begin; row < piece.end; ++row) {
    const A t = piece.initial ? layer.u_at(row) : layer.t[row];
    if (is_too_large(t, scale)) scale = scale_for(t);
  }
  if (threadIdx.x == 0) layer.scale[piece.index] = scale;
  A* const partial = layer.partial + piece.index * rows.columns;
  for (int64_t c = threadIdx.x * kLanes; c < rows.columns; c += kThreads * kLanes) {
    A sums[kLanes] = {};
    for (int64_t row = piece.begin; row < piece.end; ++row) {
      const A factor = (piece.initial ? layer.u_at(row) : layer.t[row]) * scale;
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
