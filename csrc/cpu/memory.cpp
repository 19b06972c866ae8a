#include "memory.h"

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace spectral_ext::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

/// Keeps released blocks for the next call, but never holds much more in all than was in use at one
/// time.
class Pool {
 public:
  void* allocate(size_t bytes) {
    bytes = (bytes + kRounding - 1) / kRounding * kRounding;
    std::lock_guard lock(mutex_);
    // Of blocks of one size the one that was released last: it is the warmest in the caches.
    const auto end = unused_.upper_bound(bytes);
    void* block;
    if (end != unused_.begin() && std::prev(end)->first == bytes) {
      block = std::prev(end)->second;
      unused_.erase(std::prev(end));
      unused_bytes_ -= bytes;
    } else {
      block = from_system(bytes);
      if (block == nullptr && release_unused_locked() > 0) block = from_system(bytes);
      if (block == nullptr) throw std::bad_alloc();
    }
    used_.emplace(block, bytes);
    used_bytes_ += bytes;
    if (used_bytes_ > peak_bytes_) peak_bytes_ = used_bytes_;
    // An eighth more: a forward and a backward have workspaces of different sizes, and to drop a
    // block for one of them would cost the other a fresh one, in every step.
    while (used_bytes_ + unused_bytes_ > peak_bytes_ + peak_bytes_ / 8) drop_largest();
    return block;
  }

  void release(void* block) noexcept {
    std::lock_guard lock(mutex_);
    const auto found = used_.find(block);
    const size_t bytes = found->second;
    used_.erase(found);
    used_bytes_ -= bytes;
    unused_.emplace(bytes, block);
    unused_bytes_ += bytes;
  }

  size_t release_unused() noexcept {
    std::lock_guard lock(mutex_);
    peak_bytes_ = used_bytes_;
    return release_unused_locked();
  }

 private:
  // Sizes are rounded so that layers of nearly the same size can use each other's blocks.
  static constexpr size_t kRounding = size_t{64} << 10;

  static void* from_system(size_t bytes) {
    const size_t alignment = bytes >= kHugePage ? kHugePage : 4096;
    void* block = nullptr;
    if (posix_memalign(&block, alignment, bytes) != 0) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes >= kHugePage) madvise(block, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    return block;
  }

  void drop_largest() noexcept {
    const auto last = std::prev(unused_.end());
    unused_bytes_ -= last->first;
    std::free(last->second);
    unused_.erase(last);
  }

  size_t release_unused_locked() noexcept {
    const size_t bytes = unused_bytes_;
    while (!unused_.empty()) drop_largest();
    return bytes;
  }

  std::mutex mutex_;
  std::multimap<size_t, void*> unused_;
  std::unordered_map<void*, size_t> used_;
  size_t used_bytes_ = 0, unused_bytes_ = 0, peak_bytes_ = 0;
};

/// Never destroyed: tensors may outlive static destructors.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

void* allocate(size_t bytes) { return pool().allocate(bytes); }
void release(void* block) noexcept { pool().release(block); }
size_t release_unused() noexcept { return pool().release_unused(); }

}  // namespace spectral_ext::cpu
