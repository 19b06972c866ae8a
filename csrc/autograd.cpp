// The autograd node of a computation, for backends whose kernels are native. It does what
// spectral_ext/autograd.py says, without Python between the engine and the kernels; that file's own
// node serves the other backends, torch.compile and functorch.
//
// The node saves outputs through aliases with version counters of their own, since a saved output
// may be changed in place: nn.Embedding(max_norm=…) does it, and masks on `layer.weight`. The node
// reads the counters of the outputs itself, and computes a changed output again from its weight.
#include "autograd.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace spectral_ext {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Gradients = c10::List<std::optional<Tensor>>;
using Backward = std::vector<Tensor>(const Gradients&, const std::optional<Tensor>&, TensorList,
                                     const Tensor&, const Tensor&, at::IntArrayRef,
                                     at::ArrayRef<double>, const c10::List<bool>&,
                                     const c10::List<bool>&, const c10::List<bool>&,
                                     const c10::List<bool>&);

/// What the layers of a node are normalized to; see reference.py.
struct Targets {
  std::vector<int64_t> dims;
  std::vector<double> scales;
  c10::List<bool> soft, detach_sigma;
  c10::List<bool>
      widen;  // the layers whose weight is float32 and whose output is not; may be empty
};

/// The operator spectral_ext::backward of whatever device the tensors are on.
std::vector<Tensor> backward(const Gradients& grad_outputs,
                             const std::optional<Tensor>& grad_sigmas, TensorList outputs,
                             const Tensor& saved, const Tensor& sigmas, const Targets& targets,
                             const c10::List<bool>& mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spectral_ext::backward", "")
                             .typed<Backward>();
  return op.call(grad_outputs, grad_sigmas, outputs, saved, sigmas, targets.dims, targets.scales,
                 targets.soft, targets.detach_sigma, mask, targets.widen);
}

/// Whether the output is the weight as it is; see layer.h.
Tensor left_alone(const Tensor& sigma, const Targets& targets, size_t layer) {
  return targets.soft[layer] ? sigma <= targets.scales[layer] : sigma == 0;
}

/// spectral_ext/reference.py's backward: made of differentiable operations that vmap knows too.
Tensor differentiable_backward(const Tensor& grad_output, const Tensor& grad_sigma,
                               const Tensor& output, const Tensor& sigma, const Tensor& u,
                               const Tensor& v, const Targets& targets, size_t layer) {
  const auto dtype = sigma.scalar_type();
  const int64_t dim = targets.dims[layer];
  const double scale = targets.scales[layer];
  const Tensor rank_one =
      at::outer(u, v).reshape_symint(output.movedim(dim, 0).sym_sizes()).movedim(0, dim);
  Tensor total = at::zeros_like(rank_one);
  if (grad_output.defined()) {
    const Tensor grad = grad_output.to(dtype);
    const bool detach = targets.detach_sigma[layer];
    const Tensor is_left_alone = left_alone(sigma, targets, layer);
    const Tensor factor = detach ? sigma.detach() : sigma;
    total = total + grad / at::where(is_left_alone, 1, factor / scale);
    if (!detach) {
      const Tensor along = (grad * output.to(dtype)).sum() / at::where(is_left_alone, 1, sigma);
      total = total - at::where(is_left_alone, 0, along) * rank_one;
    }
  }
  if (grad_sigma.defined()) total = total + grad_sigma * rank_one;
  const bool is_wide = !targets.widen.empty() && targets.widen[layer];
  return total.to(is_wide ? at::kFloat : output.scalar_type());
}

/// A batch of gradients inside vmap, whose memory no kernel can see.
bool is_batched(const Tensor& tensor) {
  return tensor.defined() && (tensor.key_set().has(c10::DispatchKey::FuncTorchBatched) ||
                              tensor.key_set().has(c10::DispatchKey::Batched));
}

// ---- outputs that were changed in place ----

