// Runs the device functions of csrc/cuda on a CPU: one fiber for each CUDA thread, all in one OS
// thread. device.cuh includes this where nvcc does not compile it.
//
// What it models:
// - CTAs of which only some are resident, in any order and at any speed relative to each other, and
//   the same for the warps of a CTA. A seed chooses; a thread runs until it waits for others, so
//   one that should have waited runs ahead of them as far as it can.
// - __syncthreads, __syncwarp, full-warp shuffles, and the signals between CTAs. If nobody can go
//   on, it prints who waits for what, and the seed, and aborts.
// - Shared memory that begins as garbage (NaN) for each CTA.
// - Under ThreadSanitizer, which orders of memory accesses CUDA guarantees: those that follow from
//   a barrier, and from a release that an acquire has seen. Everything else is a race, whether it
//   went wrong in this run or not. A shuffle orders nothing, as in CUDA. CTAs that run in the same
//   fibers, one after the other, count as ordered, so races are sought with all CTAs resident.
//
// What it cannot:
// - Memory is sequentially consistent. Without ThreadSanitizer a wrong release or acquire changes
//   no number.
// - Inline assembly, intrinsics and the arithmetic of the device (fused multiply-add, for one) are
//   not here. Barriers count how many threads came, and do not see that they came by two ways.
// - Warps are not in lockstep, as since Volta. There are no caches, no time, no limit of registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string_view>
#include <vector>

#include "cuda/tables.h"
#include "fibers.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

// ---- threads of a CTA ----

struct Barrier {
  int size = 0, arrived = 0, generation = 0;
  int64_t ordered[2];  // in turns: to ThreadSanitizer, what orders memory before and after it
};

struct Warp {
  Barrier barrier;
  double slots[2][32];  // what a shuffle exchanges, in turns
};

struct Block;

struct Thread {
  Fiber* fiber;  // lives as long as the process
  Block* block;
  unsigned index;
  bool done = false, spins = false;
  const Barrier* barrier = nullptr;  // where it waits, for a generation after this one
  int generation = 0;

  bool can_run() const { return !done && !(barrier && barrier->generation == generation); }
};

struct Block {
  unsigned index = 0;
  int alive = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  std::vector<uint4> shared;
  spectral_ext::cuda::Piece piece{};  // the last for which its first thread has waited,
  int32_t finished = 0;               // and how many others were finished then
};

inline Thread* current = nullptr;
inline unsigned grid_size = 0;
inline std::function<void()> kernel;
inline bool progressed = false;  // something happened in this round besides waiting

EMULATOR_UNSEEN inline void yield() { current->fiber->leave(); }

EMULATOR_UNSEEN inline void synchronize(void* address, bool release) {
#if defined(__SANITIZE_THREAD__)
  release ? __tsan_release(address) : __tsan_acquire(address);
#else
  static_cast<void>(address), static_cast<void>(release);
#endif
}

/// Waits until all have arrived.
EMULATOR_UNSEEN inline void arrive(Barrier& barrier) {
  progressed = true;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->generation = barrier.generation;
  current->barrier = &barrier;
  yield();
  current->barrier = nullptr;
}

/// As arrive, and what was written before is seen after it.
EMULATOR_UNSEEN inline void arrive_in_order(Barrier& barrier) {
  // In turns, because who has gone on to the next one is not ordered before who has not.
  int64_t* const address = &barrier.ordered[barrier.generation & 1];
  synchronize(address, true);
  arrive(barrier);
  synchronize(address, false);
}

/// The life of a fiber: a CUDA thread in each launch that uses it.
EMULATOR_UNSEEN inline void run_thread() {
  Fiber::begin();
  for (;;) {
    synchronize(current->block, false);  // after what came before the launch
    kernel();
    synchronize(&grid_size, true);  // before what comes after it
    progressed = current->done = true;
    --current->block->alive;
    yield();
  }
}

// ---- a launch ----

