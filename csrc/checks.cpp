#include "checks.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace spectral_ext {
namespace {

DType element_type(const Tensor& tensor, const char* name, size_t layer) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, " of layer ", layer, " is ", tensor.scalar_type(),
                       "; expected float32, float64, bfloat16 or float16");
  }
}

/// How many elements lie between the first one and the end of the last.
int64_t reach(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor.numel();
  int64_t elements = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) elements += (tensor.size(d) - 1) * tensor.stride(d);
  return elements;
}

/// Checks that a kernel may follow the tensor's data pointer.
void check_memory(const Tensor& tensor, at::Device device, const char* name, size_t layer) {
  TORCH_CHECK_VALUE(tensor.device() == device, name, " of layer ", layer, " is on ",
                    tensor.device(), ", expected ", device);
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name, " of layer ", layer,
                   " must be strided, got ", tensor.layout());
  TORCH_CHECK_VALUE(!tensor.is_neg() && !tensor.is_conj(), name, " of layer ", layer,
                    " is a lazy negation or conjugation; resolve it first");
  if (tensor.numel() == 0) return;
  const auto elements = static_cast<size_t>(tensor.storage_offset() + reach(tensor));
  TORCH_CHECK_VALUE(elements * tensor.element_size() <= tensor.storage().nbytes(), name,
                    " of layer ", layer, " reaches beyond its storage (was it resized or freed?)");
}

void check_same(const Tensor& tensor, const Tensor& like, at::ScalarType dtype, const char* name,
                size_t layer) {
  check_memory(tensor, like.device(), name, layer);
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " of layer ", layer, " is ",
                   tensor.scalar_type(), ", expected ", dtype);
  TORCH_CHECK_VALUE(tensor.sizes() == like.sizes(), name, " of layer ", layer, " has shape ",
                    tensor.sizes(), ", expected ", like.sizes());
}

bool is_half(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }

void check_output(const Tensor& output, const Tensor& weight, size_t layer) {
  const at::ScalarType own = weight.scalar_type();
  const bool narrowed = own == at::kFloat && is_half(output.scalar_type());
  check_same(output, weight, narrowed ? output.scalar_type() : own, "the output", layer);
  TORCH_CHECK_VALUE(output.is_non_overlapping_and_dense(), "the output of layer ", layer,
                    " must be dense and must not overlap itself");
  TORCH_CHECK_VALUE(!narrowed || output.strides() == weight.strides(), "the output of layer ",
                    layer, " has a half type, for which it must have the strides of its weight");
}

void check_vector(const Tensor& vector, int64_t size, const Tensor& weight, const char* name,
                  size_t layer) {
  check_memory(vector, weight.device(), name, layer);
  const at::ScalarType wide = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(vector.scalar_type() == weight.scalar_type() || vector.scalar_type() == wide,
                   name, " of layer ", layer, " is ", vector.scalar_type(), ", expected ",
                   weight.scalar_type(), wide == weight.scalar_type() ? "" : " or Float");
  TORCH_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == size, name, " of layer ", layer,
                    " must have shape [", size, "], got ", vector.sizes());
  TORCH_CHECK_VALUE(size <= 1 || vector.stride(0) > 0, "the elements of ", name, " of layer ",
                    layer, " overlap in memory");
}

void check_flat(const Tensor& tensor, int64_t size, at::ScalarType dtype, at::Device device,
                const char* name) {
  TORCH_CHECK_VALUE(tensor.device() == device && tensor.layout() == at::kStrided &&
                        tensor.scalar_type() == dtype && tensor.dim() == 1 &&
                        tensor.size(0) == size && tensor.is_contiguous() && !tensor.is_neg(),
                    name, " must be a contiguous tensor on ", device, " of shape [", size,
                    "] and dtype ", dtype);
  check_memory(tensor, device, name, 0);
}

/// Refuses calls in which something that is written shares memory with anything else.
class Overlaps {
 public:
  explicit Overlaps(size_t tensors) { spans_.reserve(tensors); }

