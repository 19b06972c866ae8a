// What the device functions need beyond arithmetic: signals between CTAs, loads and stores with a
// cache hint, conversions of half types, and sums over a warp or a CTA.
//
// This is the only file that knows whether nvcc compiles it or a C++ compiler with the emulator
// (tests/cuda_emulator), which defines the same names for ordinary threads of control.
#pragma once

#include "tables.h"

// The memory orders of signals between CTAs, as PTX names them: what a CTA wrote before it added to
// a counter is seen by whoever has loaded the sum. In one place for both compilers, so that
// ThreadSanitizer, which knows only the emulator, checks the orders that the device gets.
#define SPECTRAL_EXT_ADD_ORDER "release"
#define SPECTRAL_EXT_LOAD_ORDER "acquire"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"
#endif

namespace spectral_ext::cuda {

#if defined(__CUDACC__)
using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ __forceinline__ int32_t load_acquire(const int32_t* p) {
  int32_t value;
  asm volatile("ld." SPECTRAL_EXT_LOAD_ORDER ".gpu.global.s32 %0, [%1];"
               : "=r"(value)
               : "l"(p)
               : "memory");
  return value;
}

__device__ __forceinline__ void add_release(int32_t* p, int32_t value) {
  asm volatile("red." SPECTRAL_EXT_ADD_ORDER ".gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(value)
               : "memory");
}

__device__ __forceinline__ int32_t take_next(int32_t* p) { return atomicAdd(p, 1); }

/// threadIdx.x, read anew each time: held over all pieces, it and all that follows from it would
/// take registers from the loops in them.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

__device__ __forceinline__ void pause(const Piece&) { __nanosleep(40); }

__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/// Tells the compiler that a pointer from a table points to global memory: LDG instead of LD.
template <class P>
__device__ __forceinline__ P* global(P* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

__device__ __forceinline__ void* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
#endif

__device__ __forceinline__ float to_compute(float x) { return x; }
__device__ __forceinline__ double to_compute(double x) { return x; }
__device__ __forceinline__ float to_compute(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_compute(Float16 x) { return __half2float(x); }

__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(double* p, double x) { *p = x; }
__device__ __forceinline__ void store(BFloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(Float16* p, float x) { *p = __float2half_rn(x); }

/// Sixteen bytes of elements, moved as one.
template <class T>
struct alignas(16) Vector {
  static constexpr int kLanes = 16 / sizeof(T);
  T lane[kLanes];
};

template <class T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
  const uint4 bits = *reinterpret_cast<const uint4*>(p);
  Vector<T> vector;
  memcpy(&vector, &bits, 16);
  return vector;
}

/// As load_vector, for data that nobody reads again.
template <class T>
__device__ __forceinline__ Vector<T> load_once(const T* p) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
  Vector<T> vector;
  memcpy(&vector, &bits, 16);
  return vector;
}

/// Stores what this kernel does not read again.
template <class T>
__device__ __forceinline__ void store_once(T* p, const Vector<T>& vector) {
  uint4 bits;
  memcpy(&bits, &vector, 16);
  __stcs(reinterpret_cast<uint4*>(p), bits);
}

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

template <class A>
__device__ __forceinline__ A at_least(A x, A bound) {
  return x < bound ? bound : x;  // a NaN stays; fmax would drop it
}

/// The sum of x over the CTA, in a fixed order; every thread gets it, and all must call it.
__device__ __forceinline__ double block_sum(double x) {
  auto* of_warp = static_cast<double*>(shared_memory());
  x = warp_sum(x);
  __syncthreads();
  if (thread_index() % 32 == 0) of_warp[thread_index() / 32] = x;
  __syncthreads();
  double total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += of_warp[i];
  return total;
}

/// The sum of values that other CTAs have left in global memory.
__device__ __forceinline__ double total_of(const double* values, int count) {
  double x = 0;
#pragma unroll 1
  for (int i = thread_index(); i < count; i += kThreads) x += values[i];
  return block_sum(x);
}

/// What layer.h's function of this name says, on the device; σ as the caller sees it.
__device__ __forceinline__ bool is_left_alone(const LayerTable& table, double sigma) {
  return table.soft ? sigma <= table.target : sigma == 0;
}

/// The same for start_entry.
__device__ __forceinline__ double start_entry(int64_t i, bool alternating) {
  const double x = 1 + static_cast<double>(40503 * i & 0xffff) / 65536;
  return alternating && i % 2 == 0 ? -x : x;
}

/// The place in v of column c in storage order.
__device__ __forceinline__ int64_t place_in_v(const ColumnOrder& order, int64_t c) {
  if (order.count == 0) return c;
  int64_t place = 0;
#pragma unroll 1
  for (int d = order.count - 1; d >= 0; --d) {
    place += c % order.size[d] * order.stride[d];
    c /= order.size[d];
  }
  return place;
}

}  // namespace spectral_ext::cuda
