// Power iteration and normalization of many layers.
//
// One read of W per iteration: row by row, while the row is in cache, t_r = row·v and s += t_r·row.
// With t = Mv, s = Mᵀt, d1 = max(‖t‖, eps) this gives u = t/d1, y = s/d1 = Mᵀu, n = ‖y‖,
// d2 = max(n, eps), v = y/d2 and σ = uᵀMv = n·n/d2: exactly stock's numbers, eps included, from one
// pass where stock makes three. v_first starts with column sums weighted by u and ends with row
// dots; its passes between are the same. In evaluation one pass gives σ = Σ u_r t_r.
//
// A σ that is zero or not finite is an exception, seen once σ is known: reference.py says what
// becomes of u and v. One item looks at them and, where σ is zero, at the weight; nothing else
// does.
//
// s is summed over at most kSumRows rows in the compute type before such sums are added up:
// rounding errors of numbers of one sign grow with the length of a sum.
//
// With a tolerance the passes after the one that met it do nothing. An iteration is judged by its
// two norms, ‖Mv‖ and ‖Mᵀu‖ (reference.py). Their squares lie in two slots, which iterations take
// in turn: while some items of an iteration write one, all look at the other, and what is skipped
// hands the older on.
//
// Stages of a layer: for each pass, blocks of rows (then, if columns were summed, chunks of columns
// that add the blocks up in order); at last, slices of the storage that are divided by σ.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu.h"
#include "kernels.h"
#include "workspace.h"

namespace spectral_ext::cpu {
namespace {

constexpr int64_t kChunkColumns = 4096;
constexpr int64_t kMinRows = 32, kMaxRows = 256, kSumRows = 64;
constexpr int64_t kPackBytes = 128 << 10;

struct Pass {
  bool dots;  // t = M v
  bool sums;  // s = Mᵀ t
};

/// How a layer is cut into items; depends on its shape and settings alone.
///
/// Every pass is a stage of blocks and, if columns were summed, a stage of chunks; only the last
/// pass may be without sums. The slices are the last stage.
struct Cut {
  bool update, v_first;
  int64_t passes;
  int64_t rows_per_block, blocks, chunks, slice, slices;
  int64_t rows_per_pack;
  bool whole;

  /// The iteration that makes ‖t‖ in pass p (−1: none does), and that makes ‖y‖ after it.
  int64_t iteration_of_rows(int64_t p) const { return p - (update && v_first ? 1 : 0); }
  int64_t iteration_of_columns(int64_t p) const { return p; }

  Cut(const Layer& layer, bool is_update)
      : update(is_update),
        v_first(layer.v_first),
        passes(!update ? 1 : int64_t{layer.n_power_iterations} + (v_first ? 1 : 0)) {
    const Shape& shape = layer.shape;
    const int64_t columns = shape.columns();
    const int64_t row_bytes = columns * element_size(layer.dtype);
    const int64_t bytes = shape.rows * row_bytes;
    whole = bytes <= kWholeBytes;
    // Wide rows: enough of them to pay for a partial sum. Tall layers: few enough for its
    // precision.
    const int64_t rows = std::max(ceil_div(kItemBytes, row_bytes),
                                  std::min(kMinRows, ceil_div(4 * kItemBytes, row_bytes)));
    rows_per_block = std::min({shape.rows, kMaxRows, ceil_div(rows, 4) * 4});
    blocks = ceil_div(shape.rows, rows_per_block);
    chunks = whole ? 1 : ceil_div(columns, kChunkColumns);
    slice = whole ? shape.numel() : kItemBytes / element_size(layer.dtype);
    slices = ceil_div(shape.numel(), slice);
    rows_per_pack =
        std::min(rows_per_block, std::max<int64_t>(4, kPackBytes / (columns * 8) / 4 * 4));
  }

  Pass pass(int64_t p) const {
    if (!update) return {true, false};
    return {!(v_first && p == 0), !(v_first && p == passes - 1)};
  }

  int64_t stages() const { return 2 * passes + (pass(passes - 1).sums ? 1 : 0); }

  int64_t stage_size(int64_t stage) const {
    if (stage == stages() - 1) return slices;
    return stage % 2 == 0 ? blocks : chunks;
  }
};

/// The intermediate results of one layer.
template <class A>
struct Workspace {
  A *t, *y, *partial, *scale;
  double *block_sum, *chunk_sum;  // two slots of each; in evaluation the second is for Σu² and Σv²
  int64_t* iterations;            // that were made