  void add(const Tensor& tensor, const char* name, size_t layer, bool written) {
    if (tensor.numel() == 0) return;
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    spans_.push_back({begin, begin + static_cast<size_t>(reach(tensor)) * tensor.element_size(),
                      name, layer, written});
  }

  void check() {
    std::sort(spans_.begin(), spans_.end(),
              [](const Span& a, const Span& b) { return a.begin < b.begin; });
    const Span *last = nullptr, *last_written = nullptr;  // those that reach furthest so far
    for (const Span& span : spans_) {
      const Span* other = span.written ? last : last_written;
      TORCH_CHECK(other == nullptr || other->end <= span.begin, other == nullptr ? "" : other->name,
                  " of layer ", other == nullptr ? 0 : other->layer, " and ", span.name,
                  " of layer ", span.layer, " overlap in memory, and one of them is written");
      if (last == nullptr || span.end > last->end) last = &span;
      if (span.written && (last_written == nullptr || span.end > last_written->end))
        last_written = &span;
    }
  }

 private:
  struct Span {
    uintptr_t begin, end;
    const char* name;
    size_t layer;
    bool written;
  };
  std::vector<Span> spans_;
};

// ---- shapes ----

/// Describes a dense tensor as outer × rows × inner with its order of columns; see layer.h.
Shape describe(const Tensor& weight, int64_t dim, size_t layer) {
  if (dim == 0 && weight.is_contiguous()) {
    return {1, weight.size(0), weight.numel() / weight.size(0), {}};
  }
  std::vector<int64_t> storage_order;
  for (int64_t d = 0; d < weight.dim(); ++d) {
    if (d == dim || weight.size(d) > 1) storage_order.push_back(d);
  }
  const bool one_row = weight.size(dim) == 1;  // its stride means nothing
  std::stable_sort(storage_order.begin(), storage_order.end(), [&](int64_t a, int64_t b) {
    if (one_row && (a == dim || b == dim)) return a == dim && b != dim;
    return weight.stride(a) > weight.stride(b);
  });
  std::vector<int64_t> place_in_v(weight.dim());
  for (int64_t d = weight.dim() - 1, stride = 1; d >= 0; --d) {
    if (d == dim) continue;
    place_in_v[d] = stride;
    stride *= weight.size(d);
  }

  Shape shape{1, weight.size(dim), 1, {}};
  bool below_rows = false;
  int count = 0;
  int64_t size[64], stride[64];
  for (const int64_t d : storage_order) {
    if (d == dim) {
      below_rows = true;
      continue;
    }
    (below_rows ? shape.inner : shape.outer) *= weight.size(d);
    if (count > 0 && stride[count - 1] == weight.size(d) * place_in_v[d]) {
      size[count - 1] *= weight.size(d);
      stride[count - 1] = place_in_v[d];
    } else {
      size[count] = weight.size(d);
      stride[count++] = place_in_v[d];
    }
  }
  if (count > 1) {  // one dimension is the identity
    TORCH_CHECK_VALUE(count <= ColumnOrder::kMaxDims, "the weight of layer ", layer, " has ", count,
                      " column dimensions in permuted order; make it contiguous");
    shape.column_order.count = count;
    std::copy_n(size, count, shape.column_order.size);
    std::copy_n(stride, count, shape.column_order.stride);
  }
  return shape;
}

void check_compute_dtype(const Tensor& weight, at::ScalarType dtype, size_t layer) {
  TORCH_CHECK_TYPE((weight.scalar_type() == at::kDouble) == (dtype == at::kDouble), "layer ", layer,
                   " is ", weight.scalar_type(), "; float64 layers need a call of their own");
}

int64_t checked_dim(const Tensor& weight, int64_t dim, size_t layer) {
  TORCH_CHECK_VALUE(weight.numel() > 0, "the weight of layer ", layer, " has no elements");
  TORCH_CHECK_INDEX(dim >= -weight.dim() && dim < weight.dim(), "dim of layer ", layer, " is ", dim,
                    ", out of range for a weight of ", weight.dim(), " dimensions");
  return dim < 0 ? dim + weight.dim() : dim;
}

