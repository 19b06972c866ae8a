// A layer as the device functions of the forward see it: typed pointers, and the numbers that
// follow from what earlier phases have left in the workspace.
#pragma once

#include "device.cuh"

namespace spectral_ext::cuda {

template <class T>
struct ForwardLayer {
  using A = compute_t<T>;

  const LayerTable& table;
  const T* weight;
  T *output, *u, *v;
  A *u_saved, *v_saved, *sigma;
  A *t, *y, *partial, *scale;
  double *block_sums, *chunk_sums;

  __device__ __forceinline__ ForwardLayer(const ForwardArguments& arguments, int index)
      : table(arguments.tables.layers[index]) {
    const ForwardPointers& pointers = arguments.layers[index];
    char* const workspace = global(arguments.workspace);
    weight = global(static_cast<const T*>(pointers.weight));
    output = global(static_cast<T*>(pointers.output));
    u = global(static_cast<T*>(pointers.u));
    v = global(static_cast<T*>(pointers.v));
    u_saved = global(static_cast<A*>(arguments.saved)) + table.saved;
    v_saved = u_saved + table.shape.rows;
    sigma = global(static_cast<A*>(arguments.sigmas)) + table.sigma;
    t = reinterpret_cast<A*>(workspace + table.t);
    y = reinterpret_cast<A*>(workspace + table.y);
    partial = reinterpret_cast<A*>(workspace + table.partial);
    scale = reinterpret_cast<A*>(workspace + table.scale);
    block_sums = reinterpret_cast<double*>(workspace + table.block_sums);
    chunk_sums = reinterpret_cast<double*>(workspace + table.chunk_sums);
  }

  __device__ __forceinline__ A u_at(int64_t i) const { return to_compute(u[i * table.u_stride]); }
  __device__ __forceinline__ A v_at(int64_t i) const { return to_compute(v[i * table.v_stride]); }

  // All threads of the CTA must call these, and get the same.
  __device__ __forceinline__ double norm_of_t() const {
    return sqrt(total_of(block_sums, table.blocks));
  }
  __device__ __forceinline__ double norm_of_y() const {
    return sqrt(total_of(chunk_sums, table.chunks));
  }

  /// uᵀMv: without an update the dots have summed it up; after one it is the last norm, which
  /// stock divides by max(n, eps) and multiplies by n again.
  __device__ __forceinline__ A find_sigma() const {
    if (!table.update) return static_cast<A>(total_of(block_sums, table.blocks));
    const double n = table.v_first ? norm_of_t() : norm_of_y();
    return static_cast<A>(n * (n / at_least(n, table.eps)));
  }
};

/// How to find the elements of rows: outer × rows × inner, in storage order.
template <class T>
struct Rows {
  const T* weight;
  int64_t rows, inner, columns;
  bool contiguous;  // outer = 1: a row is one run of memory
  bool vectors;     // every vector of a row is one aligned run of memory

  __device__ __forceinline__ explicit Rows(const ForwardLayer<T>& layer)
      : weight(layer.weight),
        rows(layer.table.shape.rows),
        inner(layer.table.shape.inner),
        columns(layer.table.shape.outer * layer.table.shape.inner),
        contiguous(layer.table.shape.outer == 1),
        vectors(inner % Vector<T>::kLanes == 0 && is_aligned(layer.weight)) {}

  __device__ __forceinline__ int64_t place(int64_t row, int64_t column) const {
    if (contiguous) return row * inner + column;
    if (columns <= INT32_MAX) {  // so is inner; 32-bit division is several times faster
      const auto c = static_cast<uint32_t>(column), n = static_cast<uint32_t>(inner);
      return (static_cast<int64_t>(c / n) * rows + row) * inner + c % n;
    }
    return (column / inner * rows + row) * inner + column % inner;
  }

  /// The vector that begins at a column; zeros beyond the row.
  __device__ __forceinline__ Vector<T> load(int64_t row, int64_t column) const {
    if (vectors) return load_vector(weight + place(row, column));
    Vector<T> x = {};
#pragma unroll
    for (int e = 0; e < Vector<T>::kLanes; ++e) {
      if (column + e < columns) x.lane[e] = weight[place(row, column + e)];
    }
    return x;
  }
};

// Products t·w are summed up times a power of two that brings the largest |t| near 1, so that they
// neither overflow nor underflow whatever the size of the weights. It begins so large that the
// first t that matters lowers it, and is lowered again where a much larger t follows.
template <class A>
__device__ __forceinline__ A largest_scale() {
  return static_cast<A>(0x1p100);
}

template <class A>
__device__ __forceinline__ bool is_too_large(A t, A scale) {
  return fabs(t) * scale > static_cast<A>(0x1p20);
}

template <class A>
__device__ __forceinline__ A scale_for(A t) {
  int exponent = ilogb(fabs(t));
  exponent = exponent > 100 ? 100 : exponent < -100 ? -100 : exponent;
  return ldexp(static_cast<A>(1), -exponent);
}

}  // namespace spectral_ext::cuda
