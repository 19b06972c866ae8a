// The operators on CPU tensors. The schemas are in spectral_ext/ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/cpu.h"
#include "cpu/memory.h"

namespace spectral_ext {
namespace {

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

/// Torch's own thread pool. The C shim needs no OpenMP in this library, which would bring a second
/// pool.
void parallel_for(int64_t n, void (*f)(int64_t, int64_t, void*), void* context) {
  torch_parallel_for(0, n, 1, f, context);
}

/// Memory of large tensors for torch; see cpu/memory.h.
class LargeAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* block = cpu::allocate(bytes);
    return {block, block, cpu::release, at::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return cpu::release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Tensor empty_cpu_output(const Tensor& weight, at::ScalarType dtype) {
  static auto* large = new LargeAllocator;  // tensors may outlive static destructors
  const auto bytes = static_cast<size_t>(weight.numel()) * c10::elementSize(dtype);
  return empty_output(weight, dtype, bytes < cpu::kLargeBlock ? c10::GetCPUAllocator() : large);
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> allocate_cpu(TensorList weights,
                                                             at::IntArrayRef dims,
                                                             std::optional<at::ScalarType> dtype) {
  const at::AutoDispatchBelowAutograd guard;
  return allocate(weights, dims, dtype, empty_cpu_output);
}

void forward_cpu(TensorList weights, TensorList us, TensorList vs, TensorList outputs,
                 const Tensor& saved, const Tensor& sigmas, const Tensor& convergence,
                 at::IntArrayRef dims, at::IntArrayRef n_power_iterations, at::ArrayRef<double> eps,
                 const c10::List<bool>& v_first, at::ArrayRef<double> tols,
                 at::ArrayRef<double> scales, const c10::List<bool>& soft, bool update) {
  const at::AutoDispatchBelowAutograd guard;
  const std::vector<Layer> layers =
      check_forward(at::kCPU, weights, us, vs, outputs, saved, sigmas, convergence, dims,
                    n_power_iterations, eps, v_first, tols, scales, soft, update);
  cpu::forward(layers, update, threads(), parallel_for);
  if (update) bump_versions(us, vs);
}

std::vector<Tensor> backward_cpu(const c10::List<std::optional<Tensor>>& grad_outputs,
                                 const std::optional<Tensor>& grad_sigmas, TensorList outputs,
                                 const Tensor& saved, const Tensor& sigmas, at::IntArrayRef dims,
                                 at::ArrayRef<double> scales, const c10::List<bool>& soft,
                                 const c10::List<bool>& detach_sigma, const c10::List<bool>& mask,
                                 const c10::List<bool>& widen) {
  const at::AutoDispatchBelowAutograd guard;
  Gradients gradients =
      check_backward(at::kCPU, grad_outputs, grad_sigmas, outputs, saved, sigmas, dims, scales,
                     soft, detach_sigma, mask, widen, empty_cpu_output);
  cpu::backward(gradients.layers, threads(), parallel_for);
  return std::move(gradients.weights);
}

}  // namespace
}  // namespace spectral_ext

TORCH_LIBRARY_IMPL(spectral_ext, CPU, m) {
  m.impl("allocate", spectral_ext::allocate_cpu);
  m.impl("forward_", spectral_ext::forward_cpu);
  m.impl("backward", spectral_ext::backward_cpu);
}

// Torch would compute with copies of such tensors, write them back and then fail, since forward_
// returns nothing. Without that the checks see and refuse them.
TORCH_LIBRARY_IMPL(spectral_ext, Negative, m) {
  m.impl("forward_", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(spectral_ext, Conjugate, m) {
  m.impl("forward_", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(spectral_ext, ZeroTensor, m) {
  m.impl("forward_", torch::CppFunction::makeFallthrough());
}
