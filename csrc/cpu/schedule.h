// Work items of many layers, run by any number of threads in one parallel region.
//
// The work on a layer comes in stages, each of which needs all of the one before. Items stand in a
// list so that whatever an item needs stands before it. A thread takes the next item of the list,
// waits until its layer has come far enough, and runs it. Since everything that an item can wait
// for has already been taken by a running thread, this never deadlocks, not even with one thread.
// Layers follow one another without a barrier, and a layer's weights are read again while they are
// still in cache.
//
// The items depend on shapes alone and each is computed the same way by whoever takes it: results
// are the same bits for any number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace spectral_ext::cpu {

struct Item {
  int32_t layer;
  int64_t stage;
  int64_t index;     // among the items of this stage
  int64_t required;  // items of this layer that must be finished first: all of earlier stages
};

class Schedule {
 public:
  /// Appends a layer whose stages have stage_size(stage) items. A layer that is `whole` is one
  /// item, with stage −1: its runner does all stages itself. The last stage counts down, so that it
  /// begins with what the stage before has left in cache.
  template <class Size>
  void add_layer(int64_t stages, Size stage_size, bool whole) {
    const int32_t layer = layers_++;
    if (whole) {
      items_.push_back({layer, -1, 0, 0});
      return;
    }
    int64_t before = 0;
    for (int64_t stage = 0; stage < stages; ++stage) {
      const int64_t size = stage_size(stage);
      for (int64_t i = 0; i < size; ++i) {
        items_.push_back({layer, stage, stage == stages - 1 ? size - 1 - i : i, before});
      }
      before += size;
    }
  }

  /// Moves up to `count` items that wait for nothing ahead of each stage that waits for another, so
  /// that threads have work while the last items of the stage before are finished.
  void fill_waits(int count);

  /// Calls f(begin, end) on parts of [0, n), in parallel if it can.
  using ParallelFor = void (*)(int64_t n, void (*f)(int64_t begin, int64_t end, void* context),
                               void* context);

  /// Runs every item once as run(item, worker), with worker < workers. run must not throw.
  void run(int workers, ParallelFor parallel_for,
           const std::function<void(const Item&, int worker)>& run) const;

 private:
  std::vector<Item> items_;
  int32_t layers_ = 0;
};

}  // namespace spectral_ext::cpu
