#include "schedule.h"

#include <atomic>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spectral_ext::cpu {

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
