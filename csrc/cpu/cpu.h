// The CPU backend for callers: all layers of a model in one call.
#pragma once

#include <vector>

#include "../layer.h"
#include "dtypes.h"
#include "schedule.h"

namespace spectral_ext::cpu {

/// Normalizes all layers. `update` writes u and v. Throws std::bad_alloc before anything is
/// written.
void forward(const std::vector<Layer>& layers, bool update, int threads,
             Schedule::ParallelFor parallel_for);

/// Writes the gradients of all layers.
void backward(const std::vector<LayerGradient>& layers, int threads,
              Schedule::ParallelFor parallel_for);

/// Work below this size is not worth waking another thread.
constexpr int64_t kSerialBytes = 128 << 10;

/// A layer of up to this size is one item: it stays in the caches of the core that takes it.
constexpr int64_t kWholeBytes = 768 << 10;

/// The work of one item of a larger layer.
constexpr int64_t kItemBytes = 512 << 10;

/// Calls that touch more than this write past the caches: what they write would not survive there,
/// and a line that is written in a cache is read first.
constexpr int64_t kCacheBytes = 12 << 20;

/// Calls f with a value of the element type of `dtype`.
template <class F>
void dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

/// Calls f(place in storage order, place in v) for every column.
template <class F>
void for_columns(const Shape& shape, F f) {
  const ColumnOrder& order = shape.column_order;
  const int64_t columns = shape.columns();
  if (order.count == 0) {
    for (int64_t c = 0; c < columns; ++c) f(c, c);
    return;
  }
  int64_t index[ColumnOrder::kMaxDims] = {}, place = 0;
  for (int64_t c = 0; c < columns; ++c) {
    f(c, place);
    for (int d = order.count - 1; d >= 0; --d) {
      place += order.stride[d];
      if (++index[d] < order.size[d]) break;
      place -= index[d] * order.stride[d];
      index[d] = 0;
    }
  }
}

}  // namespace spectral_ext::cpu
