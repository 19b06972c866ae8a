// Runs the device functions of csrc/cuda on a CPU: one fiber for each CUDA thread, in one OS
// thread.
//
// What it models: CTAs of which only some are resident, in any order and at any speed relative to
// each other; __syncthreads, full-warp shuffles, signals between CTAs, shared memory that begins as
// garbage, alignment of vectors (an unaligned one is an error). A fiber runs until it waits, so a
// thread that should have waited for others runs ahead of them as far as it can. If nobody can go
// on, it prints the seed and aborts.
//
// What it cannot: memory is sequentially consistent here, so a missing release or acquire changes
// nothing (ThreadSanitizer sees those); warps do not run in lockstep; no caches, no timing.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

struct Barrier {
  int size = 0, arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  double slots[2][32];
};

struct Block;

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  ucontext_t context;
  Block* block = nullptr;
  unsigned thread = 0;
  bool done = false;
};

struct Block {
  unsigned index = 0;
  int alive = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<uint4> shared;
  std::vector<Fiber> fibers;
};

inline Fiber* current = nullptr;
inline unsigned grid_size = 0;
inline std::function<void()> kernel;
inline bool progressed = false;  // something happened in this round besides waiting
inline ucontext_t main_context;

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
extern "C" void emulator_switch(void** save, void* load);
asm(R"(.text
.weak emulator_switch
emulator_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp, (%rdi); movq %rsi, %rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
)");
inline void* main_stack_pointer = nullptr;
inline void enter(Fiber& fiber) { emulator_switch(&main_stack_pointer, fiber.stack_pointer); }
inline void leave(Fiber& fiber) { emulator_switch(&fiber.stack_pointer, main_stack_pointer); }
#define EMULATOR_OWN_SWITCH
#else
inline void enter(Fiber& fiber) { swapcontext(&main_context, &fiber.context); }
inline void leave(Fiber& fiber) { swapcontext(&fiber.context, &main_context); }
#endif

inline void yield() { leave(*current); }

inline void run_fiber() {
  kernel();
  current->done = true;
  --current->block->alive;
  progressed = true;
  for (;;) yield();
}

inline void prepare(Fiber& fiber) {
  constexpr size_t kStack = 64 << 10;
  fiber.stack.reset(new char[kStack]);
#if defined(EMULATOR_OWN_SWITCH)
  const auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) & ~uintptr_t{15};
  auto** p = reinterpret_cast<void**>(top - 8);
  *--p = reinterpret_cast<void*>(run_fiber);
  for (int i = 0; i < 6; ++i) *--p = nullptr;
  fiber.stack_pointer = p;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, run_fiber, 0);
#endif
}

inline void arrive(Barrier& barrier) {
  progressed = true;
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline std::unique_ptr<Block> make_block(unsigned index, int threads, size_t shared_bytes) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->alive = block->barrier.size = threads;
  block->warps.resize(threads / 32);
  for (Warp& warp : block->warps) warp.barrier.size = 32;
  block->shared.assign(shared_bytes / 16, {0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu});
  block->fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    block->fibers[i].block = block.get();
    block->fibers[i].thread = i;
    prepare(block->fibers[i]);
  }
  return block;
}

/// Runs `grid` CTAs, at most `resident` of them at a time. Seed 0 is round robin; others shuffle.
inline void launch(unsigned grid, int threads, size_t shared_bytes, int resident, uint64_t seed,
                   std::function<void()> body) {
  kernel = std::move(body);
  grid_size = grid;
  std::mt19937_64 random(seed);
  std::vector<std::unique_ptr<Block>> live;
  unsigned next = 0;
  int idle_rounds = 0;
  while (next < grid || !live.empty()) {
    while (next < grid && static_cast<int>(live.size()) < resident) {
      live.push_back(make_block(next++, threads, shared_bytes));
    }
    progressed = false;
    if (seed != 0) std::shuffle(live.begin(), live.end(), random);
    for (auto& block : live) {
      if (seed != 0 && random() % 3 == 0) continue;
      const size_t count = block->fibers.size(), start = seed != 0 ? random() % count : 0;
      for (size_t i = 0; i < count; ++i) {
        Fiber& fiber = block->fibers[(start + i) % count];
        if (fiber.done) continue;
        current = &fiber;
        enter(fiber);
      }
    }
    std::erase_if(live, [](const auto& block) { return block->alive == 0; });
    idle_rounds = progressed ? 0 : idle_rounds + 1;
    if (idle_rounds > 100) {
      std::fprintf(stderr, "deadlock (seed %llu)\n", static_cast<unsigned long long>(seed));
      std::abort();
    }
  }
}

template <class F>
struct Index {
  struct {
    operator unsigned() const { return F{}(); }
  } x;
};
struct ThreadOf {
  unsigned operator()() const { return current->thread; }
};
struct BlockOf {
  unsigned operator()() const { return current->block->index; }
};
struct GridOf {
  unsigned operator()() const { return grid_size; }
};

}  // namespace emulator

static emulator::Index<emulator::ThreadOf> threadIdx;
static emulator::Index<emulator::BlockOf> blockIdx;
static emulator::Index<emulator::GridOf> gridDim;

inline void __syncthreads() { emulator::arrive(emulator::current->block->barrier); }

template <class A>
A __shfl_xor_sync(unsigned, A value, int mask) {
  emulator::Warp& warp = emulator::current->block->warps[emulator::current->thread / 32];
  const int lane = emulator::current->thread % 32, turn = warp.barrier.generation & 1;
  std::memcpy(&warp.slots[turn][lane], &value, sizeof value);
  emulator::arrive(warp.barrier);
  std::memcpy(&value, &warp.slots[turn][lane ^ mask], sizeof value);
  return value;
}

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) {
    std::fprintf(stderr, "misaligned vector at %p\n", p);
    std::abort();
  }
}
inline uint4 __ldcs(const uint4* p) { return check_aligned(p), *p; }
inline void __stcs(uint4* p, uint4 value) { check_aligned(p), *p = value; }

namespace spectral_ext::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  _Float16 value;
};

inline float __bfloat162float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline BFloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline float __half2float(Float16 x) { return static_cast<float>(x.value); }
inline Float16 __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

using std::fabs;
using std::ilogb;
using std::ldexp;
using std::sqrt;

inline int32_t load_acquire(const int32_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void add_release(int32_t* p, int32_t value) {
  emulator::progressed = true;
  __atomic_fetch_add(p, value, __ATOMIC_RELEASE);
}
inline int32_t take_next(int32_t* p) {
  emulator::progressed = true;
  return __atomic_fetch_add(p, 1, __ATOMIC_RELAXED);
}
inline void pause(const Piece&) { emulator::yield(); }
inline void prefetch(const void*) {}
template <class P>
P* global(P* p) {
  return p;
}
inline void* shared_memory() { return emulator::current->block->shared.data(); }

}  // namespace spectral_ext::cuda
