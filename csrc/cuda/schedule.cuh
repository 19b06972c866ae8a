// The kernels: CTAs take tickets in order and do their pieces.
//
// With counters one launch does everything. A CTA takes the next ticket by an atomic addition, and
// a piece waits until its layer's earlier pieces are finished. Those have lower tickets, so they
// are done or running on a CTA that waits, if at all, for still lower ones: no deadlock however few
// CTAs run at a time, and no cooperative launch. A piece signals its end by a release that every
// thread of a waiting CTA observes through the acquire of one of them and the barrier behind it.
//
// Without counters a launch is one phase, and the end of a launch is the only signal. Both do the
// same pieces by the same functions and so give the same bits; the phases cost a launch and an idle
// tail each.
//
// Alternatives: a cooperative launch with grid barriers needs all CTAs resident and waits for the
// slowest in each phase; a persistent kernel with work stealing finishes in another order, which is
// fine for bits but not for waiting without deadlock.
#pragma once

#include "backward.cuh"
#include "columns.cuh"
#include "rows.cuh"
#include "scale.cuh"
#include "wide_rows.cuh"

namespace spectral_ext::cuda {

template <class T, int kIndex>
constexpr RowGroup kRowGroup = row_group(sizeof(T), kIndex);

template <class T, int kIndex>
__device__ __forceinline__ double read_rows_as(const ForwardLayer<T>& layer, const Piece& piece) {
  return read_rows<T, kRowGroup<T, kIndex>.threads, kRowGroup<T, kIndex>.vectors>(layer, piece);
}

template <class T>
__device__ __forceinline__ double read_rows(const ForwardLayer<T>& layer, const Piece& piece) {
  static_assert(kRowGroups == 8);
  switch (layer.table.row_group) {
    case 0:
      return read_rows_as<T, 0>(layer, piece);
    case 1:
      return read_rows_as<T, 1>(layer, piece);
    case 2:
      return read_rows_as<T, 2>(layer, piece);
    case 3:
      return read_rows_as<T, 3>(layer, piece);
    case 4:
      return read_rows_as<T, 4>(layer, piece);
    case 5:
      return read_rows_as<T, 5>(layer, piece);
    case 6:
      return read_rows_as<T, 6>(layer, piece);
    default:
      return read_rows_as<T, 7>(layer, piece);
  }
}

template <class T>
__device__ __forceinline__ void run_rows(const ForwardLayer<T>& layer, const Piece& piece) {
  const int iteration = piece.iteration;
  if (layer.is_over(iteration)) {
    if (thread_index() == 0) {
      layer.block_sums(iteration)[piece.index] = layer.block_sums(iteration - 1)[piece.index];
    }
    return;
  }
  if (!layer.table.update) measure_vectors(layer, piece);
  if (layer.table.row_group == kWide) return read_wide_rows(layer, piece);
  if (piece.dots) load_v(layer, piece);
  const double total = block_sum(read_rows(layer, piece));
  if (thread_index() == 0) layer.block_sums(piece.iteration)[piece.index] = total;
}

template <class T>
__device__ __forceinline__ void run_piece(const ForwardArguments& arguments, const Piece& piece) {
  const ForwardLayer<T> layer(arguments, piece.layer);
  if (piece.kind == Kind::kRows) return run_rows(layer, piece);
  if (piece.kind == Kind::kColumns) return combine_columns(layer, piece);
  if (piece.kind == Kind::kScale) return scale_elements(layer, piece);
  write_vectors(layer, piece);
}

template <class T>
__device__ __forceinline__ void run_piece(const BackwardArguments& arguments, const Piece& piece) {
  const BackwardLayer<T> layer(arguments, piece.layer);
  if (piece.kind == Kind::kOrder) return order_v(layer, piece);
  if (piece.kind == Kind::kDot) return dot_elements(layer, piece);
  return update_elements(layer, piece);
}

/// Where a CTA is in the tables. Lies in shared memory: a register that lives through all pieces
/// would be one fewer for the loops in them.
struct Position {
  int32_t ticket, piece, end;  // one beyond the ticket's last piece
};

__device__ __forceinline__ Position& position() {
  return *reinterpret_cast<Position*>(static_cast<char*>(shared_memory()) + kReductionBytes - 16);
}

__device__ __forceinline__ void wait_for(const int32_t* finished, const Piece& piece) {
  while (load_acquire(finished) < piece.required) pause(piece);
}

/// Goes on to the next piece of the ticket or to the next ticket, and waits for what it needs.
__device__ __forceinline__ void advance(const Tables& tables, const Progress& progress,
                                        Position& at) {
  if (++at.piece >= at.end) {
    at.ticket = progress.finished != nullptr ? progress.first + take_next(progress.next)
                                             : at.ticket + static_cast<int32_t>(gridDim.x);
    if (at.ticket >= progress.end) return;
    at.piece = tables.tickets[at.ticket];
    at.end = tables.tickets[at.ticket + 1];
  }
  const Piece& piece = tables.pieces[at.piece];
  if (progress.finished != nullptr) wait_for(progress.finished + piece.layer, piece);
}

template <class T, class Arguments>
__device__ __forceinline__ void run_tickets(const Arguments& arguments) {
  const Tables& tables = arguments.tables;
  const Progress& progress = arguments.progress;
  Position& at = position();
  if (thread_index() == 0) {
    at = {progress.first + static_cast<int32_t>(blockIdx.x) - static_cast<int32_t>(gridDim.x), 0,
          0};
  }
  for (;;) {
    if (thread_index() == 0) advance(tables, progress, at);
    __syncthreads();
    if (at.ticket >= progress.end) return;
    const Piece& piece = tables.pieces[at.piece];
    run_piece<T>(arguments, piece);
    __syncthreads();  // all of the piece is written, and shared memory is free
    if (progress.finished != nullptr && thread_index() == 0) {
      add_release(progress.finished + piece.layer, 1);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  run_tickets<T>(arguments);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardArguments arguments) {
  run_tickets<T>(arguments);
}

}  // namespace spectral_ext::cuda
