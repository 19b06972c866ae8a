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
__device__ __forceinline__ void read_rows_as(const ForwardLayer<T>& layer, const Piece& piece) {
  read_rows<T, kRowGroup<T, kIndex>.threads, kRowGroup<T, kIndex>.vectors>(layer, piece);
}

template <class T>
__device__ __forceinline__ void run_piece(const ForwardArguments& arguments, const Piece& piece) {
  const ForwardLayer<T> layer(arguments, piece.layer);
  if (piece.kind == Kind::kColumns) return combine_columns(layer, piece);
  if (piece.kind == Kind::kScale) return scale_elements(layer, piece);
  if (piece.kind == Kind::kVectors) return write_vectors(layer, piece);
  static_assert(kRowGroups == 7);
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
      return read_wide_rows(layer, piece);
  }
}

template <class T>
__device__ __forceinline__ void run_piece(const BackwardArguments& arguments, const Piece& piece) {
  const BackwardLayer<T> layer(arguments, piece.layer);
  if (piece.kind == Kind::kOrder) return order_v(layer, piece);
  if (piece.kind == Kind::kDot) return dot_elements(layer, piece);
  return update_elements(layer, piece);
}

__device__ __forceinline__ void wait_for(const int32_t* finished, const Piece& piece) {
  if (threadIdx.x == 0) {
    while (load_acquire(finished) < piece.required) pause(piece);
  }
  __syncthreads();
}

template <class T, class Arguments>
__device__ __forceinline__ void run_ticket(const Arguments& arguments, int32_t ticket) {
  const Tables& tables = arguments.tables;
  int32_t* const finished = arguments.progress.finished;
  for (int32_t p = tables.tickets[ticket]; p < tables.tickets[ticket + 1]; ++p) {
    const Piece piece = tables.pieces[p];
    if (finished != nullptr) wait_for(finished + piece.layer, piece);
    run_piece<T>(arguments, piece);
    __syncthreads();  // all of the piece is written, and shared memory is free
    if (finished != nullptr && threadIdx.x == 0) add_release(finished + piece.layer, 1);
  }
}

template <class T, class Arguments>
__device__ __forceinline__ void run_tickets(const Arguments& arguments) {
  const Progress& progress = arguments.progress;
  if (progress.finished == nullptr) {
    for (int32_t i = progress.first + blockIdx.x; i < progress.end; i += gridDim.x) {
      run_ticket<T>(arguments, i);
    }
    return;
  }
  auto* const taken = static_cast<int32_t*>(shared_memory());
  for (;;) {
    if (threadIdx.x == 0) *taken = progress.first + take_next(progress.next);
    __syncthreads();
    const int32_t ticket = *taken;
    __syncthreads();
    if (ticket >= progress.end) return;
    run_ticket<T>(arguments, ticket);
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