EMULATOR_UNSEEN inline std::unique_ptr<Block> make_block(int threads, size_t shared_bytes) {
  auto block = std::make_unique<Block>();
  block->barrier.size = threads;
  block->warps.resize(threads / 32);
  for (Warp& warp : block->warps) warp.barrier.size = 32;
  block->shared.resize(shared_bytes / 16);
  block->threads.reserve(threads);
  for (int i = 0; i < threads; ++i) {
    block->threads.push_back({new Fiber(run_thread), block.get(), static_cast<unsigned>(i)});
  }
  return block;
}

EMULATOR_UNSEEN inline void begin(Block& block, unsigned index) {
  block.index = index;
  block.alive = block.barrier.size;
  std::fill(block.shared.begin(), block.shared.end(), uint4{~0u, ~0u, ~0u, ~0u});
  for (Thread& thread : block.threads) thread.done = false;
  synchronize(&block, true);
}

/// Runs the threads of a warp until all of them wait for others, or for `passes`.
EMULATOR_UNSEEN inline void run_warp(Block& block, unsigned warp, unsigned first, int passes) {
  bool ran = true;
  for (int pass = 0; ran && pass < passes; ++pass) {
    ran = false;
    for (unsigned i = 0; i < 32; ++i) {
      Thread& thread = block.threads[warp * 32 + (first + i) % 32];
      if (!thread.can_run()) continue;
      thread.spins = false;
      current = &thread;
      thread.fiber->enter();
      ran = ran || !thread.spins;
    }
  }
}

inline const char* name_of(spectral_ext::cuda::Kind kind) {
  constexpr const char* kNames[] = {"rows",  "columns", "vectors", "scale",
                                    "order", "dot",     "update"};
  return kNames[static_cast<int>(kind)];
}

[[noreturn]] EMULATOR_UNSEEN inline void report_deadlock(
    uint64_t seed, const std::vector<std::unique_ptr<Block>>& live) {
  std::fprintf(stderr, "deadlock (seed %llu)\n", static_cast<unsigned long long>(seed));
  for (const auto& block : live) {
    const spectral_ext::cuda::Piece& piece = block->piece;
    if (block->threads[0].spins) {
      std::fprintf(stderr,
                   "CTA %u waits to do %s [%lld, %lld) of layer %d, piece %d: %d of the %d pieces "
                   "before it are finished\n",
                   block->index, name_of(piece.kind), static_cast<long long>(piece.begin),
                   static_cast<long long>(piece.end), piece.layer, piece.index, block->finished,
                   piece.required);
    } else {
      std::fprintf(stderr, "CTA %u waits at a barrier, where %d of %d threads are\n", block->index,
                   block->barrier.arrived, block->barrier.size);
    }
  }
  std::abort();
}

/// Runs `grid` CTAs, at most `resident` of them at a time. Seed 0 is round robin; others shuffle.
EMULATOR_UNSEEN inline void launch(unsigned grid, int threads, size_t shared_bytes, int resident,
                                   uint64_t seed, std::function<void()> body) {
  static std::vector<std::unique_ptr<Block>> idle;  // to be used again: making fibers takes long
  kernel = std::move(body);
  grid_size = grid;
  std::mt19937_64 random(seed);
  const auto any = [&](unsigned count) -> unsigned { return seed == 0 ? 0 : random() % count; };
  std::vector<std::unique_ptr<Block>> live;
  unsigned next = 0;
  int idle_rounds = 0;
  while (next < grid || !live.empty()) {
    while (next < grid && static_cast<int>(live.size()) < resident) {
      if (idle.empty()) idle.push_back(make_block(threads, shared_bytes));
      live.push_back(std::move(idle.back()));
      idle.pop_back();
      begin(*live.back(), next++);
    }
    progressed = false;
    if (seed != 0) std::shuffle(live.begin(), live.end(), random);
    for (auto& block : live) {
      if (any(3) == 2) continue;
      const auto warps = static_cast<unsigned>(block->warps.size()), first = any(warps);
      for (unsigned i = 0; i < warps; ++i) {
        run_warp(*block, (first + i) % warps, any(32), any(2) == 0 ? 1 << 30 : 3);
      }
    }
    for (size_t i = live.size(); i-- > 0;) {
      if (live[i]->alive > 0) continue;
      idle.push_back(std::move(live[i]));
      live.erase(live.begin() + static_cast<int64_t>(i));
    }
    idle_rounds = progressed ? 0 : idle_rounds + 1;
    if (idle_rounds > 100) report_deadlock(seed, live);
  }
  synchronize(&grid_size, false);
}

