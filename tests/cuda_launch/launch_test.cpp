// Calls csrc/cuda/launch.cpp as the operators do, on the emulator. Prints what is wrong.
#include "cuda/launch.h"

#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda/schedule.cuh"
#include "cuda_runtime_api.h"

namespace spectral_ext::cuda {

Kernels float32_kernels() { return {forward_kernel<float>, backward_kernel<float>}; }
Kernels bfloat16_kernels() { return {forward_kernel<BFloat16>, backward_kernel<BFloat16>}; }
Kernels float64_kernels() { return {}; }
Kernels float16_kernels() { return {}; }

}  // namespace spectral_ext::cuda

using namespace spectral_ext;
using namespace spectral_ext::cuda;

void fake::run(const void* kernel, unsigned grid, unsigned threads, void* arguments,
               size_t shared_bytes) {
  emulator::launch(grid, static_cast<int>(threads), shared_bytes, 2, 1, [&] {
    for (const Kernels& kernels : {float32_kernels(), bfloat16_kernels()}) {
      if (kernel == reinterpret_cast<const void*>(kernels.forward)) {
        kernels.forward(*static_cast<const ForwardArguments*>(arguments));
      }
      if (kernel == reinterpret_cast<const void*>(kernels.backward)) {
        kernels.backward(*static_cast<const BackwardArguments*>(arguments));
      }
    }
  });
}

namespace {

bool right = true;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("WRONG: %s\n", what.c_str());
  right = false;
}

void expect_error(const std::string& words, const std::function<void()>& function) {
  try {
    function();
    expect(false, "no error '" + words + "'");
  } catch (const std::exception& error) {
    expect(std::string(error.what()).find(words) != std::string::npos, error.what());
  }
}

template <class T>
std::vector<T> random_vector(int64_t size, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<T> values(size);
  for (T& value : values) store(&value, normal(random));
  return values;
}

/// Layers of one type, and all that a forward and a backward write.
template <class T>
struct Tensors {
  std::vector<std::vector<T>> weights, outputs, us, vs, grad_outputs, grad_weights;

  Tensors(int count, int first, std::mt19937& random) {
    for (int i = 0; i < count; ++i) {
      const int64_t rows = 2 + (first + i) % 5, columns = 3 + (first + i) % 7;
      weights.push_back(random_vector<T>(rows * columns, random));
      grad_outputs.push_back(random_vector<T>(rows * columns, random));
      us.push_back(random_vector<T>(rows, random));
      vs.push_back(random_vector<T>(columns, random));
    }
    outputs = grad_weights = weights;
  }
};

double scale_of(size_t layer) { return layer % 2 == 0 ? 1 : 3; }
bool has_tolerance(size_t layer) { return layer % 5 == 0; }

/// A call with layers of two types, more of them than a launch takes.
struct Call {
  std::mt19937 random{1};
  Tensors<float> floats{130, 0, random};
  Tensors<BFloat16> halves{3, 130, random};
  std::vector<Layer> layers;
  std::vector<LayerGradient> gradients;
  std::vector<float> saved, sigmas, convergence, grad_sigmas;
  CUstream_st stream;

  Call() {
    int64_t size = 0;
    for (const auto& u : floats.us) size += static_cast<int64_t>(u.size());
    for (const auto& v : floats.vs) size += static_cast<int64_t>(v.size());
    for (const auto& u : halves.us) size += static_cast<int64_t>(u.size());
    for (const auto& v : halves.vs) size += static_cast<int64_t>(v.size());
    saved.assign(size, NAN);
    sigmas.assign(133, NAN);
    convergence.assign(2 * sigmas.size(), -1);
    grad_sigmas = random_vector<float>(133, random);
    add(floats, DType::kFloat32);
    add(halves, DType::kBFloat16);
  }