  Workspace(const Layer& layer, const Cut& cut, Arena& arena) {
    const int64_t columns = layer.shape.columns();
    t = arena.take<A>(layer.shape.rows);
    y = arena.take<A>(columns);
    partial = arena.take<A>(cut.pass(0).sums ? cut.blocks * columns : 0);
    scale = arena.take<A>(cut.blocks);
    block_sum = arena.take<double>(2 * cut.blocks);
    chunk_sum = arena.take<double>(2 * cut.chunks);
    iterations = arena.take<int64_t>(1);
  }
};

double sum(const double* values, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}

/// Everything that is done to one layer of element type T.
template <class T>
class Forward {
  using A = compute_t<T>;

 public:
  Forward(const Layer& layer, const Cut& cut, bool update, bool streaming, Arena workspace,
          char* scratch)
      : layer_(layer),
        cut_(cut),
        update_(update),
        streaming_(streaming && !cut.whole),
        work_(layer, cut, workspace),
        v_scratch_(reinterpret_cast<A*>(scratch)),
        s_scratch_(v_scratch_ + layer.shape.columns()),
        packed_(s_scratch_ + layer.shape.columns()) {}

  /// What a thread needs to run items of a layer, in bytes.
  static int64_t scratch_bytes(const Layer& layer, const Cut& cut) {
    return layer.shape.columns() * (2 + cut.rows_per_pack) * static_cast<int64_t>(sizeof(A));
  }

  void run(const Item& item) {
    if (item.stage >= 0) return run_stage(item.stage, item.index);
    const int64_t stages = cut_.stages();
    for (int64_t stage = 0; stage < stages; ++stage) {
      const int64_t size = cut_.stage_size(stage);
      for (int64_t i = 0; i < size; ++i) run_stage(stage, i);
    }
  }

 private:
  void run_stage(int64_t stage, int64_t index) {
    if (stage == cut_.stages() - 1) return divide_slice(index);
    if (stage % 2 == 0) return read_block(stage / 2, index);
    combine_chunk(stage / 2, index);
  }

  /// One pass over a block of rows.
  void read_block(int64_t p, int64_t block) {
    const Pass pass = cut_.pass(p);
    const int64_t iteration = cut_.iteration_of_rows(p);
    if (is_over(iteration)) return keep(blocks(iteration), blocks(iteration - 1), block);
    const int64_t columns = layer_.shape.columns();
    const int64_t begin = block * cut_.rows_per_block;
    const int64_t end = std::min(layer_.shape.rows, begin + cut_.rows_per_block);
    const A* v = pass.dots ? current_v(p) : nullptr;
    A* s = pass.sums ? work_.partial + block * columns : nullptr;
    if (!pass.dots) {
      for (int64_t r = begin; r < end; ++r) work_.t[r] = u_at(r);
    }
    if (s != nullptr) std::memset(s, 0, static_cast<size_t>(columns) * sizeof(A));

    A scale = pass.dots ? 0 : 1;
    for (int64_t r = begin; r < end; r += kSumRows) {
      const int64_t stop = std::min(end, r + kSumRows);
      if (s == nullptr || r == begin) {
        scale = read_rows(r, stop, v, s, scale);
      } else {
        std::memset(s_scratch_, 0, static_cast<size_t>(columns) * sizeof(A));
        scale = read_rows(r, stop, v, s_scratch_, scale);
        for (int64_t c = 0; c < columns; ++c) s[c] += s_scratch_[c];
      }
    }
    // A block of zeros takes the largest scale, since the smallest of all blocks is the common one.
    work_.scale[block] = scale == 0 ? std::ldexp(A(1), kMaxScaleExponent<A>) : scale;

    double total = 0;  // ‖t‖², or σ in evaluation
    for (int64_t r = begin; r < end; ++r) {
      const double t = work_.t[r];
      total += t * (update_ ? t : static_cast<double>(u_at(r)));
    }
    blocks(iteration)[block] = total;
    if (!update_) measure_vectors(block, begin, end);
  }

  /// One pass over rows [begin, end), whose sums are added to s. Returns their scale.
  A read_rows(int64_t begin, int64_t end, const A* v, A* s, A scale) const {
    const int64_t columns = layer_.shape.columns();
    const T* weight = static_cast<const T*>(layer_.weight);
    if (layer_.shape.outer == 1) {
      return kernels_.gram(weight + begin * columns, end - begin, columns, v, work_.t + begin, s,
                           scale);
    }
    for (int64_t r = begin; r < end; r += cut_.rows_per_pack) {
      const int64_t count = std::min(cut_.rows_per_pack, end - r);
      kernels_.pack(weight, layer_.shape, r, count, packed_);
      scale = kernels<A>().gram(packed_, count, columns, v, work_.t + r, s, scale);
    }
    return scale;
  }

