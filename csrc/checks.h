// From the tensors of an operator's call to the plain structs of the kernels, on any device.
//
// Nothing is written before all checks have passed, and no argument that Python can build may lead
// to undefined behaviour: sizes, strides, dtypes, devices, storage bounds and overlaps are all
// looked at here.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "layer.h"

namespace spectral_ext {

using at::Tensor;
using at::TensorList;

/// Allocates a tensor like a dense weight, of that dtype and in memory of that allocator.
Tensor empty_output(const Tensor& weight, at::ScalarType dtype, c10::Allocator* allocator);

using EmptyOutput = Tensor(const Tensor& weight, at::ScalarType dtype);

/// Outputs, saved vectors and sigmas for a forward. The outputs of float32 weights have `dtype`, if
/// one is given: a half type.
std::tuple<std::vector<Tensor>, Tensor, Tensor> allocate(TensorList weights, at::IntArrayRef dims,
                                                         std::optional<at::ScalarType> dtype,
                                                         EmptyOutput* empty_output);

/// The layers of a forward. A weight in another order than its output is copied there. An output
/// may be the weight itself, and that of a dense float32 weight may have a half type.
std::vector<Layer> check_forward(at::Device device, TensorList weights, TensorList us,
                                 TensorList vs, TensorList outputs, const Tensor& saved,
                                 const Tensor& sigmas, const Tensor& convergence,
                                 at::IntArrayRef dims, at::IntArrayRef n_power_iterations,
                                 at::ArrayRef<double> eps, const c10::List<bool>& v_first,
                                 at::ArrayRef<double> tols, at::ArrayRef<double> scales,
                                 const c10::List<bool>& soft, bool update);

/// Tells autograd that the vectors were written, as a stock in-place operation would.
void bump_versions(TensorList us, TensorList vs);

struct Gradients {
  std::vector<LayerGradient> layers;
  std::vector<Tensor> kept;           // what the layers point to besides the arguments
  const void* grad_sigmas = nullptr;  // of all layers of the forward; null: zeros
  std::vector<Tensor> weights;        // the result
};

/// The layers of a backward for which `mask` is true; `empty_output` allocates their gradients. A
/// gradient is float32 where `widen` is true and the output has a half type; an empty list is
/// false.
Gradients check_backward(at::Device device, const c10::List<std::optional<Tensor>>& grad_outputs,
                         const std::optional<Tensor>& grad_sigmas, TensorList outputs,
                         const Tensor& saved, const Tensor& sigmas, at::IntArrayRef dims,
                         at::ArrayRef<double> scales, const c10::List<bool>& soft,
                         const c10::List<bool>& detach_sigma, const c10::List<bool>& mask,
                         const c10::List<bool>& widen, EmptyOutput* empty_output);

}  // namespace spectral_ext