void check_target(double scale, size_t layer) {
  TORCH_CHECK_VALUE(scale > 0 && std::isfinite(scale), "scale of layer ", layer, " is ", scale,
                    ", expected a positive number");
}

/// Whether a weight and its output are one tensor.
bool are_same(const Tensor& weight, const Tensor& output) {
  return weight.const_data_ptr() == output.const_data_ptr() &&
         weight.scalar_type() == output.scalar_type() && weight.strides() == output.strides() &&
         weight.sizes() == output.sizes();
}

void check_count(size_t found, size_t expected, const char* name) {
  TORCH_CHECK_VALUE(found == expected, name, " has ", found, " entries for ", expected, " layers");
}

at::ScalarType compute_dtype(TensorList weights) {
  return !weights.empty() && weights[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

Tensor empty_output(const Tensor& weight, at::ScalarType dtype, c10::Allocator* allocator) {
  if (weight.layout() != at::kStrided || !weight.is_non_overlapping_and_dense()) {
    return at::empty_like(weight, weight.options().dtype(dtype));
  }
  const auto key = weight.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  Tensor output = at::detail::empty_strided_generic(weight.sizes(), weight.strides(), allocator,
                                                    c10::DispatchKeySet(key), dtype);
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    output.fill_(std::numeric_limits<double>::quiet_NaN());  // as torch does with its own
  }
  return output;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> allocate(TensorList weights, at::IntArrayRef dims,
                                                         std::optional<at::ScalarType> dtype,
                                                         EmptyOutput* empty_output) {
  check_count(dims.size(), weights.size(), "dims");
  TORCH_CHECK_TYPE(!dtype.has_value() || is_half(*dtype), "dtype is ", dtype.value_or(at::kFloat),
                   ", expected a half type or None");
  std::vector<Tensor> outputs;
  outputs.reserve(weights.size());
  int64_t saved_size = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t rows = weights[i].size(checked_dim(weights[i], dims[i], i));
    saved_size += rows + weights[i].numel() / rows;
    const at::ScalarType own = weights[i].scalar_type();
    outputs.push_back(empty_output(weights[i], own == at::kFloat ? dtype.value_or(own) : own));
  }
  auto options = at::TensorOptions().dtype(compute_dtype(weights));
  if (!weights.empty()) options = options.device(weights[0].device());
  return {std::move(outputs), at::empty({saved_size}, options),
          at::empty({static_cast<int64_t>(weights.size())}, options)};
}

std::vector<Layer> check_forward(at::Device device, TensorList weights, TensorList us,
                                 TensorList vs, TensorList outputs, const Tensor& saved,
                                 const Tensor& sigmas, const Tensor& convergence,
                                 at::IntArrayRef dims, at::IntArrayRef n_power_iterations,
                                 at::ArrayRef<double> eps, const c10::List<bool>& v_first,
                                 at::ArrayRef<double> tols, at::ArrayRef<double> scales,
                                 const c10::List<bool>& soft, bool update) {
  const size_t count = weights.size();
  check_count(us.size(), count, "us");
  check_count(vs.size(), count, "vs");
  check_count(outputs.size(), count, "outputs");
  check_count(dims.size(), count, "dims");
  check_count(n_power_iterations.size(), count, "n_power_iterations");
  check_count(eps.size(), count, "eps");
  check_count(v_first.size(), count, "v_first");
  check_count(tols.size(), count, "tols");
  check_count(scales.size(), count, "scales");
  check_count(soft.size(), count, "soft");

  const at::ScalarType dtype = compute_dtype(weights);
  std::vector<Layer> layers(count);
  Overlaps overlaps(4 * count + 3);
  int64_t saved_size = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &weight = weights[i], &output = outputs[i];
    Layer& layer = layers[i];
    layer.dtype = element_type(weight, "the weight", i);
    check_memory(weight, device, "the weight", i);
    check_compute_dtype(weight, dtype, i);
    check_output(output, weight, i);
    layer.output_dtype = element_type(output, "the output", i);
    TORCH_CHECK_VALUE(
        n_power_iterations[i] >= 1 && n_power_iterations[i] <= std::numeric_limits<int>::max(),
        "n_power_iterations of layer ", i, " is ", n_power_iterations[i], ", expected 1 to ",
        std::numeric_limits<int>::max());
    TORCH_CHECK_VALUE(eps[i] > 0 && std::isfinite(eps[i]), "eps of layer ", i, " is ", eps[i],
                      ", expected a positive number");
    TORCH_CHECK_VALUE(tols[i] >= 0 && std::isfinite(tols[i]), "tol of layer ", i, " is ", tols[i],
                      ", expected a number that is not negative");
    check_target(scales[i], i);
    // A weight in another order than its output is copied into the output and normalized there.
    layer.shape = describe(output, checked_dim(weight, dims[i], i), i);
    check_vector(us[i], layer.shape.rows, weight, "u", i);
    check_vector(vs[i], layer.shape.columns(), weight, "v", i);
    TORCH_CHECK_TYPE(us[i].scalar_type() == vs[i].scalar_type(), "u and v of layer ", i, " are ",
                     us[i].scalar_type(), " and ", vs[i].scalar_type(), ", expected one type");
    layer.wide_vectors = us[i].scalar_type() != weight.scalar_type();
    layer.v_first = v_first[i];
    layer.n_power_iterations = static_cast<int>(n_power_iterations[i]);
    layer.eps = eps[i];
    layer.tol = tols[i];
    layer.scale = scales[i];
    layer.soft = soft[i];
    layer.u_stride = us[i].stride(0);
    layer.v_stride = vs[i].stride(0);
    saved_size += layer.shape.rows + layer.shape.columns();
    if (!are_same(weight, output)) overlaps.add(weight, "the weight", i, false);
    overlaps.add(output, "the output", i, true);
    overlaps.add(us[i], "u", i, update);
    overlaps.add(vs[i], "v", i, update);
  }
  check_flat(saved, saved_size, dtype, device, "saved");
  check_flat(sigmas, static_cast<int64_t>(count), dtype, device, "sigmas");
  const bool is_wanted = convergence.numel() > 0;
  check_flat(convergence, is_wanted ? 2 * static_cast<int64_t>(count) : 0, dtype, device,
             "convergence");
  overlaps.add(saved, "saved", 0, true);
  overlaps.add(convergence, "convergence", 0, true);
  overlaps.add(sigmas, "sigmas", 0, true);
  overlaps.check();

  char* next_saved = static_cast<char*>(saved.mutable_data_ptr());
  for (size_t i = 0; i < count; ++i) {
    Layer& layer = layers[i];
    const int64_t size = compute_size(layer.dtype);
    const bool in_place = weights[i].strides() != outputs[i].strides();
    if (in_place) outputs[i].copy_(weights[i]);
    layer.weight = (in_place ? outputs[i] : weights[i]).const_data_ptr();
    layer.output = outputs[i].mutable_data_ptr();
    layer.u = us[i].mutable_data_ptr();
    layer.v = vs[i].mutable_data_ptr();
    layer.u_saved = next_saved;
    layer.v_saved = next_saved + layer.shape.rows * size;
    next_saved += (layer.shape.rows + layer.shape.columns()) * size;
    const auto place = static_cast<int64_t>(i) * size;
    layer.sigma = static_cast<char*>(sigmas.mutable_data_ptr()) + place;
    layer.residual = layer.iterations = nullptr;
    if (is_wanted) {
      layer.residual = static_cast<char*>(convergence.mutable_data_ptr()) + place;
      layer.iterations = static_cast<char*>(layer.residual) + static_cast<int64_t>(count) * size;
    }
  }
  return layers;
}

