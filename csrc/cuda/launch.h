// Starts the kernels for a list of layers. Plain structs: no torch, and CUDA only as two opaque
// names.
//
// Plans and their tables on the device are made once for each list of shapes, strides, dtypes and
// settings, and kept for the life of the process: a captured CUDA graph may refer to them for as
// long. A later call looks its plan up, sets the counters to zero, and launches.
//
// All of it may happen while the current stream is captured in a CUDA graph, also for the first
// time: tables are uploaded on a stream of their own.
#pragma once

#include <cstdint>
#include <vector>

#include "../layer.h"

struct CUstream_st;

namespace spectral_ext::cuda {

/// The two ways to run the same pieces, with the same bits; see schedule.cuh.
enum class Schedule { kTicket, kPhases };

/// Reads the name of a schedule, as SPECTRAL_EXT_CUDA_SCHEDULE has it. No name is the default.
/// Throws std::invalid_argument.
Schedule schedule_of(const char* name);

/// Where a call runs. The device must be the current one; the workspace is aligned to 256 bytes.
struct Target {
  int device;
  CUstream_st* stream;
  Schedule schedule;
  void* workspace;
};

/// The launches of a call; opaque, and never destroyed.
struct Launches;

/// The plan of layers whose u, v and σ lie one after the other, as in a call of the operator.
/// Throws std::runtime_error, also where the kernels were not compiled for the device.
const Launches& prepare_forward(const std::vector<Layer>& layers, bool update, int device);

/// The plan of some layers of a forward: their u, v and sigma say which.
const Launches& prepare_backward(const std::vector<LayerGradient>& layers, const void* saved,
                                 const void* sigmas, int device);

int64_t workspace_bytes(const Launches& launches);

/// Throws std::runtime_error, which names the kernel, if a launch fails.
void forward(const Launches& launches, const std::vector<Layer>& layers, const Target& target);
void backward(const Launches& launches, const std::vector<LayerGradient>& layers, const void* saved,
              const void* sigmas, const void* grad_sigmas, const Target& target);

}  // namespace spectral_ext::cuda