/// The versions of outputs and weights at the time of the forward, of layers that are needed.
class Versions {
 public:
  static void save(AutogradContext* ctx, TensorList outputs, TensorList weights) {
    auto* versions = new Versions;
    // The storage of a tensor without elements: compiled autograd takes no other object.
    c10::DataPtr memory(versions, versions, remove, at::kCPU);
    ctx->saved_data["versions"] = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(c10::Storage::use_byte_size_t(), 0, std::move(memory)),
        c10::DispatchKeySet(c10::DispatchKey::CPU), caffe2::TypeMeta::Make<uint8_t>());
    versions->outputs_.reserve(outputs.size());
    versions->weights_.reserve(weights.size());
    for (const Tensor& output : outputs) {
      const c10::VariableVersion& now = output.unsafeGetTensorImpl()->version_counter();
      versions->outputs_.push_back({now, current(now)});
    }
    for (const Tensor& weight : weights) {
      versions->weights_.push_back(current(weight.unsafeGetTensorImpl()->version_counter()));
    }
  }

  static const Versions& of(const AutogradContext* ctx) {
    const Tensor& tensor = ctx->saved_data.at("versions").toTensor();
    return *tensor.storage().data_ptr().cast_context<Versions>(remove);
  }

  bool is_output_changed(size_t place) const {
    const auto& [counter, version] = outputs_[place];
    return current(counter) != version;
  }

  /// The weight as it was in the forward. The graph holds it if it is a leaf.
  Tensor weight(size_t place, size_t layer) const {
    const auto node = torch::autograd::get_current_node();
    const auto* leaf = node ? dynamic_cast<const torch::autograd::AccumulateGrad*>(
                                  node->next_edge(place).function.get())
                            : nullptr;
    const bool is_leaf = leaf != nullptr && leaf->variable.defined();
    const bool is_changed =
        is_leaf &&
        current(leaf->variable.unsafeGetTensorImpl()->version_counter()) != weights_[place];
    TORCH_CHECK(
        is_leaf && !is_changed, "the normalized weight of layer ", layer,
        " was changed in place after the forward, and the backward cannot compute it again, "
        "because its weight ",
        is_changed ? "was changed in place too" : "is not a parameter",
        "; change a copy of the normalized weight, as in `layer.weight * mask`",
        is_changed ? ", or call backward() before the weight changes" : "");
    return leaf->variable.detach();
  }

 private:
  /// Tensors that were made in inference mode have no version.
  static int64_t current(const c10::VariableVersion& counter) {
    return counter.enabled() ? counter.current_version() : 0;
  }
  static void remove(void* versions) { delete static_cast<Versions*>(versions); }

  std::vector<std::pair<c10::VariableVersion, int64_t>> outputs_;  // counters that go on
  std::vector<int64_t> weights_;
};

/// The output of the forward: W · c / σ.
Tensor normalized_again(const Tensor& weight, const Tensor& output, const Tensor& sigma,
                        const Targets& targets, size_t layer) {
  const at::AutoGradMode no_graph(false);
  const Tensor divisor =
      at::where(left_alone(sigma, targets, layer), 1, sigma / targets.scales[layer]);
  return (weight.to(sigma.scalar_type()) / divisor).to(output.scalar_type());
}

/// The results of a forward. A struct, since autograd takes a list of tensors for more inputs.
struct Computation {
  TensorList outputs;
  const Tensor &saved, &sigmas;
  Targets targets;
  std::vector<bool> needed;  // the layers whose weights require a gradient
};

struct SpectralNormalize : torch::autograd::Function<SpectralNormalize> {
  /// The weights are those that are needed. Returns their normalized weights, then the sigmas.
  static variable_list forward(AutogradContext* ctx, TensorList weights,
                               const Computation& computation) {
    variable_list results, saved;
    results.reserve(weights.size() + 1);
    saved.reserve(computation.outputs.size() + 2);
    c10::List<bool> needed;
    needed.reserve(computation.needed.size());
    for (size_t i = 0; i < computation.outputs.size(); ++i) {
      saved.push_back(computation.outputs[i].variable_data());
      if (computation.needed[i]) results.push_back(computation.outputs[i].detach());
      needed.push_back(computation.needed[i]);
    }
    Versions::save(ctx, results, weights);
    results.push_back(computation.sigmas.detach());
    saved.push_back(results.back());
    saved.push_back(computation.saved);
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    const Targets& targets = computation.targets;
    ctx->saved_data["dims"] = targets.dims;
    ctx->saved_data["scales"] = targets.scales;
    ctx->saved_data["soft"] = targets.soft;
    ctx->saved_data["detach_sigma"] = targets.detach_sigma;
    ctx->saved_data["widen"] = targets.widen;
    ctx->saved_data["needed"] = std::move(needed);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& given) {
    variable_list grads = given;
    for (Tensor& grad : grads) {  // nn.Embedding(sparse=True) gives sparse gradients
      if (grad.defined() && grad.layout() != at::kStrided) grad = grad.to_dense();
    }
    variable_list outputs = ctx->get_saved_variables();
    const Tensor saved = std::move(outputs.back());
    outputs.pop_back();
    const Tensor sigmas = std::move(outputs.back());
    outputs.pop_back();
    const Targets targets{
        ctx->saved_data["dims"].toIntVector(), ctx->saved_data["scales"].toDoubleVector(),
        ctx->saved_data["soft"].toBoolList(), ctx->saved_data["detach_sigma"].toBoolList(),
        ctx->saved_data["widen"].toBoolList()};
    const c10::List<bool> needed = ctx->saved_data["needed"].toBoolList();

    const Versions& versions = Versions::of(ctx);
    const Tensor& grad_sigmas = grads.back();
    bool as_operations = at::GradMode::is_enabled() || is_batched(grad_sigmas);
    Gradients grad_outputs;
    c10::List<bool> mask;
    grad_outputs.reserve(outputs.size());
    mask.reserve(outputs.size());
    size_t next = 0;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!needed[i]) {
        grad_outputs.push_back(std::nullopt);
        mask.push_back(false);
        continue;
      }
      const Tensor& grad = grads[next];
      as_operations = as_operations || is_batched(grad);
      grad_outputs.push_back(grad.defined() ? std::make_optional(grad) : std::nullopt);
      mask.push_back(ctx->needs_input_grad(next) && (grad.defined() || grad_sigmas.defined()));
      if (mask[i] && versions.is_output_changed(next)) {
        outputs[i] = normalized_again(versions.weight(next, i), outputs[i],
                                      sigmas.select(0, static_cast<int64_t>(i)), targets, i);
      }
      ++next;
    }
    const variable_list found =
        as_operations ? operations(grads, outputs, saved, sigmas, targets, needed, mask)
                      : spectral_ext::backward(
                            grad_outputs,
                            grad_sigmas.defined() ? std::make_optional(grad_sigmas) : std::nullopt,
                            outputs, saved, sigmas, targets, mask);
    variable_list grad_weights;
    grad_weights.reserve(next + 1);
    size_t place = 0;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (needed[i]) grad_weights.push_back(mask[i] ? found[place++] : Tensor());
    }
    grad_weights.emplace_back();  // of the computation
    return grad_weights;
  }

 private:
  /// The same by torch's operations.
  static variable_list operations(const variable_list& grads, const variable_list& outputs,
                                  const Tensor& saved, const Tensor& sigmas, const Targets& targets,
                                  const c10::List<bool>& needed, const c10::List<bool>& mask) {
    variable_list found;
    const auto node = torch::autograd::get_current_node();
    c10::SymInt begin = 0;
    size_t next = 0;
    for (size_t i = 0; i < outputs.size(); ++i) {
      const c10::SymInt rows = outputs[i].sym_size(targets.dims[i]);
      const c10::SymInt columns = outputs[i].sym_numel() / rows;
      if (mask[i]) {
        const Tensor& grad_sigmas = grads.back();
        const auto place = static_cast<int64_t>(i);
        // As a function of the weight, which this node computes.
        const Tensor output =
            node ? torch::autograd::make_variable(outputs[i], {node, static_cast<uint32_t>(next)})
                 : outputs[i];
        found.push_back(differentiable_backward(
            grads[next], grad_sigmas.defined() ? grad_sigmas.select(0, place) : Tensor(), output,
            sigmas.select(0, place), saved.narrow_symint(0, begin, rows),
            saved.narrow_symint(0, begin + rows, columns), targets, i));
      }
      next += needed[i];
      begin += rows + columns;
    }
    return found;
  }
};

}  // namespace

