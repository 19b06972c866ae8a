// The end of the forward: Y = W / (σ / c), the vectors into their buffers and saved copies, and how
// far the iterations went. Where σ is zero there is nothing to divide by: the weight is passed
// through and the vectors stay as they were. A soft bound passes the weight through, too, but not
// the vectors. An output may be its weight: whoever reads an element also writes it. Of a float32
// weight it may have a half type.
#pragma once

#include <type_traits>

#include "layer.cuh"

namespace spectral_ext::cuda {

template <class T, class Y>
__device__ __forceinline__ void scale_elements_into(Y* y, const ForwardLayer<T>& layer,
                                                    const Piece& piece) {
  using A = compute_t<T>;
  constexpr int kLanes = Vector<Y>::kLanes, kLoaded = Vector<T>::kLanes;
  const A sigma = layer.find_sigma();
  const A divisor = is_left_alone(layer.table, sigma)
                        ? A(1)
                        : static_cast<A>(static_cast<double>(sigma) / layer.table.target);
  const T* const w = layer.weight;
  int64_t i = piece.begin + thread_index();  // pieces begin at whole vectors
  if (is_aligned(w) && is_aligned(y)) {
    const int64_t whole = piece.begin + (piece.end - piece.begin) / kLanes * kLanes;
#pragma unroll 4
    for (int64_t j = piece.begin + thread_index() * kLanes; j < whole; j += kThreads * kLanes) {
      Vector<Y> result;
#pragma unroll
      for (int first = 0; first < kLanes; first += kLoaded) {
        const Vector<T> x = load_once(w + j + first);
#pragma unroll
        for (int e = 0; e < kLoaded; ++e)
          store(&result.lane[first + e], to_compute(x.lane[e]) / divisor);
      }
      store_once(y + j, result);
    }
    i = whole + thread_index();
  }
  for (; i < piece.end; i += kThreads) store(y + i, to_compute(w[i]) / divisor);
}

template <class T>
__device__ __forceinline__ void scale_elements(const ForwardLayer<T>& layer, const Piece& piece) {
  if constexpr (std::is_same_v<T, float>) {
    if (layer.table.output_dtype == DType::kBFloat16)
      return scale_elements_into(static_cast<BFloat16*>(layer.output), layer, piece);
    if (layer.table.output_dtype == DType::kFloat16)
      return scale_elements_into(static_cast<Float16*>(layer.output), layer, piece);
  }
  scale_elements_into(static_cast<T*>(layer.output), layer, piece);
}

/// The residual of the last iteration and how many were made. All threads of the CTA must call it.
template <class T>
__device__ __forceinline__ void write_convergence(const ForwardLayer<T>& layer) {
  using A = compute_t<T>;
  const LayerTable& table = layer.table;
  double residual = __builtin_nan("");
  int iterations = table.update ? table.n_power_iterations : 0;
  if (table.update && table.tol > 0) {
    const auto of = layer.squares(layer.last_iteration());
    residual = of.after <= of.before ? 0 : sqrt((of.after - of.before) / of.after);
    iterations = *layer.iterations_made();
  }
  if (thread_index() > 0) return;
  *layer.residual = static_cast<A>(residual);
  *layer.iterations = static_cast<A>(iterations);
}

/// Elements [begin, end) of u followed by v, where v is counted in storage order.
template <class T>
__device__ __forceinline__ void write_vectors(const ForwardLayer<T>& layer, const Piece& piece) {
  using A = compute_t<T>;
  const LayerTable& table = layer.table;
  const A sigma = layer.find_sigma();
  if (piece.index == 0 && thread_index() == 0) *layer.sigma = sigma;
  if (piece.index == 0 && layer.residual != nullptr) write_convergence(layer);
  const bool keep = !table.update || sigma == 0;
  A u_divisor = 1, v_divisor = 1;
  if (!keep) {
    u_divisor = static_cast<A>(at_least(layer.norm_of_t(layer.last_iteration()), table.eps));
    v_divisor = static_cast<A>(at_least(layer.norm_of_y(layer.last_iteration()), table.eps));
  } else if (!table.update && layer.norm_of_vectors() != 1) {
    u_divisor = static_cast<A>(layer.norm_of_t(1));
    v_divisor = static_cast<A>(sqrt(*layer.square_of_v()));
  }
  for (int64_t i = piece.begin + thread_index(); i < piece.end; i += kThreads) {
    if (i < table.shape.rows) {
      const A value = (keep ? layer.u_at(i) : layer.t()[i]) / u_divisor;
      layer.u_saved[i] = value;
      if (!keep) layer.write_element(layer.u, i * table.u_stride, value);
    } else {
      const int64_t column = i - table.shape.rows;
      const int64_t place = place_in_v(table.shape.column_order, column);
      const A value = (keep ? layer.v_at(place) : layer.y()[column]) / v_divisor;
      layer.v_saved[place] = value;
      if (!keep) layer.write_element(layer.v, place * table.v_stride, value);
    }
  }
}

}  // namespace spectral_ext::cuda
