// Gradients of many layers: gW = (c·G − a·u vᵀ) / σ + gσ·u vᵀ with a = ⟨G, Y⟩, u and v constant.
// Without the term of a where σ is a constant of the output; gW = G + gσ·u vᵀ where the forward has
// left the weight alone.
//
// Two stages for a layer: dot products over slices of the storage, added up in order; then the
// rank-one update of each slice, last slice first, since its G is still in cache. Storage is walked
// in lines: runs of elements that share a row (a column, where inner is 1), so that one factor of u
// vᵀ is a number and the other a contiguous vector.
#include <algorithm>
#include <type_traits>

#include "cpu.h"
#include "kernels.h"
#include "workspace.h"

namespace spectral_ext::cpu {
namespace {

enum Stage { kDot, kUpdate };

struct Cut {
  bool whole;
  int64_t slice, slices;

  explicit Cut(const LayerGradient& layer) {
    const int64_t numel = layer.shape.numel();
    whole = numel * element_size(layer.dtype) <= kWholeBytes;
    slice = whole ? numel : kItemBytes / element_size(layer.dtype);
    slices = ceil_div(numel, slice);
  }
};

template <class T>
class Backward {
  using A = compute_t<T>;

 public:
  Backward(const LayerGradient& layer, const Cut& cut, bool streaming, double* partial,
           char* scratch)
      : layer_(layer),
        cut_(cut),
        streaming_(streaming),
        partial_(partial),
        v_scratch_(reinterpret_cast<A*>(scratch)) {}

  static int64_t scratch_bytes(const LayerGradient& layer) {
    return layer.shape.columns() * static_cast<int64_t>(sizeof(A));
  }

  void run(const Item& item) {
    if (item.stage != kUpdate) dot_slice(item.index);
    if (item.stage != kDot) update_slice(item.index);
  }

 private:
  void dot_slice(int64_t slice) {
    const int64_t begin = slice * cut_.slice;
    const int64_t count = std::min(cut_.slice, layer_.shape.numel() - begin);
    partial_[slice] = layer_.grad_output == nullptr || layer_.detach_sigma
                          ? 0
                          : kernels_.dot(static_cast<const T*>(layer_.grad_output) + begin,
                                         static_cast<const T*>(layer_.output) + begin, count);
  }

  void update_slice(int64_t slice) {
    // gW = scale·G − coefficient·u vᵀ
    const double sigma = *static_cast<const A*>(layer_.sigma);
    const double grad_sigma =
        layer_.grad_sigma == nullptr ? 0 : *static_cast<const A*>(layer_.grad_sigma);
    double along = 0;
    for (int64_t i = 0; i < cut_.slices; ++i) along += partial_[i];
    const bool left_alone = is_left_alone(sigma, layer_.scale, layer_.soft);
    const A scale = static_cast<A>(left_alone ? 1 : layer_.scale / sigma);
    const bool constant = left_alone || layer_.detach_sigma;
    const A coefficient = static_cast<A>((constant ? 0 : along / sigma) - grad_sigma);

    const Shape& shape = layer_.shape;
    const A *u = static_cast<const A*>(layer_.u), *v = v_in_storage_order();
    const bool by_rows = shape.inner > 1 || shape.outer == 1;  // else a line is a column
    const int64_t length = by_rows ? shape.inner : shape.rows;
    const auto* g = static_cast<const T*>(layer_.grad_output);
    auto* out = static_cast<char*>(layer_.grad_weight);
    const int64_t out_size = element_size(layer_.grad_dtype);
    const int64_t begin = slice * cut_.slice, end = std::min(begin + cut_.slice, shape.numel());
    for (int64_t i = begin; i < end;) {
      const int64_t line = i / length, offset = i % length;
      const int64_t count = std::min(length - offset, end - i);
      const A factor = by_rows ? u[line % shape.rows] : v[line];
      const A* vector = (by_rows ? v + line / shape.rows * shape.inner : u) + offset;
      kernels_.rank_one(g == nullptr ? nullptr : g + i, vector, scale, coefficient * factor,
                        out + i * out_size, layer_.grad_dtype, count, streaming_);
      i += count;
    }
    if (streaming_) kernels_.fence();
  }

  const A* v_in_storage_order() {
    const A* v = static_cast<const A*>(layer_.v);
    if (layer_.shape.column_order.count == 0) return v;
    for_columns(layer_.shape, [&](int64_t c, int64_t place) { v_scratch_[c] = v[place]; });
    return v_scratch_;
  }

  const Kernels<T>& kernels_ = kernels<T>();
  const LayerGradient& layer_;
  const Cut& cut_;
  const bool streaming_;
  double* const partial_;
  A* const v_scratch_;
};

}  // namespace

void backward(const std::vector<LayerGradient>& layers, int threads,
              Schedule::ParallelFor parallel_for) {
  std::vector<Cut> cuts;
  cuts.reserve(layers.size());
  std::vector<int64_t> first_partial;
  Schedule schedule;
  int64_t bytes = 0, scratch_bytes = 0, partials = 0;
  for (const LayerGradient& layer : layers) {
    const Cut& cut = cuts.emplace_back(layer);
    schedule.add_layer(2, [&](int64_t) { return cut.slices; }, cut.whole);
    first_partial.push_back(partials);
    partials += cut.slices;
    bytes += layer.shape.numel() * element_size(layer.dtype);
    dispatch(layer.dtype, [&](auto element) {
      scratch_bytes = std::max(scratch_bytes, Backward<decltype(element)>::scratch_bytes(layer));
    });
  }
  const int workers = bytes <= kSerialBytes ? 1 : threads;
  scratch_bytes = ceil_div(scratch_bytes, 64) * 64;
  const Block scratch(workers * scratch_bytes);
  std::vector<double> partial(static_cast<size_t>(partials));

  const bool streaming = 3 * bytes > kCacheBytes;
  schedule.run(workers, parallel_for, [&](const Item& item, int worker) {
    const LayerGradient& layer = layers[item.layer];
    dispatch(layer.dtype, [&](auto element) {
      Backward<decltype(element)>(layer, cuts[item.layer], streaming,
                                  partial.data() + first_partial[item.layer],
                                  scratch.base + worker * scratch_bytes)
          .run(item);
    });
  });
}

}  // namespace spectral_ext::cpu
