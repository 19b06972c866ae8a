// The pool of output memory under what a test in Python cannot arrange: a fork while another thread
// holds the lock, a system that has no memory left, and the place of every call to the system.
//
// The program is linked with --wrap, so that csrc/cpu/memory.cpp calls the functions below for the
// lock and for the system. Nothing here depends on time.
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <thread>

#include "cpu/memory.h"

extern "C" {
int __real_pthread_mutex_lock(pthread_mutex_t*);
int __real_pthread_mutex_unlock(pthread_mutex_t*);
int __real_posix_memalign(void**, size_t, size_t);
int __real_madvise(void*, size_t, int);
void __real_free(void*);
}

namespace {

thread_local int locked = 0;
thread_local bool in_release = false, stops_in_new = false;
std::atomic<bool> stopped{false}, may_go_on{false};
std::atomic<int> blocks{0};
bool is_child = false;
int news_before_failure = -1, memaligns_before_failure = -1;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "%s\n", message);
  std::_Exit(1);
}

void check(bool condition, const char* message) {
  if (!condition) fail(message);
}

bool fails_now(int& countdown) { return countdown >= 0 && countdown-- == 0; }

void check_unlocked() { check(locked == 0, "the system is called while the lock is held"); }

}  // namespace

extern "C" {

int __wrap_pthread_mutex_lock(pthread_mutex_t* mutex) {
  if (is_child) {
    // A child has one thread: what is locked here stays locked.
    check(pthread_mutex_trylock(mutex) == 0, "the child waits for a thread that it does not have");
  } else {
    if (locked == 0 && !stops_in_new) may_go_on = true;  // whoever holds it need not hold it longer
    __real_pthread_mutex_lock(mutex);
  }
  ++locked;
  return 0;
}

int __wrap_pthread_mutex_unlock(pthread_mutex_t* mutex) {
  --locked;
  return __real_pthread_mutex_unlock(mutex);
}

int __wrap_posix_memalign(void** block, size_t alignment, size_t bytes) {
  check_unlocked();
  if (fails_now(memaligns_before_failure)) return 12;
  ++blocks;
  return __real_posix_memalign(block, alignment, bytes);
}

int __wrap_madvise(void* block, size_t bytes, int advice) {
  check_unlocked();
  return __real_madvise(block, bytes, advice);
}

void __wrap_free(void* block) {
  check_unlocked();
  --blocks;
  __real_free(block);
}
}

void* operator new(size_t bytes) {
  check(!in_release, "release() allocates");
  if (fails_now(news_before_failure)) throw std::bad_alloc();
  if (stops_in_new && locked > 0 && !stopped) {
    stopped = true;
    while (!may_go_on) std::this_thread::yield();
  }
  void* const block = std::malloc(bytes);
  if (block == nullptr) throw std::bad_alloc();
  return block;
}
void operator delete(void* block) noexcept { __real_free(block); }
void operator delete(void* block, size_t) noexcept { __real_free(block); }

namespace cpu = spectral_ext::cpu;

namespace {

constexpr size_t kMegabyte = size_t{1} << 20;

void release(void* block) {
  in_release = true;
  cpu::release(block);
  in_release = false;
}

/// Forks while another thread is inside of the pool, and uses the pool in the child.
void fork_beside_pool() {
  std::thread other([] {
    stops_in_new = true;  // in the first allocation that it makes with the lock in its hands
    release(cpu::allocate(kMegabyte));
  });
  while (!stopped) std::this_thread::yield();
  const pid_t child = fork();
  if (child == 0) {
    is_child = true;
    release(cpu::allocate(kMegabyte));
    cpu::release_unused();
    std::_Exit(0);
  }
  may_go_on = true;
  other.join();
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child failed");
}

/// Lets each allocation of a call fail in turn: nothing is lost, and the pool goes on.
void no_memory() {
  void* const kept = cpu::allocate(3 * kMegabyte);
  for (const bool reused : {false, true}) {
    for (int countdown = 0, failed = 1; failed; ++countdown) {
      if (reused) {
        release(cpu::allocate(kMegabyte));
      } else {
        cpu::release_unused();
      }
      news_before_failure = countdown;
      try {
        void* const block = cpu::allocate(kMegabyte);
        failed = 0;
        news_before_failure = -1;
        std::memset(block, 1, kMegabyte);
        release(block);
      } catch (const std::bad_alloc&) {
        news_before_failure = -1;
      }
      check(failed || countdown > 0, "no allocation of a call could fail");
    }
  }
  cpu::release_unused();
  check(blocks == 1, "memory was lost where an allocation failed");

  release(cpu::allocate(2 * kMegabyte));  // unused memory of another size is given up
  memaligns_before_failure = 0;
  void* const second = cpu::allocate(kMegabyte);
  check(blocks == 2, "unused memory was kept where the system had none");
  memaligns_before_failure = 0;
  bool refused = false;
  try {
    cpu::allocate(4 * kMegabyte);
  } catch (const std::bad_alloc&) {
    refused = true;
  }
  check(refused, "no memory, and no std::bad_alloc");
  release(second);
  release(kept);
  cpu::release_unused();
  check(blocks == 0, "not all memory was returned");
}

}  // namespace

int main(int count, char** arguments) {
  check(count == 2, "usage: pool_test fork|memory");
  std::strcmp(arguments[1], "fork") == 0 ? fork_beside_pool() : no_memory();
}
