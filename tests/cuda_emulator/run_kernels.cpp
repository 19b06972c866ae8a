// Runs the CUDA kernels under the emulator, for emulator.py:  run_kernels CALL MEMORY RESULTS
//
// CALL describes one call of an operator in words and numbers, in the order of read_call. MEMORY is
// an image of all tensors of the call, and places in CALL are bytes in it. Every run begins with
// that image; RESULTS gets what the runs have made of it, one image after the other.
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>

#include "cuda/plan.h"
#include "cuda/schedule.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

using namespace spectral_ext;
using namespace spectral_ext::cuda;

namespace {

/// How a launch is run; nothing of it may change a bit of the results.
struct Run {
  bool ticketed;
  unsigned grid;
  int resident;
  uint64_t seed;
};

/// A layer of either direction. Places of tensors are -1 for those that are not there.
struct CallLayer {
  DType dtype, result_dtype;  // of what is read, and of output or grad_weight
  Shape shape;
  bool wide_vectors, v_first;
  int n_power_iterations;
  double eps, tol, scale;
  bool soft, detach_sigma;
  int64_t u_stride, v_stride;
  int64_t weight, output, u, v, grad_output, grad_weight;
  int64_t saved;  // in elements
  int32_t sigma;
};

struct Call {
  bool backward, update;
  PlanOptions options;
  std::vector<Run> runs;
  std::vector<std::pair<int64_t, int64_t>> tensors;  // where they begin and end
  int64_t saved, sigmas, convergence, grad_sigmas;
  std::vector<CallLayer> layers;
};

class Reader {
 public:
  explicit Reader(const char* path) : stream_(path) {}

  template <class T>
  Reader& operator>>(T& value) {
    if (!(stream_ >> value)) throw std::runtime_error("the call is not complete");
    return *this;
  }

  Reader& operator>>(DType& dtype) {
    std::string name;
    *this >> name;
    dtype = name == "float32"    ? DType::kFloat32
            : name == "float64"  ? DType::kFloat64
            : name == "bfloat16" ? DType::kBFloat16
                                 : DType::kFloat16;
    return *this;
  }

  template <class T>
  void list(std::vector<T>& values) {
    size_t count;
    *this >> count;
    values.resize(count);
  }

 private:
  std::ifstream stream_;
};

Call read_call(const char* path) {
  Reader in(path);
  Call call;
  in >> call.backward >> call.update >> call.options.tickets >> call.options.max_columns;
  in.list(call.runs);
  for (Run& run : call.runs) in >> run.ticketed >> run.grid >> run.resident >> run.seed;
  in.list(call.tensors);
  for (auto& [begin, end] : call.tensors) in >> begin >> end;
  in >> call.saved >> call.sigmas >> call.convergence >> call.grad_sigmas;
  in.list(call.layers);
  for (CallLayer& layer : call.layers) {
    Shape& shape = layer.shape;
    ColumnOrder& order = shape.column_order;
    in >> layer.dtype >> layer.result_dtype;
    in >> shape.outer >> shape.rows >> shape.inner >> order.count;
    for (int d = 0; d < order.count; ++d) in >> order.size[d] >> order.stride[d];
    in >> layer.wide_vectors >> layer.v_first >> layer.n_power_iterations >> layer.eps;
    in >> layer.tol >> layer.scale >> layer.soft >> layer.detach_sigma;
    in >> layer.u_stride >> layer.v_stride >> layer.weight >> layer.output >> layer.u >> layer.v;
    in >> layer.grad_output >> layer.grad_weight >> layer.saved >> layer.sigma;
  }
  return call;
}

/// A copy of the image of memory, which ends as a result. AddressSanitizer lets nobody touch what
/// lies between the tensors.
class Memory {
 public:
  Memory(const std::string& image, const Call& call)
      : size_(image.size()), bytes_(new (std::align_val_t(64)) char[size_]) {
    std::memcpy(bytes_, image.data(), size_);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(bytes_, size_);
    for (const auto& [begin, end] : call.tensors) {
      __asan_unpoison_memory_region(bytes_ + begin, end - begin);
    }
#else
    static_cast<void>(call);
#endif
  }
  Memory(const Memory&) = delete;
  ~Memory() { ::operator delete[](bytes_, std::align_val_t(64)); }

  char* at(int64_t place) const { return place < 0 ? nullptr : bytes_ + place; }

  void write(std::ostream& out) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bytes_, size_);
#endif
    out.write(bytes_, static_cast<std::streamsize>(size_));
  }

 private:
  size_t size_;
  char* bytes_;
};

template <class T>
void run_kernel(const ForwardArguments& arguments) {
  forward_kernel<T>(arguments);
}
template <class T>
void run_kernel(const BackwardArguments& arguments) {
  backward_kernel<T>(arguments);
}