  template <class T>
  void add(Tensors<T>& of, DType dtype) {
    for (size_t i = 0; i < of.weights.size(); ++i) {
      const auto rows = static_cast<int64_t>(of.us[i].size());
      const auto columns = static_cast<int64_t>(of.vs[i].size());
      const Layer* last = layers.empty() ? nullptr : &layers.back();
      float* u = saved.data();
      if (last != nullptr) u = static_cast<float*>(last->v_saved) + last->shape.columns();
      const size_t place = layers.size();
      float* const sigma = sigmas.data() + place;
      layers.push_back({.shape = {1, rows, columns, {}},
                        .dtype = dtype,
                        .output_dtype = dtype,
                        .wide_vectors = false,
                        .v_first = false,
                        .n_power_iterations = 1,
                        .eps = 1e-12,
                        .tol = has_tolerance(place) ? 0.5 : 0,
                        .scale = scale_of(place),
                        .soft = false,
                        .weight = of.weights[i].data(),
                        .output = of.outputs[i].data(),
                        .u = of.us[i].data(),
                        .v = of.vs[i].data(),
                        .u_stride = 1,
                        .v_stride = 1,
                        .u_saved = u,
                        .v_saved = u + rows,
                        .sigma = sigma,
                        .residual = convergence.data() + place,
                        .iterations = convergence.data() + sigmas.size() + place});
      if (layers.size() % 3 == 0) continue;  // a weight that needs no gradient
      const bool missing = layers.size() % 4 == 0;
      gradients.push_back({.shape = layers.back().shape,
                           .dtype = dtype,
                           .grad_dtype = dtype,
                           .scale = scale_of(place),
                           .soft = false,
                           .detach_sigma = false,
                           .grad_output = missing ? nullptr : of.grad_outputs[i].data(),
                           .grad_sigma = &grad_sigmas[0],
                           .output = of.outputs[i].data(),
                           .u = u,
                           .v = u + rows,
                           .sigma = sigma,
                           .grad_weight = of.grad_weights[i].data()});
    }
  }

  void forward(Schedule schedule) {
    const Launches& launches = prepare_forward(layers, true, 0);
    std::vector<double> workspace(workspace_bytes(launches) / 8 + 1, NAN);
    cuda::forward(launches, layers, {0, &stream, schedule, workspace.data()});
  }

  void backward(Schedule schedule) {
    const Launches& launches = prepare_backward(gradients, saved.data(), sigmas.data(), 0);
    std::vector<double> workspace(workspace_bytes(launches) / 8 + 1, NAN);
    cuda::backward(launches, gradients, saved.data(), sigmas.data(), grad_sigmas.data(),
                   {0, &stream, schedule, workspace.data()});
  }
};

void normalize(std::vector<double>& x) {
  double squared = 0;
  for (double value : x) squared += value * value;
  for (double& value : x) value /= std::sqrt(squared);
}

/// Compares every layer with the same in double.
template <class T>
void check(const Call& before, const Call& after, Tensors<T> Call::* member, size_t first,
           double allowed) {
  const Tensors<T>&old = before.*member, &now = after.*member;
  size_t gradient = 0;
  for (size_t i = 0; i < first; ++i) gradient += (i + 1) % 3 != 0;
  for (size_t i = 0; i < old.weights.size(); ++i) {
    const auto rows = old.us[i].size(), columns = old.vs[i].size();
    std::vector<double> w, u(rows), v, y(columns);
    for (const T& value : old.weights[i]) w.push_back(to_compute(value));
    for (const T& value : old.vs[i]) v.push_back(to_compute(value));
    for (size_t e = 0; e < w.size(); ++e) u[e / columns] += w[e] * v[e % columns];
    normalize(u);
    for (size_t e = 0; e < w.size(); ++e) y[e % columns] += w[e] * u[e / columns];
    v = y;
    normalize(v);
    double sigma = 0, along = 0;
    for (size_t c = 0; c < columns; ++c) sigma += y[c] * v[c];
    const std::string name = "layer " + std::to_string(first + i);
    expect(std::fabs(after.sigmas[first + i] / sigma - 1) < 1e-5, "sigma of " + name);
    const float residual = after.convergence[first + i];
    expect(has_tolerance(first + i) ? residual >= 0 : std::isnan(residual), "residual of " + name);
    expect(after.convergence[after.sigmas.size() + first + i] == 1, "iterations of " + name);
    const double factor = scale_of(first + i) / sigma;
    for (size_t e = 0; e < w.size(); ++e) {
      expect(std::fabs(to_compute(now.outputs[i][e]) - w[e] * factor) < 2 * allowed,
             "output of " + name);
      along += to_compute(old.grad_outputs[i][e]) * w[e] * factor;
    }
    for (size_t r = 0; r < rows; ++r) {
      expect(std::fabs(to_compute(now.us[i][r]) - u[r]) < allowed, "u of " + name);
    }
    if ((first + i + 1) % 3 == 0) continue;
    const bool missing = before.gradients[gradient++].grad_output == nullptr;
    for (size_t e = 0; e < w.size(); ++e) {
      const double grad = missing ? 0 : to_compute(old.grad_outputs[i][e]);
      const double expected =
          grad * factor + ((missing ? 0 : -along / sigma) + before.grad_sigmas[first + i]) *
                              u[e / columns] * v[e % columns];
      expect(std::fabs(to_compute(now.grad_weights[i][e]) - expected) < 10 * allowed,
             "gradient of " + name);
    }
  }
}

