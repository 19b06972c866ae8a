#include "plan.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>
#include <string>

namespace spectral_ext::cuda {
namespace {

constexpr int64_t kGranule =
    128;  // ranges of elements begin at multiples of this: whole cache lines
constexpr int64_t kMinBytes = 16 << 10;  // of a ticket of elements: less is not worth its overhead

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_at_least_one(int64_t value, const char* name) {
  if (value < 1) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                                ", expected at least 1");
  }
}

void check(const PlanOptions& options) {
  check_at_least_one(options.tickets, "tickets");
  check_at_least_one(options.max_columns, "max_columns");
}

/// Units of equal size of one layer: rows, chunks of columns, elements. Cuts fall between granules.
struct Units {
  int32_t layer;
  Kind kind;
  int64_t count, bytes_each, granule;

  int64_t bytes() const { return count * bytes_each; }
};

struct Range {
  Units units;
  int64_t begin, end;
};
using Ticket = std::vector<Range>;

/// Cuts a sequence of units into at most `count` tickets of equal bytes, as far as the units allow:
/// each is the best for what is left, so that an error is not carried on to the last.
std::vector<Ticket> cut(const std::vector<Units>& sequence, int64_t count) {
  int64_t left = 0, used = 0;
  for (const Units& units : sequence) left += units.bytes();
  std::vector<Ticket> tickets(1);
  for (const Units& units : sequence) {
    for (int64_t begin = 0; begin < units.count;) {
      const int64_t tickets_left = count - static_cast<int64_t>(tickets.size()) + 1;
      const int64_t room = (left + used) / tickets_left - used;  // `used` of the open ticket
      const int64_t granule_bytes = units.bytes_each * units.granule;
      int64_t granules = std::max<int64_t>(0, room + granule_bytes / 2) / granule_bytes;
      if (tickets_left == 1) granules = ceil_div(units.count, units.granule);
      if (granules == 0) {
        if (used > 0) {
          tickets.emplace_back();
          used = 0;
          continue;
        }
        granules = 1;
      }
      const int64_t end = std::min(units.count, begin + granules * units.granule);
      tickets.back().push_back({units, begin, end});
      used += (end - begin) * units.bytes_each;
      left -= (end - begin) * units.bytes_each;
      begin = end;
    }
  }
  return tickets;
}

int64_t total_bytes(const std::vector<Units>& sequence) {
  int64_t bytes = 0;
  for (const Units& units : sequence) bytes += units.bytes();
  return bytes;
}

std::vector<Ticket> cut_elements(const std::vector<Units>& sequence, const PlanOptions& options) {
  return cut(sequence, std::clamp<int64_t>(total_bytes(sequence) / kMinBytes, 1, options.tickets));
}

/// By how much the largest or smallest ticket differs from the mean, as a part of it.
double imbalance(const std::vector<Ticket>& tickets, int64_t bytes) {
  const double mean = static_cast<double>(bytes) / static_cast<double>(tickets.size());
  double worst = 0;
  for (const Ticket& ticket : tickets) {
    double work = 0;
    for (const Range& range : ticket) {
      work += static_cast<double>((range.end - range.begin) * range.units.bytes_each);
    }
    worst = std::max(worst, std::abs(work - mean) / mean);
  }
  return worst;
}

/// Whole rows. About ten of the widest rows make a ticket, though one very wide row among many must
/// not make tickets of everything else too large. Of the counts from there down to half, the
/// largest whose tickets are equal within 5 %: rows of one width often have a divisor that fits.
std::vector<Ticket> cut_rows(const std::vector<Units>& sequence, const PlanOptions& options) {
  int64_t widest = 1;
  for (const Units& units : sequence) widest = std::max(widest, units.bytes_each);
  const int64_t bytes = total_bytes(sequence);
  const int64_t wanted =
      std::clamp<int64_t>(std::max(bytes / (10 * widest), bytes / (256 << 10)), 1, options.tickets);
  for (int64_t count = wanted; count >= ceil_div(wanted, 2); --count) {
    std::vector<Ticket> tickets = cut(sequence, count);
    if (imbalance(tickets, bytes) < 0.05) return tickets;
  }
  return cut(sequence, wanted);
}

