// The end of the forward: Y = W / σ, and the vectors into their buffers and saved copies. Where σ
// is zero there is nothing to divide by: the weight is passed through and the vectors stay as they
// were.
#pragma once

#include "layer.cuh"

namespace spectral_ext::cuda {

template <class T>
__device__ __forceinline__ void scale_elements(const ForwardLayer<T>& layer, const Piece& piece) {
  using A = compute_t<T>;
  constexpr int kLanes = Vector<T>::kLanes;
  const A sigma = layer.find_sigma();
  const A divisor = sigma == 0 ? A(1) : sigma;
  const T* const w = layer.weight;
  T* const y = layer.output;
  int64_t i = piece.begin + thread_index();  // pieces begin at whole vectors
  if (is_aligned(w) && is_aligned(y)) {
    const int64_t whole = piece.begin + (piece.end - piece.begin) / kLanes * kLanes;
#pragma unroll 4
    for (int64_t j = piece.begin + thread_index() * kLanes; j < whole; j += kThreads * kLanes) {
      Vector<T> x = load_once(w + j);
#pragma unroll
      for (int e = 0; e < kLanes; ++e) store(&x.lane[e], to_compute(x.lane[e]) / divisor);
      store_once(y + j, x);
    }
    i = whole + thread_index();
  }
  for (; i < piece.end; i += kThreads) store(y + i, to_compute(w[i]) / divisor);
}

/// Elements [begin, end) of u followed by v, where v is counted in storage order.
template <class T>
__device__ __forceinline__ void write_vectors(const ForwardLayer<T>& layer, const Piece& piece) {
  using A = compute_t<T>;
  const LayerTable& table = layer.table;
  const A sigma = layer.find_sigma();
  if (piece.index == 0 && thread_index() == 0) *layer.sigma = sigma;
  const bool keep = !table.update || sigma == 0;
  A u_divisor = 1, v_divisor = 1;
  if (!keep) {
    u_divisor = static_cast<A>(at_least(layer.norm_of_t(), table.eps));
    v_divisor = static_cast<A>(at_least(layer.norm_of_y(), table.eps));
  }
  for (int64_t i = piece.begin + thread_index(); i < piece.end; i += kThreads) {
    if (i < table.shape.rows) {
      const A value = keep ? layer.u_at(i) : layer.t()[i] / u_divisor;
      layer.u_saved[i] = value;
      if (!keep) store(layer.u + i * table.u_stride, value);
    } else {
      const int64_t column = i - table.shape.rows;
      const int64_t place = place_in_v(table.shape.column_order, column);
      const A value = keep ? layer.v_at(place) : layer.y()[column] / v_divisor;
      layer.v_saved[place] = value;
      if (!keep) store(layer.v + place * table.v_stride, value);
    }
  }
}

}  // namespace spectral_ext::cuda
