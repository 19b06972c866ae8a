// As much of the CUDA runtime as csrc/cuda/launch.cpp uses, for a device that is this process:
// device memory is memory, what a stream is told is done at once, and a launch is run by the
// emulator.
//
// It is strict where a device is: while a stream is captured, a thread that is not in relaxed mode
// may neither allocate nor wait nor touch a kernel's attributes, and only captured work goes to the
// stream.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>

enum cudaError_t {
  cudaSuccess,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
constexpr unsigned cudaStreamNonBlocking = 1;

struct CUstream_st {
  bool captured = false;
};
using cudaStream_t = CUstream_st*;
struct cudaFuncAttributes {};
struct dim3 {
  unsigned x;
  explicit dim3(unsigned x) : x(x) {}
};

namespace fake {

inline bool capturing = false;
inline cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
inline cudaError_t malloc_error = cudaSuccess, launch_error = cudaSuccess, image = cudaSuccess;
inline int allocations = 0, launches = 0;
inline unsigned largest_grid = 0;

/// Runs a kernel; the test defines it.
void run(const void* kernel, unsigned grid, unsigned threads, void* arguments, size_t shared_bytes);

inline cudaError_t unsafe() {
  return capturing && mode != cudaStreamCaptureModeRelaxed ? cudaErrorStreamCaptureUnsupported
                                                           : cudaSuccess;
}

}  // namespace fake

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "another error";
  }
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const cudaStreamCaptureMode before = fake::mode;
  fake::mode = *mode;
  *mode = before;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : 7;  // compute capability 7.7
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return fake::unsafe() != cudaSuccess ? fake::unsafe() : fake::image;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return fake::unsafe();
}
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (fake::malloc_error != cudaSuccess) return fake::malloc_error;
  ++fake::allocations;
  *memory = std::malloc(bytes);
  return fake::unsafe();
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return stream->captured ? cudaErrorStreamCaptureUnsupported : fake::unsafe();
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  if (stream->captured) return cudaErrorStreamCaptureUnsupported;  // it would be copied in a replay
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                    size_t shared_bytes, cudaStream_t) {
  if (fake::launch_error != cudaSuccess) return fake::launch_error;
  ++fake::launches;
  if (grid.x > fake::largest_grid) fake::largest_grid = grid.x;
  fake::run(kernel, grid.x, block.x, arguments[0], shared_bytes);
  return cudaSuccess;
}
