// A pass over rows that are read once: t_r = row_r · v, and s += t_r · row_r while the row is still
// in registers. The reason that an iteration costs one read of W and not two.
//
// A group of kGroup threads owns a row at a time; a thread holds kVectors 16-byte vectors of it and
// one running sum for each of their columns. v lies in shared memory. The sums of the groups are
// added at the end in a fixed order, and the CTA leaves one partial vector: the next phase adds
// those up.
//
// Alternatives: rows staged in shared memory by cp.async hide more latency, but v and two stages of
// the widest rows do not fit beside each other; two reads (t, then s) need no sums in registers,
// and are what wide_rows.cuh does beyond the width that fits here; float atomics instead of partial
// vectors would save the next phase and give other bits in every run.
#pragma once

#include "layer.cuh"

namespace spectral_ext::cuda {

/// ‖y‖ of the y that gives the dots of a piece their v: the latest.
template <class T>
__device__ __forceinline__ compute_t<T> divisor_of_y(const ForwardLayer<T>& layer,
                                                     const Piece& piece) {
  const int iteration = piece.iteration - (layer.table.v_first ? 0 : 1);
  return static_cast<compute_t<T>>(at_least(layer.norm_of_y(iteration), layer.table.eps));
}

/// Σ u² of the rows of a piece, and Σ v², for evaluation.
template <class T>
__device__ __forceinline__ void measure_vectors(const ForwardLayer<T>& layer, const Piece& piece) {
  double total = 0;
  for (int64_t i = piece.begin + thread_index(); i < piece.end; i += kThreads) {
    const double value = layer.u_at(i);
    total += value * value;
  }
  total = block_sum(total);
  if (thread_index() == 0) layer.block_sums(1)[piece.index] = total;
  if (piece.index != 0) return;
  total = 0;
  for (int64_t i = thread_index(); i < layer.table.shape.outer * layer.table.shape.inner;
       i += kThreads) {
    const double value = layer.v_at(i);
    total += value * value;
  }
  total = block_sum(total);
  if (thread_index() == 0) *layer.square_of_v() = total;
}

/// Fills shared memory with v in storage order, padded with zeros to whole vectors.
template <class T>
__device__ __forceinline__ void load_v(const ForwardLayer<T>& layer, const Piece& piece) {
  using A = compute_t<T>;
  A* const v =
      reinterpret_cast<A*>(static_cast<char*>(shared_memory()) + kReductionBytes + kStageBytes);
  const int columns = static_cast<int>(layer.table.shape.outer * layer.table.shape.inner);
  const int padded = (columns + Vector<T>::kLanes - 1) / Vector<T>::kLanes * Vector<T>::kLanes;
  const bool initial = piece.initial;
  const A divisor = initial ? A(1) : divisor_of_y(layer, piece);
  for (int c = thread_index(); c < padded; c += kThreads) {
    if (c >= columns) {
      v[c] = 0;
    } else if (initial) {
      v[c] = layer.v_at(place_in_v(layer.table.shape.column_order, c));
    } else {
      v[c] = layer.y()[c] / divisor;
    }
  }
  __syncthreads();
}

/// Sums x over a group; every thread of it gets the sum. All threads of the CTA must call it. Two
/// areas of shared memory take turns, so that one barrier is enough.
template <int kGroup, class A>
__device__ __forceinline__ A group_sum(A x, int& turn) {
  x = warp_sum(x);
  if constexpr (kGroup > 32) {
    A* of_warp = static_cast<A*>(shared_memory()) + turn * kWarps;
    turn ^= 1;
    if (thread_index() % 32 == 0) of_warp[thread_index() / 32] = x;
    __syncthreads();
    constexpr int kGroupWarps = kGroup / 32;
    const A* mine = of_warp + thread_index() / kGroup * kGroupWarps;
    x = 0;
#pragma unroll
    for (int i = 0; i < kGroupWarps; ++i) x += mine[i];
  }
  return x;
}

/// Brings the groups' sums to one scale, adds them up and writes the block's partial vector.
template <class T, int kGroup, int kVectors>
__device__ __forceinline__ void write_partial(const ForwardLayer<T>& layer, int block,
                                              compute_t<T> (&sums)[kVectors * Vector<T>::kLanes],
                                              compute_t<T> scale, compute_t<T>* shared) {
  using A = compute_t<T>;
  constexpr int kLanes = Vector<T>::kLanes, kGroups = kThreads / kGroup;
  const int group = thread_index() / kGroup, lane = thread_index() % kGroup;
  const int columns = static_cast<int>(layer.table.shape.outer * layer.table.shape.inner);
  A* const partial = layer.partial() + static_cast<int64_t>(block) * columns;

  A common = scale;
  __syncthreads();
  if (lane == 0) shared[group] = scale;
  __syncthreads();
#pragma unroll
  for (int g = 0; g < kGroups; ++g) common = shared[g] < common ? shared[g] : common;
  if (thread_index() == 0) layer.scale()[block] = common;
  const A ratio = common / scale;

#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    constexpr int kWidth = kGroup * kLanes;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kLanes; ++e) {
      shared[group * kWidth + lane * kLanes + e] = sums[k * kLanes + e] * ratio;
    }
    __syncthreads();
    for (int c = thread_index(); c < kWidth && k * kWidth + c < columns; c += kThreads) {
      A sum = 0;
      for (int g = 0; g < kGroups; ++g) sum += shared[g * kWidth + c];
      partial[k * kWidth + c] = sum;
    }
  }
}

