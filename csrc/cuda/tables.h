// What a launch is told: plain structs that the host fills and the device reads.
//
// A launch works on up to kMaxLayers layers of one element type. Its work is cut into pieces, each
// a part of one stage of one layer. Pieces are grouped into tickets of about equal work, and
// tickets stand in phases: whatever a piece needs was made by pieces of earlier phases.
//
// All that is static is in tables on the device, written once (plan.h). What changes from call to
// call, the pointers, is passed by value, so that a call copies nothing to the device and can be
// captured in a CUDA graph.
#pragma once

#include <cstdint>

#include "../layer.h"

namespace spectral_ext::cuda {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxLayers =
    120;  // pointers of so many fit the 4 KB of arguments that every CUDA has
constexpr int kChunkColumns = 128;

/// How a row is spread over threads: each of `threads` holds `vectors` vectors of 16 bytes.
struct RowGroup {
  int threads, vectors;

  constexpr int columns(int64_t element_size) const {
    return threads * vectors * static_cast<int>(16 / element_size);
  }
};

constexpr int kRowGroups = 8;

/// The groups for rows of growing width. A thread keeps a sum for each column, so that more vectors
/// than these would not fit its 128 registers; half types have a 32-bit sum for 16 bits.
constexpr RowGroup row_group(int64_t element_size, int index) {
  constexpr RowGroup full[kRowGroups] = {{32, 1},  {32, 3},  {32, 5},  {64, 5},
                                         {128, 5}, {256, 5}, {512, 5}, {512, 7}};
  constexpr RowGroup half[kRowGroups] = {{32, 1},  {32, 3},  {32, 5},  {64, 5},
                                         {128, 5}, {256, 5}, {512, 3}, {512, 4}};
  return element_size == 2 ? half[index] : full[index];
}

/// The shared memory of a CTA: sums over it and its place in the tables, then a vector for each
/// thread, then v. The backward needs only the first. All devices have so much.
constexpr int kReductionBytes = 2 * kWarps * 8 + 16;
constexpr int kStageBytes = kThreads * 16;
constexpr int kSharedBytes = 64 << 10;

/// Wider rows than these are read in tiles, twice per iteration: v fits in shared memory no more.
constexpr int64_t max_columns(int64_t element_size) { return element_size == 8 ? 7104 : 14208; }

static_assert(kReductionBytes + kStageBytes + 4 * max_columns(4) <= kSharedBytes);
static_assert(kReductionBytes + kStageBytes + 8 * max_columns(8) <= kSharedBytes);

constexpr int kWide = -1;  // instead of the index of a row group

enum class Kind : uint8_t {
  kRows,     // forward: t = M v and partial sums Mᵀ t of rows
  kColumns,  // forward: adds up the partial sums of columns
  kVectors,  // forward: u and v, σ, in the order u, v
  kScale,    // forward: Y = W / σ of elements
  kOrder,    // backward: v in storage order
  kDot,      // backward: ⟨G, Y⟩ of elements
  kUpdate,   // backward: gW of elements
};

struct Piece {
  int64_t begin, end;  // rows, columns, or elements in storage order
  int32_t layer;       // its place in the launch
  int32_t required;   // the pieces of this layer that must be finished first: all of earlier phases
  int32_t index;      // among the layer's pieces of this kind in a phase
  int32_t iteration;  // kRows, kColumns: that its product belongs to, from 0
  Kind kind;
  bool dots, sums;  // kRows: which of t and Mᵀ t are asked for; the other kinds: false
  bool initial;     // nothing of this call was computed before: u and v come from their buffers
};

/// What stays the same from call to call. Places in the workspace are in bytes.
struct LayerTable {
  Shape shape;
  int64_t u_stride, v_stride;
  double eps;
  double tol;                      // 0: all iterations are made
  double target;                   // c of W · c / σ
  double slack;                    // see slack_of_vectors
  int64_t saved;                   // where u begins in the saved vectors; v follows
  int64_t t, y, partial, scale;    // in the compute type
  int64_t block_sums, chunk_sums;  // float64, two slots of each; the backward has block_sums alone
  int64_t iterations;              // how many were made, as int32_t
  int32_t sigma;                   // its place in sigmas, residuals and iterations
  int32_t blocks, chunks;
  int32_t row_group;
  int32_t n_power_iterations;
  DType output_dtype;  // of the forward: that of the weight, or a half type for float32
  bool update, v_first;
  bool wide_vectors;  // u and v have the compute type
  bool soft;          // a weight whose σ is at most the target is left alone
  bool detach_sigma;  // of the backward
  bool widen;         // of the backward: half outputs have a float32 gradient
};

struct Tables {
  const LayerTable* layers;
  const Piece* pieces;
  const int32_t* tickets;  // the first piece of each; one more at the end
};

/// The tickets of a launch, and how far it has come. Without counters all that the tickets need is
/// there.
struct Progress {
  int32_t first, end;
  int32_t* next;      // how many tickets were taken, for a launch with counters
  int32_t* finished;  // for each layer how many pieces are finished; null without counters
};

struct ForwardPointers {
  const void* weight;
  void *output, *u, *v;
};

struct ForwardArguments {
  Tables tables;
  Progress progress;
  char* workspace;
  void *saved, *sigmas;
  void *residuals, *iterations;  // null: not wanted
  ForwardPointers layers[kMaxLayers];
};

struct BackwardPointers {
  const void *grad_output, *output;  // a null grad_output is zero
  void* grad_weight;
};

struct BackwardArguments {
  Tables tables;
  Progress progress;
  char* workspace;
  const void *saved, *sigmas;
  const void* grad_sigmas;  // null: zeros
  BackwardPointers layers[kMaxLayers];
};

static_assert(sizeof(ForwardArguments) <= 4096 && sizeof(BackwardArguments) <= 4096);

}  // namespace spectral_ext::cuda