template <class Arguments>
void launch(const Arguments& arguments, DType dtype, const Run& run) {
  emulator::launch(run.grid, kThreads, kSharedBytes, run.resident, run.seed, [&] {
#if defined(EMULATOR_ONLY)
    static_cast<void>(dtype);
    return run_kernel<EMULATOR_ONLY>(arguments);
#else
    if (dtype == DType::kFloat32) return run_kernel<float>(arguments);
    if (dtype == DType::kFloat64) return run_kernel<double>(arguments);
    if (dtype == DType::kBFloat16) return run_kernel<BFloat16>(arguments);
    return run_kernel<Float16>(arguments);
#endif
  });
}

/// The launches of a plan: one for all tickets, or one for each phase.
template <class Arguments>
void run_plan(Arguments& arguments, const Plan& plan, DType dtype, const Run& run) {
  std::vector<int64_t> workspace(plan.workspace_bytes / 8, -1);  // NaN in any type
  std::vector<int32_t> counters(plan.layers.size() + 1);
  arguments.tables = {plan.layers.data(), plan.pieces.data(), plan.tickets.data()};
  arguments.workspace = reinterpret_cast<char*>(workspace.data());
  if (run.ticketed) {
    const auto tickets = static_cast<int32_t>(plan.tickets.size()) - 1;
    arguments.progress = {0, tickets, counters.data(), counters.data() + 1};
    return launch(arguments, dtype, run);
  }
  for (size_t phase = 0; phase + 1 < plan.phases.size(); ++phase) {
    arguments.progress = {plan.phases[phase], plan.phases[phase + 1], nullptr, nullptr};
    launch(arguments, dtype, run);
  }
}

void run_forward(const Call& call, const std::vector<const CallLayer*>& group, const Places& places,
                 const Memory& memory, const Run& run) {
  std::vector<Layer> layers;
  ForwardArguments arguments{};
  arguments.saved = memory.at(call.saved);
  arguments.sigmas = memory.at(call.sigmas);
  if (call.convergence >= 0) {
    const int64_t size = compute_size(call.layers[0].dtype);
    arguments.residuals = memory.at(call.convergence);
    arguments.iterations =
        memory.at(call.convergence + size * static_cast<int64_t>(call.layers.size()));
  }
  for (const CallLayer* layer : group) {
    arguments.layers[layers.size()] = {memory.at(layer->weight), memory.at(layer->output),
                                       memory.at(layer->u), memory.at(layer->v)};
    Layer& added = layers.emplace_back();
    added.shape = layer->shape;
    added.dtype = layer->dtype;
    added.output_dtype = layer->result_dtype;
    added.wide_vectors = layer->wide_vectors;
    added.v_first = layer->v_first;
    added.n_power_iterations = layer->n_power_iterations;
    added.eps = layer->eps;
    added.tol = layer->tol;
    added.scale = layer->scale;
    added.soft = layer->soft;
    added.u_stride = layer->u_stride;
    added.v_stride = layer->v_stride;
  }
  run_plan(arguments, plan_forward(layers, places, call.update, call.options), layers[0].dtype,
           run);
}

void run_backward(const Call& call, const std::vector<const CallLayer*>& group,
                  const Places& places, const Memory& memory, const Run& run) {
  std::vector<LayerGradient> layers;
  BackwardArguments arguments{};
  arguments.saved = memory.at(call.saved);
  arguments.sigmas = memory.at(call.sigmas);
  arguments.grad_sigmas = memory.at(call.grad_sigmas);
  for (const CallLayer* layer : group) {
    arguments.layers[layers.size()] = {memory.at(layer->grad_output), memory.at(layer->output),
                                       memory.at(layer->grad_weight)};
    LayerGradient& added = layers.emplace_back();
    added.shape = layer->shape;
    added.dtype = layer->dtype;
    added.grad_dtype = layer->result_dtype;
    added.scale = layer->scale;
    added.soft = layer->soft;
    added.detach_sigma = layer->detach_sigma;
  }
  run_plan(arguments, plan_backward(layers, places, call.options), layers[0].dtype, run);
}

void run_call(const Call& call, const Memory& memory, const Run& run) {
  std::vector<DType> dtypes;
  for (const CallLayer& layer : call.layers) dtypes.push_back(layer.dtype);
  for (const std::vector<int32_t>& indices : group_layers(dtypes)) {
    std::vector<const CallLayer*> group;
    Places places;
    for (const int32_t i : indices) {
      group.push_back(&call.layers[i]);
      places.saved.push_back(call.layers[i].saved);
      places.sigma.push_back(call.layers[i].sigma);
    }
    (call.backward ? run_backward : run_forward)(call, group, places, memory, run);
  }
}

std::string read_file(const char* path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const Call call = read_call(arguments[1]);
  const std::string image = read_file(arguments[2]);
  std::ofstream results(arguments[3], std::ios::binary);
  for (const Run& run : call.runs) {
    Memory memory(image, call);
    run_call(call, memory, run);
    memory.write(results);
  }
  return results.flush() ? 0 : 2;
}
