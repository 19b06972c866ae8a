#include "memory.h"

#include <pthread.h>

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace spectral_ext::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

void* from_system(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 4096;
  void* block = nullptr;
  if (posix_memalign(&block, alignment, bytes) != 0) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) madvise(block, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return block;
}

/// Blocks by their size. An entry moves between containers as a node, which allocates nothing.
using Blocks = std::multimap<size_t, void*>;

/// Keeps released blocks for the next call, but never holds much more in all than was in use at one
/// time.
///
/// The lock guards the containers alone: no thread calls the system for memory, or returns memory
/// to it, while it holds the lock.
class Pool {
 public:
  void* allocate(size_t bytes) {
    bytes = (bytes + kRounding - 1) / kRounding * kRounding;
    Blocks::node_type node = take_unused(bytes);
    if (node.empty()) {
      Blocks fresh;
      fresh.emplace(bytes, nullptr);
      node = fresh.extract(fresh.begin());
      node.mapped() = from_system(bytes);
      if (node.mapped() == nullptr && release_unused() > 0) node.mapped() = from_system(bytes);
      if (node.mapped() == nullptr) throw std::bad_alloc();
    }
    void* const block = node.mapped();
    Blocks dropped;
    try {
      const std::lock_guard lock(mutex_);
      used_.try_emplace(block).first->second = std::move(node);
      used_bytes_ += bytes;
      if (used_bytes_ > peak_bytes_) peak_bytes_ = used_bytes_;
      // An eighth more: a forward and a backward have workspaces of different sizes, and to drop a
      // block for one of them would cost the other a fresh one, in every step.
      while (used_bytes_ + unused_bytes_ > peak_bytes_ + peak_bytes_ / 8) {
        unused_bytes_ -= std::prev(unused_.end())->first;
        dropped.insert(unused_.extract(std::prev(unused_.end())));
      }
    } catch (...) {
      std::free(block);
      throw;
    }
    free_all(dropped);
    return block;
  }

  void release(void* block) noexcept {
    const std::lock_guard lock(mutex_);
    const auto found = used_.find(block);
    const size_t bytes = found->second.key();
    unused_.insert(std::move(found->second));
    used_.erase(found);
    used_bytes_ -= bytes;
    unused_bytes_ += bytes;
  }

  size_t release_unused() noexcept {
    Blocks dropped;
    size_t bytes;
    {
      const std::lock_guard lock(mutex_);
      dropped.swap(unused_);
      bytes = std::exchange(unused_bytes_, 0);
      peak_bytes_ = used_bytes_;
    }
    free_all(dropped);
    return bytes;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // Sizes are rounded so that layers of nearly the same size can use each other's blocks.
  static constexpr size_t kRounding = size_t{64} << 10;

  /// Among blocks of this size the one that was released last: it is the warmest in the caches.
  Blocks::node_type take_unused(size_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto end = unused_.upper_bound(bytes);
    if (end == unused_.begin() || std::prev(end)->first != bytes) return {};
    unused_bytes_ -= bytes;
    return unused_.extract(std::prev(end));
  }

  static void free_all(const Blocks& blocks) noexcept {
    for (const auto& [bytes, block] : blocks) std::free(block);
  }

  std::mutex mutex_;
  Blocks unused_;
  std::unordered_map<void*, Blocks::node_type> used_;
  size_t used_bytes_ = 0, unused_bytes_ = 0, peak_bytes_ = 0;
};

/// Never destroyed: tensors may outlive static destructors. Made when the library is loaded, so
/// that no thread can be making it while another one forks.
Pool& pool = *new Pool;

/// A child of fork() has only the thread that forked. If another thread held the lock at that
/// moment, the child would wait for it forever; so the thread that forks takes the lock first.
[[maybe_unused]] const int registered = pthread_atfork(
    [] { pool.mutex().lock(); }, [] { pool.mutex().unlock(); }, [] { pool.mutex().unlock(); });

}  // namespace

void* allocate(size_t bytes) { return pool.allocate(bytes); }
void release(void* block) noexcept { pool.release(block); }
size_t release_unused() noexcept { return pool.release_unused(); }

}  // namespace spectral_ext::cpu
