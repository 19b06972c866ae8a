// Gradients: gW = (c·G − a·u vᵀ) / σ + gσ·u vᵀ with a = ⟨G, Y⟩, u and v constant. Without the term
// of a where σ counts as a constant; gW = G + gσ·u vᵀ where the forward has left the weight alone.
//
// Two kinds of pieces over elements in storage order: partial dot products, then the update, which
// begins with what the dots have read last. A third puts v into storage order for channels_last
// weights, so that the update reads it as it comes.
#pragma once

#include "device.cuh"

namespace spectral_ext::cuda {

template <class T>
struct BackwardLayer {
  using A = compute_t<T>;

  const LayerTable& table;
  const T *grad_output, *output;
  void* grad_weight;  // elements of T, or of A
  const A *u, *v, *sigma, *grad_sigma;
  A* ordered_v;
  double* block_sums;

  __device__ __forceinline__ BackwardLayer(const BackwardArguments& arguments, int index)
      : table(arguments.tables.layers[index]) {
    const BackwardPointers& pointers = arguments.layers[index];
    char* const workspace = global(arguments.workspace);
    grad_output = static_cast<const T*>(pointers.grad_output);
    if (grad_output != nullptr) grad_output = global(grad_output);
    output = global(static_cast<const T*>(pointers.output));
    grad_weight = global(pointers.grad_weight);
    u = global(static_cast<const A*>(arguments.saved)) + table.saved;
    v = u + table.shape.rows;
    sigma = global(static_cast<const A*>(arguments.sigmas)) + table.sigma;
    grad_sigma = nullptr;
    if (arguments.grad_sigmas != nullptr) {
      grad_sigma = global(static_cast<const A*>(arguments.grad_sigmas)) + table.sigma;
    }
    ordered_v = reinterpret_cast<A*>(workspace + table.y);
    block_sums = reinterpret_cast<double*>(workspace + table.block_sums);
  }
};

template <class T>
__device__ __forceinline__ void order_v(const BackwardLayer<T>& layer, const Piece& piece) {
  for (int64_t c = piece.begin + thread_index(); c < piece.end; c += kThreads) {
    layer.ordered_v[c] = layer.v[place_in_v(layer.table.shape.column_order, c)];
  }
}

template <class T>
__device__ __forceinline__ void dot_elements(const BackwardLayer<T>& layer, const Piece& piece) {
  using A = compute_t<T>;
  constexpr int kLanes = Vector<T>::kLanes;
  const T *g = layer.grad_output, *y = layer.output;
  double total = 0;
  if (g != nullptr && !layer.table.detach_sigma) {
    int64_t i = piece.begin + thread_index();
    if (is_aligned(g) && is_aligned(y)) {
      const int64_t whole = piece.begin + (piece.end - piece.begin) / kLanes * kLanes;
      A sum = 0;  // of some hundred products at most
#pragma unroll 4
      for (int64_t j = piece.begin + thread_index() * kLanes; j < whole; j += kThreads * kLanes) {
        const Vector<T> a = load_vector(g + j), b = load_vector(y + j);
#pragma unroll
        for (int e = 0; e < kLanes; ++e) sum += to_compute(a.lane[e]) * to_compute(b.lane[e]);
      }
      total = sum;
      i = whole + thread_index();
    }
    for (; i < piece.end; i += kThreads) {
      total += static_cast<double>(to_compute(g[i])) * static_cast<double>(to_compute(y[i]));
    }
  }
  total = block_sum(total);
  if (thread_index() == 0) layer.block_sums[piece.index] = total;
}

/// Walks elements in storage order and knows the row and the column of each.
struct Walk {
  int64_t rows, inner, line, offset;  // element = line * inner + offset
  bool contiguous;

  __device__ __forceinline__ Walk(const Shape& shape, int64_t element)
      : rows(shape.rows),
        inner(shape.inner),
        line(element / inner),
        offset(element % inner),
        contiguous(shape.outer == 1) {}

  __device__ __forceinline__ void advance(int64_t lines, int64_t elements) {
    line += lines;
    offset += elements;
    if (offset >= inner) {
      offset -= inner;
      ++line;
    }
  }
  __device__ __forceinline__ int64_t row() const { return contiguous ? line : line % rows; }
  __device__ __forceinline__ int64_t column() const {
    return contiguous ? offset : line / rows * inner + offset;
  }
};

template <class T, class Out>
__device__ __forceinline__ void update_elements_of(Out* out, const BackwardLayer<T>& layer,
                                                   const Piece& piece) {
  using A = compute_t<T>;
  constexpr int kLanes = Vector<T>::kLanes, kStored = Vector<Out>::kLanes;
  const Shape& shape = layer.table.shape;
  const double along = total_of(layer.block_sums, layer.table.blocks);
  const double sigma = *layer.sigma,
               grad_sigma = layer.grad_sigma == nullptr ? 0 : *layer.grad_sigma;
  const bool left_alone = is_left_alone(layer.table, sigma);
  const A scale = static_cast<A>(left_alone ? 1 : layer.table.target / sigma);
  const A coefficient = static_cast<A>((left_alone ? 0 : along / sigma) - grad_sigma);
  const A* const v = shape.column_order.count > 0 ? layer.ordered_v : layer.v;
  const T* const g = layer.grad_output;

  int64_t i = piece.begin + thread_index();
  if (shape.inner % kLanes == 0 && is_aligned(out) && (g == nullptr || is_aligned(g))) {
    // Whole rows are whole vectors, and so is the end of the last piece.
    constexpr int kStep = kThreads * kLanes;
    const int64_t lines = kStep / shape.inner, elements = kStep % shape.inner;
    Walk walk(shape, piece.begin + thread_index() * kLanes);
#pragma unroll 2
    for (int64_t j = piece.begin + thread_index() * kLanes; j < piece.end; j += kStep) {
      const Vector<T> x = g == nullptr ? Vector<T>{} : load_once(g + j);
      const A factor = coefficient * layer.u[walk.row()];
      const A* const along_row = v + walk.column();
#pragma unroll
      for (int first = 0; first < kLanes; first += kStored) {
        Vector<Out> result;
#pragma unroll
        for (int e = 0; e < kStored; ++e) {
          store(&result.lane[e],
                scale * to_compute(x.lane[first + e]) - factor * along_row[first + e]);
        }
        store_once(out + j + first, result);
      }
      walk.advance(lines, elements);
    }
    return;
  }
  const int64_t lines = kThreads / shape.inner, elements = kThreads % shape.inner;
  Walk walk(shape, i);
  for (; i < piece.end; i += kThreads) {
    const A value = g == nullptr ? A(0) : to_compute(g[i]);
    store(out + i, scale * value - coefficient * layer.u[walk.row()] * v[walk.column()]);
    walk.advance(lines, elements);
  }
}

template <class T>
__device__ __forceinline__ void update_elements(const BackwardLayer<T>& layer, const Piece& piece) {
  if constexpr (sizeof(T) < 4) {
    if (layer.table.widen)
      return update_elements_of(static_cast<float*>(layer.grad_weight), layer, piece);
  }
  update_elements_of(static_cast<T*>(layer.grad_weight), layer, piece);
}

}  // namespace spectral_ext::cuda