  /// Σu² of a block of rows, and Σv².
  void measure_vectors(int64_t block, int64_t begin, int64_t end) {
    blocks(1)[block] = square_of(layer_.u, layer_.u_stride, begin, end);
    if (block > 0) return;
    std::fill_n(chunks(1), cut_.chunks, 0.0);
    chunks(1)[0] = square_of(layer_.v, layer_.v_stride, 0, layer_.shape.columns());
  }

  double square_of(const void* vector, int64_t stride, int64_t begin, int64_t end) const {
    if (std::is_same_v<T, A> && stride == 1) {
      const T* x = static_cast<const T*>(vector) + begin;
      const double square = kernels_.dot(x, x, end - begin);
      if (square > 1e-20 && square < 1e20) return square;  // else squares may have left the range
    }
    double total = 0;
    for (int64_t i = begin; i < end; ++i) {
      const double x = read_vector(vector, i * stride);
      total += x * x;
    }
    return total;
  }

  /// Adds the blocks' partial sums of some columns and makes them y = Mᵀu.
  void combine_chunk(int64_t p, int64_t chunk) {
    const int64_t iteration = cut_.iteration_of_columns(p);
    if (is_over(iteration)) return keep(chunks(iteration), chunks(iteration - 1), chunk);
    if (chunk == 0) *work_.iterations = iteration + 1;
    const int64_t columns = layer_.shape.columns();
    const int64_t begin = cut_.chunks == 1 ? 0 : chunk * kChunkColumns;
    const int64_t end = cut_.chunks == 1 ? columns : std::min(columns, begin + kChunkColumns);
    // s = Σ partial / scale: bring all blocks to the smallest scale, a power of two, which loses
    // nothing.
    const A common = *std::min_element(work_.scale, work_.scale + cut_.blocks);
    const double d1 =
        cut_.pass(p).dots ? std::max(norm_of_t(cut_.iteration_of_rows(p)), layer_.eps) : 1;
    chunks(iteration)[chunk] = kernels_.combine(
        work_.partial + begin, columns, cut_.blocks, work_.scale, common,
        static_cast<A>(d1 * static_cast<double>(common)), work_.y + begin, end - begin);
  }

  /// Divides a slice of the storage by σ / c; the first slice also writes σ and the vectors.
  void divide_slice(int64_t slice) {
    const double sigma = this->sigma();
    const A rounded = static_cast<A>(sigma);  // as the caller will see it
    if (slice == 0) {
      write_vectors(rounded);
      if (layer_.residual != nullptr) write_convergence();
    }
    const double by = is_left_alone(rounded, layer_.scale, layer_.soft) ? 1 : sigma / layer_.scale;
    // Not even written: the item of a zero σ reads the weight meanwhile.
    if (by == 1 && layer_.output == layer_.weight) return;
    const int64_t begin = slice * cut_.slice;
    const int64_t count = std::min(cut_.slice, layer_.shape.numel() - begin);
    kernels_.divide(static_cast<const T*>(layer_.weight) + begin,
                    static_cast<char*>(layer_.output) + begin * element_size(layer_.output_dtype),
                    layer_.output_dtype, count, by, streaming_);
    if (streaming_) kernels_.fence();
  }

  double* blocks(int64_t iteration) const {
    return work_.block_sum + slot(iteration) * cut_.blocks;
  }
  double* chunks(int64_t iteration) const {
    return work_.chunk_sum + slot(iteration) * cut_.chunks;
  }
  static int64_t slot(int64_t iteration) { return iteration & 1; }
  static void keep(double* to, const double* from, int64_t i) { to[i] = from[i]; }
  double square_of_t(int64_t iteration) const { return sum(blocks(iteration), cut_.blocks); }
  double square_of_y(int64_t iteration) const { return sum(chunks(iteration), cut_.chunks); }
  double norm_of_t(int64_t iteration) const { return std::sqrt(square_of_t(iteration)); }
  double norm_of_y(int64_t iteration) const { return std::sqrt(square_of_y(iteration)); }

  /// The squares of the first and the second norm that an iteration has found, before eps.
  std::pair<double, double> squares(int64_t iteration) const {
    const double t = square_of_t(iteration), y = square_of_y(iteration);
    return layer_.v_first ? std::pair(y, t) : std::pair(t, y);
  }

  /// Whether an earlier iteration met the tolerance.
  bool is_over(int64_t iteration) const {
    if (layer_.tol == 0 || iteration < 1 || !update_) return false;
    const auto [before, after] = squares(iteration - 1);
    return after - before <= layer_.tol * layer_.tol * after;
  }

