#include "launch.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "kernels.h"
#include "plan.h"

namespace spectral_ext::cuda {

/// The layers of one launch, and its tables on the device.
struct Launch {
  DType dtype;
  std::vector<int32_t> layers;
  std::vector<int32_t> phases;
  int32_t tickets;
  Tables tables;
  int64_t counters;  // where they begin in the workspace
};

struct Launches {
  std::vector<Launch> launches;
  int64_t counter_bytes = 0, workspace_bytes = 0;
  int processors = 0;
};

namespace {

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here, and not by the next who asks
  throw std::runtime_error(what + " failed: " + cudaGetErrorString(error));
}

Kernels kernels_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return float64_kernels();
    case DType::kBFloat16:
      return bfloat16_kernels();
    case DType::kFloat16:
      return float16_kernels();
    default:
      return float32_kernels();
  }
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    default:
      return "float32";
  }
}

template <class Kernel>
const void* address_of(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

/// While it lives, this thread may allocate and wait although some stream is being captured.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

constexpr int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

template <class T>
int64_t bytes_of(const std::vector<T>& values) {
  return static_cast<int64_t>(values.size() * sizeof(T));
}

/// Copies a plan's tables to memory of the device that is never freed.
Tables upload(const Plan& plan) {
  const int64_t pieces = aligned(bytes_of(plan.layers));
  const int64_t tickets = pieces + aligned(bytes_of(plan.pieces));
  std::vector<char> host(tickets + bytes_of(plan.tickets));
  std::memcpy(host.data(), plan.layers.data(), bytes_of(plan.layers));
  std::memcpy(host.data() + pieces, plan.pieces.data(), bytes_of(plan.pieces));
  std::memcpy(host.data() + tickets, plan.tickets.data(), bytes_of(plan.tickets));

  void* memory = nullptr;
  check(cudaMalloc(&memory, host.size()), "allocating the tables of a plan");
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  cudaError_t error =
      cudaMemcpyAsync(memory, host.data(), host.size(), cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  check(error, "copying the tables of a plan to the device");
  const char* const device = static_cast<const char*>(memory);
  return {reinterpret_cast<const LayerTable*>(device),
          reinterpret_cast<const Piece*>(device + pieces),
          reinterpret_cast<const int32_t*>(device + tickets)};
}

std::string unsupported_by(DType dtype, int device) {
  cudaFuncAttributes attributes;
  const Kernels kernels = kernels_of(dtype);
  const cudaError_t error = cudaFuncGetAttributes(&attributes, address_of(kernels.forward));
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction) {
    return cudaGetErrorString(error);
  }
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return "its kernels are compiled for " SPECTRAL_EXT_CUDA_ARCHITECTURES
         ", and this device has compute capability " +
         std::to_string(major) + "." + std::to_string(minor) +
         "; set TORCH_CUDA_ARCH_LIST and build spectral_ext again";
}

/// What a plan depends on. Equal keys have equal plans.
using Key = std::vector<int64_t>;

int64_t bits_of(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}

void append(Key& key, const Shape& shape, DType dtype) {
  const ColumnOrder& order = shape.column_order;
  key.insert(key.end(), {shape.outer, shape.rows, shape.inner, static_cast<int64_t>(dtype)});
  key.push_back(order.count);
  key.insert(key.end(), order.size, order.size + order.count);
  key.insert(key.end(), order.stride, order.stride + order.count);
}

template <class L>
std::vector<L> pick(const std::vector<L>& layers, const std::vector<int32_t>& indices) {
  std::vector<L> picked;
  for (const int32_t i : indices) picked.push_back(layers[i]);
  return picked;
}

Places pick(const Places& places, const std::vector<int32_t>& indices) {
  return {pick(places.saved, indices), pick(places.sigma, indices)};
}

/// Makes the plans of groups of layers, and gets the kernels and the device ready for them.
template <class L, class MakePlan>
std::unique_ptr<const Launches> prepare(const std::vector<L>& layers, const Places& places,
                                        int device, const MakePlan& make_plan) {
  const RelaxedCapture relaxed;
  auto result = std::make_unique<Launches>();
  check(cudaDeviceGetAttribute(&result->processors, cudaDevAttrMultiProcessorCount, device),
        "asking for the number of processors");
  std::vector<DType> dtypes;
  for (const L& layer : layers) dtypes.push_back(layer.dtype);
  for (const std::vector<int32_t>& group : group_layers(dtypes)) {
    const DType dtype = dtypes[group.front()];
    const std::string reason = unsupported_by(dtype, device);
    if (!reason.empty()) throw std::runtime_error("the cuda backend cannot run: " + reason);
    check(cudaFuncSetAttribute(address_of(kernels_of(dtype).forward),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
          "asking for the shared memory of the forward kernel");
    const Plan plan = make_plan(pick(layers, group), pick(places, group));
    result->launches.push_back({dtype, group, plan.phases,
                                static_cast<int32_t>(plan.tickets.size()) - 1, upload(plan),
                                result->counter_bytes});
    result->counter_bytes += aligned(4 * (1 + static_cast<int64_t>(group.size())));
    result->workspace_bytes = std::max(result->workspace_bytes, plan.workspace_bytes);
  }
  return result;
}

/// Returns the launches of a key; makes them the first time. Never gives anything up.
template <class Make>
const Launches& cached(const Key& key, const Make& make) {
  static std::mutex mutex;
  static auto& cache = *new std::map<Key, std::unique_ptr<const Launches>>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = cache.find(key);
  if (found == cache.end()) found = cache.emplace(key, make()).first;
  return *found->second;
}

/// Starts a launch: all of it with counters, or phase after phase.
template <class Arguments>
void start(const Launches& all, const Launch& launch, const std::string& name, const void* kernel,
           size_t shared_bytes, Arguments& arguments, const Target& target) {
  char* const workspace = static_cast<char*>(target.workspace);
  arguments.tables = launch.tables;
  arguments.workspace = workspace + all.counter_bytes;
  const auto run = [&](int32_t first, int32_t end, int32_t* counters) {
    arguments.progress = {first, end, counters, counters == nullptr ? nullptr : counters + 1};
    void* values[] = {&arguments};
    const dim3 grid(static_cast<unsigned>(std::min(all.processors, end - first)));
    check(cudaLaunchKernel(kernel, grid, dim3(kThreads), values, shared_bytes, target.stream),
          "launching the " + name + " kernel for " + name_of(launch.dtype) + " weights");
  };
  if (target.schedule == Schedule::kTicket) {
    run(0, launch.tickets, reinterpret_cast<int32_t*>(workspace + launch.counters));
    return;
  }
  for (size_t phase = 0; phase + 1 < launch.phases.size(); ++phase) {
    run(launch.phases[phase], launch.phases[phase + 1], nullptr);
  }
}

void reset_counters(const Launches& launches, const Target& target) {
  if (target.schedule != Schedule::kTicket) return;
  check(cudaMemsetAsync(target.workspace, 0, launches.counter_bytes, target.stream),
        "setting counters to zero");
}

}  // namespace

Schedule schedule_of(const char* name) {
  const std::string given = name == nullptr ? "" : name;
  if (given.empty() || given == "ticket") return Schedule::kTicket;
  if (given == "phases") return Schedule::kPhases;
  throw std::invalid_argument("SPECTRAL_EXT_CUDA_SCHEDULE is '" + given +
                              "', expected 'ticket' or 'phases'");
}

const Launches& prepare_forward(const std::vector<Layer>& layers, bool update, int device) {
  Key key = {0, device, update};
  for (const Layer& layer : layers) {
    append(key, layer.shape, layer.dtype);
    key.insert(key.end(),
               {layer.v_first, layer.n_power_iterations, bits_of(layer.eps), bits_of(layer.tol),
                bits_of(layer.scale), layer.soft, layer.wide_vectors,
                static_cast<int64_t>(layer.output_dtype), layer.u_stride, layer.v_stride});
  }
  return cached(key, [&] {
    std::vector<Shape> shapes;
    for (const Layer& layer : layers) shapes.push_back(layer.shape);
    return prepare(layers, consecutive_places(shapes), device,
                   [&](const auto& picked, const Places& picked_places) {
                     return plan_forward(picked, picked_places, update);
                   });
  });
}

const Launches& prepare_backward(const std::vector<LayerGradient>& layers, const void* saved,
                                 const void* sigmas, int device) {
  Key key = {1, device};
  Places places;
  for (const LayerGradient& layer : layers) {
    const int64_t size = compute_size(layer.dtype);
    const auto index_in = [&](const void* begin, const void* place) {
      return (static_cast<const char*>(place) - static_cast<const char*>(begin)) / size;
    };
    places.saved.push_back(index_in(saved, layer.u));
    places.sigma.push_back(static_cast<int32_t>(index_in(sigmas, layer.sigma)));
    append(key, layer.shape, layer.dtype);
    key.insert(key.end(), {places.saved.back(), places.sigma.back(), bits_of(layer.scale),
                           layer.soft, layer.detach_sigma, static_cast<int64_t>(layer.grad_dtype)});
  }
  return cached(key, [&] {
    return prepare(layers, places, device, [&](const auto& picked, const Places& picked_places) {
      return plan_backward(picked, picked_places);
    });
  });
}

int64_t workspace_bytes(const Launches& launches) {
  return launches.counter_bytes + launches.workspace_bytes;
}

void forward(const Launches& launches, const std::vector<Layer>& layers, const Target& target) {
  reset_counters(launches, target);
  for (const Launch& launch : launches.launches) {
    ForwardArguments arguments;
    arguments.saved = layers.front().u_saved;
    arguments.sigmas = layers.front().sigma;
    arguments.residuals = layers.front().residual;
    arguments.iterations = layers.front().iterations;
    for (size_t i = 0; i < launch.layers.size(); ++i) {
      const Layer& layer = layers[launch.layers[i]];
      arguments.layers[i] = {layer.weight, layer.output, layer.u, layer.v};
    }
    start(launches, launch, "forward", address_of(kernels_of(launch.dtype).forward), kSharedBytes,
          arguments, target);
  }
}

void backward(const Launches& launches, const std::vector<LayerGradient>& layers, const void* saved,
              const void* sigmas, const void* grad_sigmas, const Target& target) {
  reset_counters(launches, target);
  for (const Launch& launch : launches.launches) {
    BackwardArguments arguments;
    arguments.saved = saved;
    arguments.sigmas = sigmas;
    arguments.grad_sigmas = grad_sigmas;
    for (size_t i = 0; i < launch.layers.size(); ++i) {
      const LayerGradient& layer = layers[launch.layers[i]];
      arguments.layers[i] = {layer.grad_output, layer.output, layer.grad_weight};
    }
    start(launches, launch, "backward", address_of(kernels_of(launch.dtype).backward),
          kReductionBytes, arguments, target);
  }
}

}  // namespace spectral_ext::cuda
