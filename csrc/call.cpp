// The class torch.classes.spectral_ext.Call: a call whose arguments were unpacked once.
//
// Python's lists of tensors and numbers become C++ lists at every call of an operator, which takes
// longer than to check them. A group calls with the same tensors and settings again and again.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "autograd.h"

namespace spectral_ext {
namespace {

using at::Tensor;
using at::TensorList;

/// The operator of that name, for whatever device its tensors are on.
template <class F>
c10::TypedOperatorHandle<F> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

using Allocate = std::tuple<std::vector<Tensor>, Tensor, Tensor>(TensorList, at::IntArrayRef,
                                                                 std::optional<at::ScalarType>);
using Forward = void(TensorList, TensorList, TensorList, TensorList, const Tensor&, const Tensor&,
                     const Tensor&, at::IntArrayRef, at::IntArrayRef, at::ArrayRef<double>,
                     const c10::List<bool>&, at::ArrayRef<double>, at::ArrayRef<double>,
                     const c10::List<bool>&, bool);

class Call : public torch::CustomClassHolder {
 public:
  Call(std::vector<Tensor> weights, std::vector<Tensor> us, std::vector<Tensor> vs,
       std::vector<int64_t> dims, std::vector<int64_t> n_power_iterations, std::vector<double> eps,
       c10::List<bool> v_first, std::vector<double> tols, std::vector<double> scales,
       c10::List<bool> soft, c10::List<bool> detach_sigma)
      : weights_(std::move(weights)),
        us_(std::move(us)),
        vs_(std::move(vs)),
        dims_(std::move(dims)),
        n_power_iterations_(std::move(n_power_iterations)),
        eps_(std::move(eps)),
        v_first_(std::move(v_first)),
        tols_(std::move(tols)),
        scales_(std::move(scales)),
        soft_(std::move(soft)),
        detach_sigma_(std::move(detach_sigma)),
        reports_(std::any_of(tols_.begin(), tols_.end(), [](double tol) { return tol > 0; })) {
    auto options = at::TensorOptions().dtype(at::kFloat);
    if (!weights_.empty()) {
      const bool is_double = weights_[0].scalar_type() == at::kDouble;
      options = options.device(weights_[0].device()).dtype(is_double ? at::kDouble : at::kFloat);
    }
    no_report_ = at::empty({0}, options);
  }

  /// The results of allocate and forward_: outputs, saved vectors, σ, and how far the iterations
  /// went (empty where no layer has a tolerance). With `attached` the outputs and σ are functions
  /// of the weights. A `dtype` is that of the outputs of float32 weights.
  std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> normalize(
      bool update, bool attached, std::optional<at::ScalarType> dtype) {
    static const auto allocate = find<Allocate>("spectral_ext::allocate");
    static const auto forward = find<Forward>("spectral_ext::forward_");
    std::vector<Tensor> outputs;
    Tensor saved, sigmas, convergence;
    if (attached) check_attach(weights_, dims_, scales_, soft_, detach_sigma_);
    {
      const at::AutoDispatchBelowAutograd guard;
      std::tie(outputs, saved, sigmas) = allocate.call(weights_, dims_, dtype);
      convergence = no_report_;
      if (reports_) {
        convergence = at::empty({2 * static_cast<int64_t>(weights_.size())}, sigmas.options());
      }
      forward.call(weights_, us_, vs_, outputs, saved, sigmas, convergence, dims_,
                   n_power_iterations_, eps_, v_first_, tols_, scales_, soft_, update);
    }
    if (attached) {
      std::tie(outputs, sigmas) =
          attach(weights_, outputs, saved, sigmas, dims_, scales_, soft_, detach_sigma_);
    }
    return {std::move(outputs), std::move(saved), std::move(sigmas), std::move(convergence)};
  }

 private:
  const std::vector<Tensor> weights_, us_, vs_;
  const std::vector<int64_t> dims_, n_power_iterations_;
  const std::vector<double> eps_;
  const c10::List<bool> v_first_;
  const std::vector<double> tols_, scales_;
  const c10::List<bool> soft_, detach_sigma_;
  const bool reports_;
  Tensor no_report_;  // what a call without a tolerance is given: never written
};

}  // namespace
}  // namespace spectral_ext

TORCH_LIBRARY_FRAGMENT(spectral_ext, m) {
  using spectral_ext::Call;
  m.class_<Call>("Call")
      .def(torch::init<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>,
                       std::vector<int64_t>, std::vector<int64_t>, std::vector<double>,
                       c10::List<bool>, std::vector<double>, std::vector<double>, c10::List<bool>,
                       c10::List<bool>>())
      .def("normalize", &Call::normalize);
}