  int64_t last_iteration() const { return layer_.n_power_iterations - 1; }

  /// ‖Mᵀu‖ or ‖Mv‖, whichever was found last: σ before eps.
  double last_norm() const {
    return layer_.v_first ? norm_of_t(last_iteration()) : norm_of_y(last_iteration());
  }

  double sigma() const {
    if (!update_) return square_of_t(0) / norm_of_vectors();
    const double n = last_norm();
    return n * (n / std::max(n, layer_.eps));
  }

  /// ‖u‖·‖v‖ in evaluation; 1 if only rounding keeps it from that, NaN if one is of no use.
  double norm_of_vectors() const {
    const double square = square_of_t(1) * square_of_y(1);
    if (!is_usable(square)) return std::numeric_limits<double>::quiet_NaN();
    const double slack = slack_of_vectors(layer_.dtype, layer_.wide_vectors);
    return std::fabs(square - 1) > slack ? std::sqrt(square) : 1;
  }

  /// Whether a vector whose square this is, is neither zero nor has it NaN or infinity.
  static bool is_usable(double square) { return square > 0 && std::isfinite(square); }

  void write_convergence() {
    double residual = std::numeric_limits<double>::quiet_NaN();
    double iterations = update_ ? layer_.n_power_iterations : 0;
    if (update_ && layer_.tol > 0) {
      const auto [before, after] = squares(last_iteration());
      residual = after <= before ? 0 : std::sqrt((after - before) / after);
      iterations = static_cast<double>(*work_.iterations);
    }
    *static_cast<A*>(layer_.residual) = static_cast<A>(residual);
    *static_cast<A*>(layer_.iterations) = static_cast<A>(iterations);
  }

  /// v for the dots of pass p, in storage order: the buffer at first, then what the pass before
  /// found.
  const A* current_v(int64_t p) {
    const int64_t columns = layer_.shape.columns();
    if (p == 0) {
      if (vectors_are_wide() && layer_.shape.column_order.count == 0 && layer_.v_stride == 1) {
        return static_cast<const A*>(layer_.v);
      }
      for_columns(layer_.shape, [&](int64_t c, int64_t place) { v_scratch_[c] = v_at(place); });
    } else {
      const int64_t iteration = cut_.iteration_of_columns(p - 1);
      const A divisor = static_cast<A>(std::max(norm_of_y(iteration), layer_.eps));
      for (int64_t c = 0; c < columns; ++c) v_scratch_[c] = work_.y[c] / divisor;
    }
    return v_scratch_;
  }

  void write_vectors(A sigma) {
    const Shape& shape = layer_.shape;
    A *u_saved = static_cast<A*>(layer_.u_saved), *v_saved = static_cast<A*>(layer_.v_saved);
    *static_cast<A*>(layer_.sigma) = sigma;
    if (update_ && (sigma == 0 || !std::isfinite(sigma))) return keep_or_restart(sigma);
    if (!update_) {
      for (int64_t r = 0; r < shape.rows; ++r) u_saved[r] = u_at(r);
      for (int64_t c = 0; c < shape.columns(); ++c) v_saved[c] = v_at(c);
      if (norm_of_vectors() == 1) return;
      const A u_norm = static_cast<A>(norm_of_t(1)), v_norm = static_cast<A>(norm_of_y(1));
      for (int64_t r = 0; r < shape.rows; ++r) u_saved[r] /= u_norm;
      for (int64_t c = 0; c < shape.columns(); ++c) v_saved[c] /= v_norm;
      return;
    }
    const int64_t last = last_iteration();
    const A u_divisor = static_cast<A>(std::max(norm_of_t(last), layer_.eps));
    const A v_divisor = static_cast<A>(std::max(norm_of_y(last), layer_.eps));
    for (int64_t r = 0; r < shape.rows; ++r) {
      u_saved[r] = work_.t[r] / u_divisor;
      write_vector(layer_.u, r * layer_.u_stride, u_saved[r]);
    }
    for_columns(shape, [&](int64_t c, int64_t place) {
      v_saved[place] = work_.y[c] / v_divisor;
      write_vector(layer_.v, place * layer_.v_stride, v_saved[place]);
    });
  }

