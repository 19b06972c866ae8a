#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spectral_ext::cpu {

void Schedule::fill_waits(int count) {
  std::vector<Item> order;
  order.reserve(items_.size());
  std::vector<bool> taken(items_.size());
  size_t next = 0;  // items before this one are taken or wait for others
  for (size_t i = 0; i < items_.size(); ++i) {
    if (taken[i]) continue;
    next = std::max(next, i);
    const bool begins_to_wait =
        items_[i].required > 0 && items_[i].required != items_[i - 1].required;
    for (int filled = 0; begins_to_wait && filled < count; ++filled) {
      while (next < items_.size() && (taken[next] || items_[next].required > 0)) ++next;
      if (next == items_.size()) break;
      taken[next] = true;
      order.push_back(items_[next]);
    }
    order.push_back(items_[i]);
  }
  items_ = std::move(order);
}

namespace {

struct Progress {
  alignas(64) std::atomic<int64_t> finished{0};
};

inline void wait_for(const std::atomic<int64_t>& finished, int64_t required) {
  for (int spins = 0; finished.load(std::memory_order_acquire) < required; ++spins) {
    if (spins > 4096) {
      std::this_thread::yield();
    } else {
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }
}

}  // namespace

void Schedule::run(int workers, ParallelFor parallel_for,
                   const std::function<void(const Item&, int)>& run) const {
  const auto progress = std::make_unique<Progress[]>(layers_);
  std::atomic<size_t> next{0};
  auto work = [&](int worker) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items_.size();) {
      const Item& item = items_[i];
      auto& finished = progress[item.layer].finished;
      wait_for(finished, item.required);
      run(item, worker);
      finished.fetch_add(1, std::memory_order_release);
    }
  };
  if (workers == 1) return work(0);
  parallel_for(
      workers,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t worker = begin; worker < end; ++worker) {
          (*static_cast<decltype(work)*>(context))(static_cast<int>(worker));
        }
      },
      &work);
}

}  // namespace spectral_ext::cpu
