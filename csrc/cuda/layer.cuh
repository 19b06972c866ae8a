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
  void* output;  // elements of T or, for float, of a half type
  void *u, *v;   // elements of T, or of A
  A *u_saved, *v_saved, *sigma;
  A *residual, *iterations;  // null: not wanted
  char* workspace;

  __device__ __forceinline__ ForwardLayer(const ForwardArguments& arguments, int index)
      : table(arguments.tables.layers[index]) {
    const ForwardPointers& pointers = arguments.layers[index];
    workspace = global(arguments.workspace);
    weight = global(static_cast<const T*>(pointers.weight));
    output = global(pointers.output);
    u = global(pointers.u);
    v = global(pointers.v);
    u_saved = global(static_cast<A*>(arguments.saved)) + table.saved;
    v_saved = u_saved + table.shape.rows;
    sigma = global(static_cast<A*>(arguments.sigmas)) + table.sigma;
    residual = iterations = nullptr;
    if (arguments.residuals != nullptr) {
      residual = global(static_cast<A*>(arguments.residuals)) + table.sigma;
      iterations = global(static_cast<A*>(arguments.iterations)) + table.sigma;
    }
  }

  // Places in the workspace are looked up where they are used: pointers to all of them, held over a
  // loop, would cost the registers that the loop needs.
  template <class P>
  __device__ __forceinline__ P* in_workspace(int64_t place) const {
    return reinterpret_cast<P*>(workspace + place);
  }
  __device__ __forceinline__ A* t() const { return in_workspace<A>(table.t); }
  __device__ __forceinline__ A* y() const { return in_workspace<A>(table.y); }
  __device__ __forceinline__ A* partial() const { return in_workspace<A>(table.partial); }
  __device__ __forceinline__ A* scale() const { return in_workspace<A>(table.scale); }
  __device__ __forceinline__ int32_t* iterations_made() const {
    return in_workspace<int32_t>(table.iterations);
  }

  // The sums of squares of t by blocks and of y by chunks. Iterations take two slots in turn: while
  // the pieces of one write theirs, all of them look at the other's to see whether it met the
  // tolerance. In evaluation the first slot of the blocks has Σ u t, and the second slots have Σ u²
  // by blocks and Σ v².
  __device__ __forceinline__ double* block_sums(int iteration) const {
    return in_workspace<double>(table.block_sums) + (iteration & 1) * table.blocks;
  }
  __device__ __forceinline__ double* chunk_sums(int iteration) const {
    return in_workspace<double>(table.chunk_sums) + (iteration & 1) * table.chunks;
  }
  __device__ __forceinline__ double* square_of_v() const { return chunk_sums(1); }

  __device__ __forceinline__ A u_at(int64_t i) const { return element(u, i * table.u_stride); }
  __device__ __forceinline__ A v_at(int64_t i) const { return element(v, i * table.v_stride); }
  __device__ __forceinline__ A element(const void* vector, int64_t place) const {
    if constexpr (sizeof(T) < sizeof(A)) {
      if (!table.wide_vectors) return to_compute(static_cast<const T*>(vector)[place]);
    }
    return static_cast<const A*>(vector)[place];
  }
  __device__ __forceinline__ void write_element(void* vector, int64_t place, A value) const {
    if (sizeof(T) == sizeof(A) || table.wide_vectors) {
      static_cast<A*>(vector)[place] = value;
    } else {
      store(static_cast<T*>(vector) + place, value);
    }
  }

  // All threads of the CTA must call what follows, and get the same.
  __device__ __forceinline__ double square_of_t(int iteration) const {
    return total_of(block_sums(iteration), table.blocks);
  }
  __device__ __forceinline__ double square_of_y(int iteration) const {
    return total_of(chunk_sums(iteration), table.chunks);
  }
  __device__ __forceinline__ double norm_of_t(int iteration) const {
    return sqrt(square_of_t(iteration));
  }
  __device__ __forceinline__ double norm_of_y(int iteration) const {
    return sqrt(square_of_y(iteration));
  }

  /// The squares of the norms, before eps, of the first and the second vector of an iteration.
  struct Squares {
    double before, after;
  };
  __device__ __forceinline__ Squares squares(int iteration) const {
    const double t = square_of_t(iteration), y = square_of_y(iteration);
    return table.v_first ? Squares{y, t} : Squares{t, y};
  }

  /// Whether an iteration is not made because one before it met the tolerance. See reference.py.
  __device__ __forceinline__ bool is_over(int iteration) const {
    if (table.tol == 0 || iteration == 0) return false;
    const Squares of = squares(iteration - 1);
    return of.after - of.before <= table.tol * table.tol * of.after;
  }

  __device__ __forceinline__ int last_iteration() const { return table.n_power_iterations - 1; }

  /// Whether a vector whose square this is, is neither zero nor has it NaN or infinity.
  static __device__ __forceinline__ bool is_usable(double square) {
    return square > 0 && square < __builtin_inf();
  }

  /// In evaluation: ‖u‖·‖v‖, 1 where only rounding keeps it from that, NaN where one is of no use.
  __device__ __forceinline__ double norm_of_vectors() const {
    const double square = square_of_t(1) * *square_of_v();
    if (!is_usable(square)) return __builtin_nan("");
    const bool off = fabs(square - 1) > table.slack;
    return off ? sqrt(square) : 1;
  }

  /// uᵀMv: without an update the dots have summed it up; after one it is the last norm, which
  /// stock divides by max(n, eps) and multiplies by n again.
  __device__ __forceinline__ A find_sigma() const {
    if (!table.update) return static_cast<A>(square_of_t(0) / norm_of_vectors());
    const int last = last_iteration();
    const double n = table.v_first ? norm_of_t(last) : norm_of_y(last);
    return static_cast<A>(n * (n / at_least(n, table.eps)));
  }
};

