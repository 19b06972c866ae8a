// The autograd node of a computation; see autograd.cpp.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

namespace spectral_ext {

/// The outputs and sigmas of a forward as differentiable functions of the weights. What belongs to
/// weights that require no gradient stays out of the graph.
std::tuple<std::vector<at::Tensor>, at::Tensor> attach(
    at::TensorList weights, at::TensorList outputs, const at::Tensor& saved,
    const at::Tensor& sigmas, at::IntArrayRef dims, at::ArrayRef<double> scales,
    const c10::List<bool>& soft, const c10::List<bool>& detach_sigma);

/// Checks those arguments of attach() that a forward does not check.
void check_attach(at::TensorList weights, at::IntArrayRef dims, at::ArrayRef<double> scales,
                  const c10::List<bool>& soft, const c10::List<bool>& detach_sigma);

}  // namespace spectral_ext