void check_numbers(Schedule schedule) {
  const Call before;
  Call call;
  call.forward(schedule);
  call.backward(schedule);
  check(before, call, &Call::floats, 0, 1e-5);
  check(before, call, &Call::halves, 130, 2e-2);
}

}  // namespace

int main() {
  // The first call happens in a capture: plans are made, and nothing is asked of the stream but
  // what a replay should do.
  fake::capturing = true;
  Call captured;
  captured.stream.captured = true;
  captured.forward(Schedule::kTicket);
  captured.backward(Schedule::kTicket);
  fake::capturing = false;
  expect(fake::mode == cudaStreamCaptureModeGlobal, "the thread's mode is put back");
  expect(fake::launches == 5, "for 120, 10 and 3 layers forward, for 87 and 2 backward");
  expect(fake::largest_grid <= 3, "no more CTAs than there are processors");
  const int tables = fake::allocations;
  expect(tables == 5, "tables for each launch");

  check_numbers(Schedule::kTicket);
  check_numbers(Schedule::kPhases);
  expect(fake::allocations == tables, "plans are made once");

  int others = 0;
  for (void (*change)(Layer&) : {
           +[](Layer& layer) { layer.eps = 1e-6; },
           +[](Layer& layer) { layer.tol = 0.25; },
           +[](Layer& layer) { layer.scale = 5; },
           +[](Layer& layer) { layer.soft = true; },
           +[](Layer& layer) { layer.wide_vectors = true; },
           +[](Layer& layer) { layer.output_dtype = DType::kBFloat16; },
       }) {
    Call other;
    change(other.layers[7]);
    other.forward(Schedule::kTicket);
    expect(fake::allocations == tables + 3 * ++others, "other settings have other plans");
  }
  const int forwards = fake::allocations;
  others = 0;
  for (void (*change)(LayerGradient&) : {
           +[](LayerGradient& layer) { layer.scale = 5; },
           +[](LayerGradient& layer) { layer.soft = true; },
           +[](LayerGradient& layer) { layer.detach_sigma = true; },
           +[](LayerGradient& layer) { layer.grad_dtype = DType::kBFloat16; },
       }) {
    Call other;
    change(other.gradients[7]);
    other.backward(Schedule::kTicket);
    expect(fake::allocations == forwards + 2 * ++others, "also those of the backward");
  }

  Call silent;
  for (Layer& layer : silent.layers) layer.residual = layer.iterations = nullptr;
  silent.forward(Schedule::kTicket);
  expect(silent.convergence == std::vector<float>(2 * silent.sigmas.size(), -1),
         "what is not wanted is not written");

  expect(schedule_of(nullptr) == Schedule::kTicket && schedule_of("") == Schedule::kTicket &&
             schedule_of("ticket") == Schedule::kTicket &&
             schedule_of("phases") == Schedule::kPhases,
         "names of schedules");
  expect_error("is 'random', expected 'ticket' or 'phases'", [] { schedule_of("random"); });

  Call failing;
  fake::launch_error = cudaErrorLaunchFailure;
  expect_error("launching the forward kernel for float32 weights failed: unspecified",
               [&] { failing.forward(Schedule::kTicket); });
  expect_error("launching the backward kernel for float32 weights failed",
               [&] { failing.backward(Schedule::kPhases); });
  fake::launch_error = cudaSuccess;
  failing.layers[0].eps = 1;  // a plan that is not there yet
  fake::image = cudaErrorNoKernelImageForDevice;
  expect_error("compiled for 8.0;9.0, and this device has compute capability 7.7",
               [&] { failing.forward(Schedule::kTicket); });
  fake::image = cudaSuccess;
  fake::malloc_error = cudaErrorMemoryAllocation;
  expect_error("allocating the tables of a plan failed: out of memory",
               [&] { failing.forward(Schedule::kTicket); });
  fake::malloc_error = cudaSuccess;
  failing.forward(Schedule::kTicket);  // nothing half made was kept
  return right ? 0 : 1;
}