  /// The vectors after a forward that found no σ: they stay where they are of use and the weight
  /// has none, else they restart.
  void keep_or_restart(A sigma) {
    const int64_t rows = layer_.shape.rows, columns = layer_.shape.columns();
    const bool usable = is_usable(square_of(layer_.u, layer_.u_stride, 0, rows)) &&
                        is_usable(square_of(layer_.v, layer_.v_stride, 0, columns));
    const bool restart = !usable || (sigma == 0 && !is_zero_weight());
    A *u_saved = static_cast<A*>(layer_.u_saved), *v_saved = static_cast<A*>(layer_.v_saved);
    keep_or_restart(layer_.u, layer_.u_stride, rows, restart, u_saved);
    keep_or_restart(layer_.v, layer_.v_stride, columns, restart, v_saved);
  }

  void keep_or_restart(void* vector, int64_t stride, int64_t size, bool restart, A* saved) {
    const bool alternating = read_vector(vector, 0) > 0;  // not the vector that it is
    double square = 0;
    for (int64_t i = 0; restart && i < size; ++i) {
      square += start_entry(i, false) * start_entry(i, false);
    }
    for (int64_t i = 0; i < size; ++i) {
      if (restart) {
        const double value = start_entry(i, alternating) / std::sqrt(square);
        write_vector(vector, i * stride, static_cast<A>(value));
      }
      saved[i] = read_vector(vector, i * stride);
    }
  }

  bool is_zero_weight() const {
    const T* weight = static_cast<const T*>(layer_.weight);
    return std::all_of(weight, weight + layer_.shape.numel(),
                       [](T x) { return to_compute(x) == 0; });
  }

  bool vectors_are_wide() const { return std::is_same_v<T, A> || layer_.wide_vectors; }

  void write_vector(void* vector, int64_t place, A value) const {
    if (vectors_are_wide()) {
      static_cast<A*>(vector)[place] = value;
    } else {
      static_cast<T*>(vector)[place] = from_compute<T>(value);
    }
  }
  A read_vector(const void* vector, int64_t place) const {
    return vectors_are_wide() ? static_cast<const A*>(vector)[place]
                              : to_compute(static_cast<const T*>(vector)[place]);
  }
  A u_at(int64_t i) const { return read_vector(layer_.u, i * layer_.u_stride); }
  A v_at(int64_t i) const { return read_vector(layer_.v, i * layer_.v_stride); }

  const Kernels<T>& kernels_ = kernels<T>();
  const Layer& layer_;
  const Cut& cut_;
  const bool update_, streaming_;
  const Workspace<A> work_;
  A *const v_scratch_, *const s_scratch_;
  A* const packed_;
};

}  // namespace

void forward(const std::vector<Layer>& layers, bool update, int threads,
             Schedule::ParallelFor parallel_for) {
  std::vector<Cut> cuts;
  cuts.reserve(layers.size());
  Schedule schedule;
  int64_t bytes = 0, scratch_bytes = 0;
  for (const Layer& layer : layers) {
    const Cut& cut = cuts.emplace_back(layer, update);
    schedule.add_layer(
        cut.stages(), [&](int64_t stage) { return cut.stage_size(stage); }, cut.whole);
    bytes += layer.shape.numel() * element_size(layer.dtype);
    dispatch(layer.dtype, [&](auto element) {
      scratch_bytes =
          std::max(scratch_bytes, Forward<decltype(element)>::scratch_bytes(layer, cut));
    });
  }
  const int workers = bytes <= kSerialBytes ? 1 : threads;

  // The workspaces of all layers and one scratch for each worker, in one allocation.
  const auto place = [&](char* base, std::vector<Arena>* workspaces) {
    Arena arena(base);
    for (size_t i = 0; i < layers.size(); ++i) {
      if (workspaces != nullptr) workspaces->push_back(arena);
      dispatch(layers[i].dtype, [&](auto element) {
        Workspace<compute_t<decltype(element)>>(layers[i], cuts[i], arena);
      });
    }
    return arena.size();
  };
  const int64_t workspace_bytes = place(nullptr, nullptr);
  scratch_bytes = ceil_div(scratch_bytes, 64) * 64;
  const Block memory(workspace_bytes + workers * scratch_bytes);
  std::vector<Arena> workspaces;
  workspaces.reserve(layers.size());
  place(memory.base, &workspaces);

  const bool streaming = 2 * bytes > kCacheBytes;
  schedule.fill_waits(workers);
  schedule.run(workers, parallel_for, [&](const Item& item, int worker) {
    const Layer& layer = layers[item.layer];
    dispatch(layer.dtype, [&](auto element) {
      Forward<decltype(element)>(layer, cuts[item.layer], update, streaming, workspaces[item.layer],
                                 memory.base + workspace_bytes + worker * scratch_bytes)
          .run(item);
    });
  });
}

}  // namespace spectral_ext::cpu
