// Adds up the partial vectors of a chunk of columns and makes them y = Mᵀu, with their share of
// ‖y‖².
//
// The blocks are split over kShares teams of threads, whose sums are added in order: one team alone
// would wait for the memory once for each few of up to hundreds of blocks.
#pragma once

#include "layer.cuh"

namespace spectral_ext::cuda {

template <class T>
__device__ __forceinline__ void combine_columns(const ForwardLayer<T>& layer, const Piece& piece) {
  using A = compute_t<T>;
  constexpr int kShares = kThreads / kChunkColumns;
  const LayerTable& table = layer.table;
  const int iteration = piece.iteration;
  if (layer.is_over(iteration)) {
    if (thread_index() == 0) {
      layer.chunk_sums(iteration)[piece.index] = layer.chunk_sums(iteration - 1)[piece.index];
    }
    return;
  }
  if (piece.index == 0 && thread_index() == 0) *layer.iterations_made() = iteration + 1;
  const int64_t columns = table.shape.outer * table.shape.inner;
  // The first half-step of v_first takes u as it is, later ones that of the iteration before.
  const double d1 = piece.initial && table.v_first
                        ? 1
                        : at_least(layer.norm_of_t(iteration - table.v_first), table.eps);

  A common = largest_scale<A>();
  for (int b = 0; b < table.blocks; ++b)
    common = layer.scale()[b] < common ? layer.scale()[b] : common;

  const int share = thread_index() / kChunkColumns, place = thread_index() % kChunkColumns;
  const int64_t column = piece.begin + place;
  const int blocks_each = (table.blocks + kShares - 1) / kShares;
  const int first = share * blocks_each;
  const int end = first + blocks_each < table.blocks ? first + blocks_each : table.blocks;
  A sum = 0;
  if (column < piece.end) {
#pragma unroll 8
    for (int b = first; b < end; ++b) {
      sum += layer.partial()[b * columns + column] * (common * inverse_of(layer.scale()[b]));
    }
  }
  A* const sums = reinterpret_cast<A*>(static_cast<char*>(shared_memory()) + kReductionBytes);
  sums[thread_index()] = sum;
  __syncthreads();
  double squared = 0;
  if (share == 0 && column < piece.end) {
    for (int i = 1; i < kShares; ++i) sum += sums[i * kChunkColumns + place];
    sum /= static_cast<A>(d1 * static_cast<double>(common));
    layer.y()[column] = sum;
    squared = static_cast<double>(sum) * static_cast<double>(sum);
  }
  squared = block_sum(squared);
  if (thread_index() == 0) layer.chunk_sums(iteration)[piece.index] = squared;
}

}  // namespace spectral_ext::cuda