std::tuple<std::vector<Tensor>, Tensor> attach(TensorList weights, TensorList outputs,
                                               const Tensor& saved, const Tensor& sigmas,
                                               at::IntArrayRef dims, at::ArrayRef<double> scales,
                                               const c10::List<bool>& soft,
                                               const c10::List<bool>& detach_sigma) {
  const size_t count = weights.size();
  TORCH_CHECK_VALUE(outputs.size() == count && dims.size() == count && scales.size() == count &&
                        soft.size() == count && detach_sigma.size() == count,
                    "outputs, dims, scales, soft and detach_sigma must each have ", count,
                    " entries, as weights has");
  c10::SymInt saved_size = 0;
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(outputs[i].sym_sizes() == weights[i].sym_sizes(), "the output of layer ", i,
                      " has shape ", outputs[i].sym_sizes(), ", expected ", weights[i].sym_sizes());
    TORCH_CHECK_INDEX(dims[i] >= 0 && dims[i] < weights[i].dim() && weights[i].sym_numel() > 0,
                      "dim of layer ", i, " is ", dims[i], ", out of range for its weight");
    const c10::SymInt rows = weights[i].sym_size(dims[i]);
    saved_size += rows + weights[i].sym_numel() / rows;
  }
  TORCH_CHECK_VALUE(saved.dim() == 1 && saved.sym_size(0) == saved_size && sigmas.dim() == 1 &&
                        sigmas.sym_size(0) == static_cast<int64_t>(count),
                    "saved and sigmas must have shapes [", saved_size, "] and [", count, "]");

  Computation computation{outputs,
                          saved,
                          sigmas,
                          {dims.vec(), scales.vec(), soft, detach_sigma, c10::List<bool>()},
                          {}};
  std::vector<Tensor> needed, results(outputs.begin(), outputs.end());
  needed.reserve(count);
  const auto is_wide = [&](size_t i) {
    return weights[i].scalar_type() == at::kFloat && outputs[i].scalar_type() != at::kFloat;
  };
  bool is_any_wide = false;
  for (size_t i = 0; i < count; ++i) {
    computation.needed.push_back(weights[i].requires_grad());
    if (weights[i].requires_grad()) needed.push_back(weights[i]);
    is_any_wide = is_any_wide || is_wide(i);
  }
  for (size_t i = 0; is_any_wide && i < count; ++i) computation.targets.widen.push_back(is_wide(i));
  variable_list attached = SpectralNormalize::apply(TensorList(needed), computation);
  size_t next = 0;
  for (size_t i = 0; i < count; ++i) {
    if (computation.needed[i]) results[i] = std::move(attached[next++]);
  }
  return {std::move(results), std::move(attached.back())};
}

}  // namespace spectral_ext

TORCH_LIBRARY_IMPL(spectral_ext, CompositeImplicitAutograd, m) {
  m.impl("attach", spectral_ext::attach);
}
