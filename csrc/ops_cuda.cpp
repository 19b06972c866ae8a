// The operators on CUDA tensors; compiled where there is a toolkit. The schemas are in
// spectral_ext/ops.py.
//
// Of CUDA's part of torch only c10/cuda is included: ATen/cuda/CUDAContext.h wants headers that a
// toolkit without libraries lacks.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cuda/launch.h"

namespace spectral_ext {
namespace {

cuda::Schedule schedule() {
  try {
    return cuda::schedule_of(std::getenv("SPECTRAL_EXT_CUDA_SCHEDULE"));
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

/// Runs launches on the current stream, with a workspace that torch gets back at once: what uses
/// the same memory next comes later on the stream.
template <class Run>
void run_on(at::Device device, cuda::Schedule schedule, const cuda::Launches& launches,
            const Run& run) {
  const c10::DataPtr workspace =
      c10::cuda::CUDACachingAllocator::get()->allocate(cuda::workspace_bytes(launches));
  run(cuda::Target{device.index(), c10::cuda::getCurrentCUDAStream(device.index()).stream(),
                   schedule, workspace.get()});
}

Tensor empty_cuda_output(const Tensor& weight, at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(weight.device());
  return empty_output(weight, dtype, c10::cuda::CUDACachingAllocator::get());
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> allocate_cuda(TensorList weights,
                                                              at::IntArrayRef dims,
                                                              std::optional<at::ScalarType> dtype) {
  const at::AutoDispatchBelowAutograd guard;
  return allocate(weights, dims, dtype, empty_cuda_output);
}

void forward_cuda(TensorList weights, TensorList us, TensorList vs, TensorList outputs,
                  const Tensor& saved, const Tensor& sigmas, const Tensor& convergence,
                  at::IntArrayRef dims, at::IntArrayRef n_power_iterations,
                  at::ArrayRef<double> eps, const c10::List<bool>& v_first,
                  at::ArrayRef<double> tols, at::ArrayRef<double> scales,
                  const c10::List<bool>& soft, bool update) {
  const at::AutoDispatchBelowAutograd guard;
  const at::Device device = saved.device();
  TORCH_CHECK_VALUE(device.is_cuda(), "saved is on ", device, ", expected a CUDA device");
  const c10::cuda::CUDAGuard device_guard(device);
  const cuda::Schedule chosen = schedule();
  const std::vector<Layer> layers =
      check_forward(device, weights, us, vs, outputs, saved, sigmas, convergence, dims,
                    n_power_iterations, eps, v_first, tols, scales, soft, update);
  if (layers.empty()) return;
  const cuda::Launches& launches = cuda::prepare_forward(layers, update, device.index());
  run_on(device, chosen, launches,
         [&](const cuda::Target& target) { cuda::forward(launches, layers, target); });
  if (update) bump_versions(us, vs);
}

std::vector<Tensor> backward_cuda(const c10::List<std::optional<Tensor>>& grad_outputs,
                                  const std::optional<Tensor>& grad_sigmas, TensorList outputs,
                                  const Tensor& saved, const Tensor& sigmas, at::IntArrayRef dims,
                                  at::ArrayRef<double> scales, const c10::List<bool>& soft,
                                  const c10::List<bool>& detach_sigma, const c10::List<bool>& mask,
                                  const c10::List<bool>& widen) {
  const at::AutoDispatchBelowAutograd guard;
  const at::Device device = saved.device();
  TORCH_CHECK_VALUE(device.is_cuda(), "saved is on ", device, ", expected a CUDA device");
  const c10::cuda::CUDAGuard device_guard(device);
  const cuda::Schedule chosen = schedule();
  Gradients gradients =
      check_backward(device, grad_outputs, grad_sigmas, outputs, saved, sigmas, dims, scales, soft,
                     detach_sigma, mask, widen, empty_cuda_output);
  if (gradients.layers.empty()) return {};
  const void *const u = saved.const_data_ptr(), *const sigma = sigmas.const_data_ptr();
  const cuda::Launches& launches =
      cuda::prepare_backward(gradients.layers, u, sigma, device.index());
  run_on(device, chosen, launches, [&](const cuda::Target& target) {
    cuda::backward(launches, gradients.layers, u, sigma, gradients.grad_sigmas, target);
  });
  return std::move(gradients.weights);
}

}  // namespace
}  // namespace spectral_ext

TORCH_LIBRARY_IMPL(spectral_ext, CUDA, m) {
  m.impl("allocate", spectral_ext::allocate_cuda);
  m.impl("forward_", spectral_ext::forward_cuda);
  m.impl("backward", spectral_ext::backward_cuda);
}
