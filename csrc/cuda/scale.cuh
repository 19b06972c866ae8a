// The end of the forward: Y = W / (σ / c), the vectors into their buffers and saved copies, and how
// far the iterations went. Where σ is zero there is nothing to divide by, and the weight is passed
// through; a soft bound does so, too. An output may be its weight: whoever reads an element also
// writes it. Of a float32 weight it may have a half type.
//
// Where σ is zero or not finite, the first piece of the vectors decides alone what becomes of u and
// v (reference.py). It reads the weight once more, if σ is zero; no other case does.
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
  // Not even written: the piece of the vectors reads the weight meanwhile.
  if (divisor == 1 && static_cast<const void*>(w) == static_cast<const void*>(y)) return;
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

/// Whether all elements of a weight are zero. All threads of the CTA must call it.
template <class T>
__device__ __forceinline__ bool is_zero_weight(const ForwardLayer<T>& layer) {
  const Shape& shape = layer.table.shape;
  const int64_t count = shape.outer * shape.rows * shape.inner;
  bool is_zero = true;
#pragma unroll 1
  for (int64_t i = thread_index(); i < count && is_zero; i += kThreads) {
    is_zero = to_compute(layer.weight[i]) == 0;
  }
  return block_sum(is_zero ? 0 : 1) == 0;
}

/// Σ x² of u or v as it is in its buffer, or of the vector to restart from. All threads must call
/// it.
template <class T>
__device__ __forceinline__ double square_of(const ForwardLayer<T>& layer, const void* vector,
                                            int64_t stride, int64_t count) {
  double total = 0;
#pragma unroll 1
  for (int64_t i = thread_index(); i < count; i += kThreads) {
    const double x = vector == nullptr ? start_entry(i, false)
                                       : static_cast<double>(layer.element(vector, i * stride));
    total += x * x;
  }
  return block_sum(total);
}

/// Saves u or v as it is, or puts the vector to restart from into it and saves that.
template <class T>
__device__ __forceinline__ void leave_vector(const ForwardLayer<T>& layer, void* vector,
                                             int64_t stride, int64_t count, bool restart,
                                             compute_t<T>* saved) {
  const bool alternating = layer.element(vector, 0) > 0;  // not the vector that it is
  const double norm =
      sqrt(square_of(layer, nullptr, 0, count));  // and a barrier before it is written
#pragma unroll 1
  for (int64_t i = thread_index(); i < count; i += kThreads) {
    if (restart) {
      const auto value = static_cast<compute_t<T>>(start_entry(i, alternating) / norm);
      layer.write_element(vector, i * stride, value);
    }
    saved[i] = layer.element(vector, i * stride);
  }
}

/// The vectors after a forward that found no σ: they stay where they are of use and the weight has
/// none, else they restart.
template <class T>
__device__ __forceinline__ void keep_or_restart(const ForwardLayer<T>& layer, compute_t<T> sigma) {
  const LayerTable& table = layer.table;
  const int64_t rows = table.shape.rows, columns = table.shape.outer * table.shape.inner;
  bool restart = !layer.is_usable(square_of(layer, layer.u, table.u_stride, rows)) ||
                 !layer.is_usable(square_of(layer, layer.v, table.v_stride, columns));
  if (!restart && sigma == 0) restart = !is_zero_weight(layer);
  leave_vector(layer, layer.u, table.u_stride, rows, restart, layer.u_saved);
  leave_vector(layer, layer.v, table.v_stride, columns, restart, layer.v_saved);
}

/// Elements [begin, end) of u followed by v, where v is counted in storage order.
template <class T>
__device__ __forceinline__ void write_vectors(const ForwardLayer<T>& layer, const Piece& piece) {
  using A = compute_t<T>;
  const LayerTable& table = layer.table;
  const A sigma = layer.find_sigma();
  if (piece.index == 0 && thread_index() == 0) *layer.sigma = sigma;
  if (piece.index == 0 && layer.residual != nullptr) write_convergence(layer);
  const bool keep = !table.update;
  if (table.update && !(sigma != 0 && fabs(static_cast<double>(sigma)) < __builtin_inf())) {
    if (piece.index == 0) keep_or_restart(layer, sigma);
    return;
  }
  A u_divisor = 1, v_divisor = 1;
  if (!keep) {
    u_divisor = static_cast<A>(at_least(layer.norm_of_t(layer.last_iteration()), table.eps));
    v_divisor = static_cast<A>(at_least(layer.norm_of_y(layer.last_iteration()), table.eps));
  } else if (layer.norm_of_vectors() != 1) {
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