void bump_versions(TensorList us, TensorList vs) {
  for (const TensorList vectors : {us, vs}) {
    for (const Tensor& vector : vectors) {
      if (!vector.is_inference()) vector.unsafeGetTensorImpl()->bump_version();
    }
  }
}

Gradients check_backward(at::Device device, const c10::List<std::optional<Tensor>>& grad_outputs,
                         const std::optional<Tensor>& grad_sigmas, TensorList outputs,
                         const Tensor& saved, const Tensor& sigmas, at::IntArrayRef dims,
                         at::ArrayRef<double> scales, const c10::List<bool>& soft,
                         const c10::List<bool>& detach_sigma, const c10::List<bool>& mask,
                         const c10::List<bool>& widen, EmptyOutput* empty_output) {
  const size_t count = outputs.size();
  check_count(grad_outputs.size(), count, "grad_outputs");
  check_count(dims.size(), count, "dims");
  check_count(scales.size(), count, "scales");
  check_count(soft.size(), count, "soft");
  check_count(detach_sigma.size(), count, "detach_sigma");
  check_count(mask.size(), count, "mask");
  if (!widen.empty()) check_count(widen.size(), count, "widen");
  const at::ScalarType dtype = compute_dtype(outputs);

  std::vector<Shape> shapes;
  int64_t saved_size = 0;
  for (size_t i = 0; i < count; ++i) {
    element_type(outputs[i], "the output", i);
    check_memory(outputs[i], device, "the output", i);
    check_compute_dtype(outputs[i], dtype, i);
    TORCH_CHECK_VALUE(outputs[i].is_non_overlapping_and_dense(), "the output of layer ", i,
                      " must be dense and must not overlap itself");
    shapes.push_back(describe(outputs[i], checked_dim(outputs[i], dims[i], i), i));
    saved_size += shapes[i].rows + shapes[i].columns();
    check_target(scales[i], i);
    const std::optional<Tensor> grad = grad_outputs[i];
    if (grad.has_value() && grad->defined()) {
      check_same(*grad, outputs[i], outputs[i].scalar_type(), "the gradient", i);
    }
  }
  check_flat(saved, saved_size, dtype, device, "saved");
  check_flat(sigmas, static_cast<int64_t>(count), dtype, device, "sigmas");
  Tensor grad_sigma;
  if (grad_sigmas.has_value() && grad_sigmas->defined()) {
    grad_sigma = grad_sigmas->contiguous();
    check_flat(grad_sigma, static_cast<int64_t>(count), dtype, device, "grad_sigmas");
  }

  Gradients result;
  const char* next_saved = static_cast<const char*>(saved.const_data_ptr());
  for (size_t i = 0; i < count; ++i) {
    const DType element = element_type(outputs[i], "the output", i);
    const int64_t size = compute_size(element), place = static_cast<int64_t>(i) * size;
    const char* u = next_saved;
    next_saved += (shapes[i].rows + shapes[i].columns()) * size;
    if (!mask[i]) continue;
    const at::ScalarType own = outputs[i].scalar_type();
    const bool is_wide = !widen.empty() && widen[i] && is_half(own);
    LayerGradient layer{shapes[i],
                        element,
                        is_wide ? DType::kFloat32 : element,
                        scales[i],
                        soft[i],
                        detach_sigma[i],
                        nullptr,
                        nullptr,
                        outputs[i].const_data_ptr(),
                        u,
                        u + shapes[i].rows * size,
                        nullptr,
                        nullptr};
    const std::optional<Tensor> grad = grad_outputs[i];
    if (grad.has_value() && grad->defined()) {
      result.kept.push_back(*grad);
      if (grad->strides() != outputs[i].strides())
        result.kept.back() = empty_output(outputs[i], own).copy_(*grad);
      layer.grad_output = result.kept.back().const_data_ptr();
    }
    if (grad_sigma.defined()) {
      layer.grad_sigma = static_cast<const char*>(grad_sigma.const_data_ptr()) + place;
    }
    layer.sigma = static_cast<const char*>(sigmas.const_data_ptr()) + place;
    result.weights.push_back(empty_output(outputs[i], is_wide ? at::kFloat : own));
    layer.grad_weight = result.weights.back().mutable_data_ptr();
    result.layers.push_back(layer);
  }
  if (grad_sigma.defined()) {
    result.grad_sigmas = grad_sigma.const_data_ptr();
    result.kept.push_back(std::move(grad_sigma));
  }
  return result;
}

}  // namespace spectral_ext