/// The lines of a row in memory: outer × rows × inner, in storage order. Column c lies in line
/// c / inner, and each line begins `gap` elements later than in a contiguous row. The quotient is a
/// product with a reciprocal that is rounded up, exact for c · inner < 2^30.
struct Lines {
  int64_t gap;
  uint32_t reciprocal;

  __device__ __forceinline__ explicit Lines(const Shape& shape)
      : gap((shape.rows - 1) * shape.inner),
        reciprocal(((1u << 30) - 1) / static_cast<uint32_t>(shape.inner) + 1) {}

  __device__ __forceinline__ int64_t place(int column) const {
    return column + static_cast<int64_t>(static_cast<uint64_t>(column) * reciprocal >> 30) * gap;
  }
};

/// The rows of a piece, of at most max_columns.
template <class T>
struct Rows {
  const Shape& shape;
  const T* first;
  int inner, columns;
  bool contiguous;  // outer = 1: a row is one run of memory
  bool vectors;     // every vector of a row is one aligned run of memory

  __device__ __forceinline__ Rows(const ForwardLayer<T>& layer, int64_t begin)
      : shape(layer.table.shape),
        first(layer.weight + begin * shape.inner),
        inner(static_cast<int>(shape.inner)),
        columns(static_cast<int>(shape.outer * shape.inner)),
        contiguous(shape.outer == 1),
        vectors(shape.inner % Vector<T>::kLanes == 0 && is_aligned(layer.weight)) {}

  /// A thread's vectors of a row; zeros beyond its end. Also prefetches the row `ahead` of it. All
  /// threads of a warp must call it for the same row.
  template <int kGroup, int kVectors>
  __device__ __forceinline__ void load(int row, int lane, int ahead,
                                       Vector<T> (&x)[kVectors]) const {
    constexpr int kLanes = Vector<T>::kLanes, kStep = kGroup * kLanes;
    const T* const begin = first + static_cast<int64_t>(row) * inner;
    if (vectors && contiguous) {
      const T *const mine = begin + lane * kLanes, *const next = mine + ahead * inner;
      const int left = columns - lane * kLanes;
      const bool prefetches = ahead > 0 && lane % 8 == 0;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        x[k] = k * kStep < left ? load_vector(mine + k * kStep) : Vector<T>{};
        if (prefetches && k * kStep < left) prefetch(next + k * kStep);
      }
      return;
    }
    // Places do not depend on the row: computed once for all rows they would fill the registers.
    asm volatile("" : "+r"(lane));
    const Lines lines(shape);
    if (vectors) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int column = k * kStep + lane * kLanes;
        x[k] = column < columns ? load_vector(begin + lines.place(column)) : Vector<T>{};
      }
      return;
    }
    // A warp reads its part in order, element by element, and shared memory gives it out.
    const int warp_lane = lane % 32;
    T* const stage = reinterpret_cast<T*>(static_cast<char*>(shared_memory()) + kReductionBytes) +
                     thread_index() / 32 * (32 * kLanes);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int start = k * kStep + (lane - warp_lane) * kLanes;
      __syncwarp();
#pragma unroll 4
      for (int e = warp_lane; e < 32 * kLanes; e += 32) {
        stage[e] = start + e < columns ? begin[lines.place(start + e)] : T{};
      }
      __syncwarp();
      x[k] = load_vector(stage + warp_lane * kLanes);
    }
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

/// 2^exponent, for exponents of normal numbers.
__device__ __forceinline__ float power_of_two(int exponent, float) {
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return power;
}
__device__ __forceinline__ double power_of_two(int exponent, double) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double power;
  memcpy(&power, &bits, 8);
  return power;
}
__device__ __forceinline__ int exponent_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return static_cast<int>(bits >> 23 & 0xff) - 127;
}
__device__ __forceinline__ int exponent_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return static_cast<int>(bits >> 52 & 0x7ff) - 1023;
}

/// The power of two that brings t near 1. No division and no library function: in the loop over
/// rows a call would cost registers even where it is not made.
template <class A>
__device__ __forceinline__ A scale_for(A t) {
  const int exponent = exponent_of(t);
  return power_of_two(exponent > 100 ? -100 : exponent < -100 ? 100 : -exponent, A());
}
template <class A>
__device__ __forceinline__ A inverse_of(A power) {
  return power_of_two(-exponent_of(power), A());
}

}  // namespace spectral_ext::cuda