/// Keeps the compiler from holding what it has computed from a vector.
template <class T>
__device__ __forceinline__ void forget_conversions(Vector<T>& vector) {
  uint4 bits;
  memcpy(&bits, &vector, 16);
  asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
  memcpy(&vector, &bits, 16);
}

/// Returns the thread's share of Σ t², or of Σ u t without an update. v is in shared memory.
template <class T, int kGroup, int kVectors>
__device__ __forceinline__ double read_rows(const ForwardLayer<T>& layer, const Piece& piece) {
  using A = compute_t<T>;
  constexpr int kLanes = Vector<T>::kLanes, kGroups = kThreads / kGroup;
  constexpr int kRows = kGroup > 32 ? 1 : kVectors == 1 ? 4 : kVectors == 3 ? 2 : 1;  // at once
  const int thread = thread_index(), group = thread / kGroup, lane = thread % kGroup;
  const Rows<T> rows(layer, piece.begin);
  const int columns = rows.columns;
  const int count = static_cast<int>(piece.end - piece.begin);  // far fewer than 2^31 in a piece
  const bool dots = piece.dots, with_sums = piece.sums;
  A* const v =
      reinterpret_cast<A*>(static_cast<char*>(shared_memory()) + kReductionBytes + kStageBytes);
  A sums[kVectors * kLanes] = {};
  A scale = largest_scale<A>();
  double total = 0;
  int turn = 0;
  for (int first = 0; first < count; first += kGroups * kRows) {
    Vector<T> x[kRows][kVectors];
    A t[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * kGroups + group;
      constexpr int kAhead = kGroups * kRows;
      if (row < count) {
        rows.template load<kGroup>(row, lane, row + kAhead < count ? kAhead : 0, x[i]);
      } else {
        for (Vector<T>& vector : x[i]) vector = {};
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * kGroups + group;
      t[i] = 0;
      if (dots) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
          const int column = (k * kGroup + lane) * kLanes;
          if (column >= columns) continue;
#pragma unroll
          for (int e = 0; e < kLanes; ++e) t[i] += to_compute(x[i][k].lane[e]) * v[column + e];
        }
        t[i] = group_sum<kGroup>(t[i], turn);
      } else if (row < count) {
        t[i] = layer.u_at(piece.begin + row);  // a pass without dots begins v_first
      }
      if (row < count && lane == 0) {
        layer.t()[piece.begin + row] = t[i];
        const double value = t[i];
        total += value *
                 (layer.table.update ? value : static_cast<double>(layer.u_at(piece.begin + row)));
      }
    }
    if (!with_sums) continue;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if constexpr (sizeof(T) < sizeof(A)) {
        // Converted once more below: held from the dots on, they would take twice the registers.
        for (Vector<T>& vector : x[i]) forget_conversions(vector);
      }
      if (is_too_large(t[i], scale)) {
        const A smaller = scale_for(t[i]), ratio = smaller * inverse_of(scale);
        scale = smaller;
#pragma unroll
        for (int c = 0; c < kVectors * kLanes; ++c) sums[c] *= ratio;
      }
      const A factor = t[i] * scale;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
#pragma unroll
        for (int e = 0; e < kLanes; ++e)
          sums[k * kLanes + e] += factor * to_compute(x[i][k].lane[e]);
      }
    }
  }
  if (with_sums) write_partial<T, kGroup, kVectors>(layer, piece.index, sums, scale, v);
  return total;
}

}  // namespace spectral_ext::cuda