template <unsigned (*kValue)()>
struct Index {
  struct {
    operator unsigned() const { return kValue(); }
  } x;
};
EMULATOR_UNSEEN inline unsigned thread_index() { return current->index; }
EMULATOR_UNSEEN inline unsigned block_index() { return current->block->index; }
EMULATOR_UNSEEN inline unsigned grid_dim() { return grid_size; }
EMULATOR_UNSEEN inline void* shared_memory() { return current->block->shared.data(); }

EMULATOR_UNSEEN inline void note_progress() { progressed = true; }
EMULATOR_UNSEEN inline void note_finished(int32_t finished) { current->block->finished = finished; }

/// Waits a while for a signal.
EMULATOR_UNSEEN inline void spin(const spectral_ext::cuda::Piece& piece) {
  current->block->piece = piece;
  current->spins = true;
  yield();
}

}  // namespace emulator

// ---- what CUDA declares ----

static const emulator::Index<emulator::thread_index> threadIdx{};
static const emulator::Index<emulator::block_index> blockIdx{};
static const emulator::Index<emulator::grid_dim> gridDim{};

EMULATOR_UNSEEN inline void __syncthreads() {
  emulator::arrive_in_order(emulator::current->block->barrier);
}

EMULATOR_UNSEEN inline void __syncwarp() {
  emulator::arrive_in_order(emulator::current->block->warps[emulator::current->index / 32].barrier);
}

template <class A>
EMULATOR_UNSEEN A __shfl_xor_sync(unsigned, A value, int mask) {
  emulator::Warp& warp = emulator::current->block->warps[emulator::current->index / 32];
  const unsigned lane = emulator::current->index % 32, turn = warp.barrier.generation & 1;
  __builtin_memcpy(&warp.slots[turn][lane], &value, sizeof value);
  emulator::arrive(warp.barrier);
  __builtin_memcpy(&value, &warp.slots[turn][lane ^ mask], sizeof value);
  return value;
}

inline uint4 __ldcs(const uint4* p) { return *p; }
inline void __stcs(uint4* p, uint4 value) { *p = value; }

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
using std::sqrt;

}  // namespace spectral_ext::cuda

namespace emulator {

/// A memory order by the name that PTX has for it.
constexpr int order_of(std::string_view name) {
  return name == "acquire"   ? __ATOMIC_ACQUIRE
         : name == "release" ? __ATOMIC_RELEASE
                             : __ATOMIC_RELAXED;
}

}  // namespace emulator

namespace spectral_ext::cuda {

inline int32_t load_acquire(const int32_t* p) {
  constexpr int kOrder = emulator::order_of(SPECTRAL_EXT_LOAD_ORDER);
  const int32_t value = __atomic_load_n(p, kOrder);
  emulator::note_finished(value);
  return value;
}
inline void add_release(int32_t* p, int32_t value) {
  constexpr int kOrder = emulator::order_of(SPECTRAL_EXT_ADD_ORDER);
  __atomic_fetch_add(p, value, kOrder);
  emulator::note_progress();
}
inline int32_t take_next(int32_t* p) {
  emulator::note_progress();
  return __atomic_fetch_add(p, 1, __ATOMIC_RELAXED);
}
inline int thread_index() { return static_cast<int>(threadIdx.x); }
inline void pause(const Piece& piece) { emulator::spin(piece); }
inline void* shared_memory() { return emulator::shared_memory(); }
inline void prefetch(const void*) {}
template <class P>
P* global(P* p) {
  return p;
}

}  // namespace spectral_ext::cuda