std::vector<Ticket> cut_chunks(const std::vector<Units>& sequence, const PlanOptions& options) {
  int64_t chunks = 0;
  for (const Units& units : sequence) chunks += units.count;
  return cut(sequence, std::clamp<int64_t>(chunks, 1, options.tickets));
}

/// Hands out the workspace; every part begins at a cache line.
class Workspace {
 public:
  int64_t take(int64_t count, int64_t size) {
    const int64_t place = bytes_;
    bytes_ += ceil_div(count * size, 128) * 128;
    return place;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

/// Appends pieces, tickets and phases to a plan, and counts what each piece has to wait for.
class Builder {
 public:
  explicit Builder(Plan& plan)
      : plan_(plan), finished_(plan.layers.size()), in_phase_(plan.layers.size()) {
    plan_.tickets = {0};
    plan_.phases = {0};
  }

  void add(Piece piece) {
    piece.required = finished_[piece.layer];
    ++in_phase_[piece.layer];
    plan_.pieces.push_back(piece);
  }

  void end_ticket() {
    const auto pieces = static_cast<int32_t>(plan_.pieces.size());
    if (plan_.tickets.back() != pieces) plan_.tickets.push_back(pieces);
  }

  void end_phase() {
    const auto tickets = static_cast<int32_t>(plan_.tickets.size()) - 1;
    if (plan_.phases.back() != tickets) plan_.phases.push_back(tickets);
    for (size_t i = 0; i < finished_.size(); ++i) finished_[i] += in_phase_[i];
    std::fill(in_phase_.begin(), in_phase_.end(), 0);
  }

  /// Tickets of elements, the last first: what the phase before has read last is still in cache.
  void add_elements(const std::vector<Ticket>& tickets) {
    std::map<std::pair<int32_t, Kind>, int32_t> index;
    for (auto ticket = tickets.rbegin(); ticket != tickets.rend(); ++ticket) {
      for (const Range& range : *ticket) {
        const auto [layer, kind, count, bytes, granule] = range.units;
        add({range.begin, range.end, layer, 0, index[{layer, kind}]++, 0, kind, false, false,
             false});
      }
      end_ticket();
    }
  }

 private:
  Plan& plan_;
  std::vector<int32_t> finished_, in_phase_;
};

/// One read of the weight.
struct Pass {
  bool dots, sums;
};

/// The passes of a layer; see cpu/forward.cpp for the mathematics. A wide row does not stay in
/// registers between its dot product and its share of the sums, so it is read once for each.
std::vector<Pass> passes_of(const Layer& layer, bool update, bool wide) {
  if (!update) return {{true, false}};
  std::vector<Pass> passes;
  if (layer.v_first) passes.push_back({false, true});
  const int fused = layer.n_power_iterations - (layer.v_first ? 1 : 0);
  for (int i = 0; i < fused; ++i) {
    if (wide) {
      passes.push_back({true, false});
      passes.push_back({false, true});
    } else {
      passes.push_back({true, true});
    }
  }
  if (layer.v_first) passes.push_back({true, false});
  return passes;
}

int choose_row_group(const Layer& layer, const PlanOptions& options) {
  const int64_t columns = layer.shape.columns(), size = element_size(layer.dtype);
  if (columns > std::min(options.max_columns, max_columns(size))) return kWide;
  int index = 0;
  while (row_group(size, index).columns(size) < columns) ++index;
  return index;
}

/// A stage of a layer: a pass over its rows, or the addition of what that pass has left.
struct Stage {
  Kind kind;
  Pass pass;
  bool initial;
  int32_t iteration;
};

std::vector<Stage> stages_of(const std::vector<Pass>& passes) {
  std::vector<Stage> stages;
  int32_t dots = 0, sums = 0;  // each iteration has one of both
  for (const Pass& pass : passes) {
    // Only a first pass, or the dots that follow nothing, read the vectors that the caller gave.
    const bool initial = stages.empty();
    stages.push_back({Kind::kRows, pass, initial, pass.dots ? dots : sums});
    if (pass.sums) stages.push_back({Kind::kColumns, {false, false}, initial, sums});
    dots += pass.dots;
    sums += pass.sums;
  }
  return stages;
}

void place_workspace(LayerTable& table, int64_t size, Workspace& workspace) {
  const int64_t columns = table.shape.columns();
  table.t = workspace.take(table.shape.rows, size);
  table.y = workspace.take(columns, size);
  table.partial = workspace.take(table.blocks * columns, size);
  table.scale = workspace.take(table.blocks, size);
  table.block_sums = workspace.take(2 * table.blocks, 8);
  table.chunk_sums = workspace.take(2 * table.chunks, 8);
  table.iterations = workspace.take(1, 4);
}

}  // namespace

Places consecutive_places(const std::vector<Shape>& shapes) {
  Places places;
  int64_t saved = 0;
  for (const Shape& shape : shapes) {
    places.sigma.push_back(static_cast<int32_t>(places.sigma.size()));
    places.saved.push_back(saved);
    saved += shape.rows + shape.columns();
  }
  return places;
}

Plan plan_forward(const std::vector<Layer>& layers, const Places& places, bool update,
                  const PlanOptions& options) {
  check(options);
  for (const Layer& layer : layers) {
    check_at_least_one(layer.n_power_iterations, "n_power_iterations");
  }
  const auto count = static_cast<int32_t>(layers.size());
  Plan plan;
  plan.layers.resize(layers.size());
  std::vector<std::vector<Stage>> stages;
  std::vector<Units> rows, elements;
  size_t last_stage = 0;
  for (int32_t i = 0; i < count; ++i) {
    const Layer& layer = layers[i];
    const Shape& shape = layer.shape;
    const int64_t size = element_size(layer.dtype);
    LayerTable& table = plan.layers[i];
    table = {};
    table.shape = shape;
    table.u_stride = layer.u_stride;
    table.v_stride = layer.v_stride;
    table.eps = layer.eps;
    table.tol = layer.tol;
    table.target = layer.scale;
    table.slack = slack_of_vectors(layer.dtype, layer.wide_vectors);
    table.n_power_iterations = layer.n_power_iterations;
    table.output_dtype = layer.output_dtype;
    table.wide_vectors = layer.wide_vectors;
    table.soft = layer.soft;
    table.saved = places.saved[i];
    table.sigma = places.sigma[i];
    table.update = update;
    table.v_first = layer.v_first;
    table.row_group = choose_row_group(layer, options);
    table.chunks = static_cast<int32_t>(ceil_div(shape.columns(), kChunkColumns));
    stages.push_back(stages_of(passes_of(layer, update, table.row_group == kWide)));
    last_stage = std::max(last_stage, stages.back().size());
    rows.push_back({i, Kind::kRows, shape.rows, shape.columns() * size, 1});
    elements.push_back(
        {i, Kind::kScale, shape.numel(), size + element_size(layer.output_dtype), kGranule});
    elements.push_back({i, Kind::kVectors, shape.rows + shape.columns(),
                        2 * (size + compute_size(layer.dtype)), kGranule});
  }

  // One cut of the rows serves every pass, so that a layer has the same blocks in all of them.
  const std::vector<Ticket> row_tickets = cut_rows(rows, options);
  for (const Ticket& ticket : row_tickets) {
    for (const Range& range : ticket) ++plan.layers[range.units.layer].blocks;
  }
  Workspace workspace;
  for (int32_t i = 0; i < count; ++i) {
    place_workspace(plan.layers[i], compute_size(layers[i].dtype), workspace);
  }
  plan.workspace_bytes = workspace.bytes();

  Builder builder(plan);
  for (size_t s = 0; s < last_stage; ++s) {
    const auto stage_of = [&](int32_t layer, Kind kind) -> const Stage* {
      return s < stages[layer].size() && stages[layer][s].kind == kind ? &stages[layer][s]
                                                                       : nullptr;
    };
    std::vector<int32_t> block(layers.size());
    for (const Ticket& ticket : row_tickets) {
      for (const Range& range : ticket) {
        const int32_t i = range.units.layer;
        if (const Stage* stage = stage_of(i, Kind::kRows)) {
          builder.add({range.begin, range.end, i, 0, block[i]++, stage->iteration, Kind::kRows,
                       stage->pass.dots, stage->pass.sums, stage->initial});
        }
      }
      builder.end_ticket();
    }
    std::vector<Units> chunks;
    for (int32_t i = 0; i < count; ++i) {
      const LayerTable& table = plan.layers[i];
      if (stage_of(i, Kind::kColumns) == nullptr) continue;
      chunks.push_back({i, Kind::kColumns, table.chunks,
                        kChunkColumns * table.blocks * compute_size(layers[i].dtype), 1});
    }
    for (const Ticket& ticket : cut_chunks(chunks, options)) {
      for (const Range& range : ticket) {
        const int32_t i = range.units.layer;
        for (int64_t c = range.begin; c < range.end; ++c) {
          const int64_t begin = c * kChunkColumns;
          const int64_t end = std::min(plan.layers[i].shape.columns(), begin + kChunkColumns);
          const Stage* const stage = stage_of(i, Kind::kColumns);
          builder.add({begin, end, i, 0, static_cast<int32_t>(c), stage->iteration, Kind::kColumns,
                       false, false, stage->initial});
        }
      }
      builder.end_ticket();
    }
    builder.end_phase();
  }
  builder.add_elements(cut_elements(elements, options));
  builder.end_phase();
  return plan;
}

Plan plan_backward(const std::vector<LayerGradient>& layers, const Places& places,
                   const PlanOptions& options) {
  check(options);
  const auto count = static_cast<int32_t>(layers.size());
  Plan plan;
  plan.layers.resize(layers.size());
  std::vector<Units> dots, updates;
  for (int32_t i = 0; i < count; ++i) {
    const Shape& shape = layers[i].shape;
    const int64_t size = element_size(layers[i].dtype);
    plan.layers[i] = {};
    plan.layers[i].shape = shape;
    plan.layers[i].saved = places.saved[i];
    plan.layers[i].sigma = places.sigma[i];
    plan.layers[i].target = layers[i].scale;
    plan.layers[i].soft = layers[i].soft;
    plan.layers[i].detach_sigma = layers[i].detach_sigma;
    plan.layers[i].widen = layers[i].grad_dtype != layers[i].dtype;
    dots.push_back({i, Kind::kDot, shape.numel(), 2 * size, kGranule});
    if (shape.column_order.count > 0) {
      dots.push_back(
          {i, Kind::kOrder, shape.columns(), 2 * compute_size(layers[i].dtype), kGranule});
    }
    updates.push_back(
        {i, Kind::kUpdate, shape.numel(), size + element_size(layers[i].grad_dtype), kGranule});
  }
  const std::vector<Ticket> tickets = cut_elements(dots, options);
  for (const Ticket& ticket : tickets) {
    for (const Range& range : ticket) {
      plan.layers[range.units.layer].blocks += range.units.kind == Kind::kDot;
    }
  }
  Workspace workspace;
  for (int32_t i = 0; i < count; ++i) {
    LayerTable& table = plan.layers[i];
    const bool ordered = table.shape.column_order.count > 0;
    table.y = workspace.take(ordered ? table.shape.columns() : 0, compute_size(layers[i].dtype));
    table.block_sums = workspace.take(table.blocks, 8);
  }
  plan.workspace_bytes = workspace.bytes();

  Builder builder(plan);
  builder.add_elements({tickets.rbegin(), tickets.rend()});  // reversed twice: first ticket first
  builder.end_phase();
  builder.add_elements(cut_elements(updates, options));
  builder.end_phase();
  return plan;
}

std::vector<std::vector<int32_t>> group_layers(const std::vector<DType>& dtypes) {
  std::vector<std::vector<int32_t>> groups;
  std::map<DType, size_t> open;  // the group that takes the next layer of a dtype
  for (size_t i = 0; i < dtypes.size(); ++i) {
    auto found = open.find(dtypes[i]);
    if (found == open.end() || groups[found->second].size() == kMaxLayers) {
      open[dtypes[i]] = groups.size();
      groups.emplace_back();
    }
    groups[open[dtypes[i]]].push_back(static_cast<int32_t>(i));
  }
  return groups;
}

}  // namespace spectral_ext::cuda
