// The Python module spectral_ext._C: what the native library was built from and with, and the plan
// of the CUDA kernels for tests. The operators are not here: importing the library registers them
// with torch (see ops.cpp).
//
// build_config.py passes what only the build knows: SPECTRAL_EXT_TORCH, _FLAGS, _CUDA and
// _CUDA_ARCHITECTURES (the last two are empty without CUDA kernels).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/levels.h"
#include "cpu/memory.h"
#include "cuda/plan.h"

namespace py = pybind11;

namespace spectral_ext {
namespace {

std::string compiler() {
#if defined(__clang__)
  return __VERSION__;  // begins with the compiler's name
#else
  return "GCC " __VERSION__;
#endif
}

/// The instruction levels that the CPU kernels were compiled for, lowest first.
std::vector<std::string> cpu_levels() {
#if defined(__x86_64__)
  return {cpu::kBaseline.name, cpu::kAvx2.name};
#else
  return {cpu::kBaseline.name};
#endif
}

/// The architectures of TORCH_CUDA_ARCH_LIST, which separates them by semicolons or spaces.
std::vector<std::string> cuda_architectures() {
  std::string list = SPECTRAL_EXT_CUDA_ARCHITECTURES;
  for (char& character : list) {
    if (character == ';') character = ' ';
  }
  std::istringstream words(list);
  std::vector<std::string> architectures;
  for (std::string word; words >> word;) architectures.push_back(word);
  return architectures;
}

py::dict build_info() {
  const std::string cuda = SPECTRAL_EXT_CUDA;
  py::dict info;
  info["torch"] = SPECTRAL_EXT_TORCH;
  info["compiler"] = compiler();
  info["flags"] = SPECTRAL_EXT_FLAGS;
  info["cpu_levels"] = cpu_levels();
  info["cpu_level"] = cpu::instruction_level();
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::str(cuda);
  info["cuda_architectures"] = cuda_architectures();
  return info;
}

DType element_type(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("dtype is '" + name +
                              "'; expected float32, float64, bfloat16 or float16");
}

const char* name_of(cuda::Kind kind) {
  switch (kind) {
    case cuda::Kind::kRows:
      return "rows";
    case cuda::Kind::kColumns:
      return "columns";
    case cuda::Kind::kVectors:
      return "vectors";
    case cuda::Kind::kScale:
      return "scale";
    case cuda::Kind::kOrder:
      return "order";
    case cuda::Kind::kDot:
      return "dot";
    case cuda::Kind::kUpdate:
      return "update";
  }
  return "";
}

py::dict describe(const cuda::Plan& plan) {
  py::list layers, pieces;
  for (const cuda::LayerTable& table : plan.layers) {
    layers.append(py::dict(py::arg("blocks") = table.blocks, py::arg("chunks") = table.chunks,
                           py::arg("row_group") = table.row_group));
  }
  for (const cuda::Piece& piece : plan.pieces) {
    pieces.append(py::dict(py::arg("layer") = piece.layer, py::arg("kind") = name_of(piece.kind),
                           py::arg("begin") = piece.begin, py::arg("end") = piece.end,
                           py::arg("index") = piece.index, py::arg("required") = piece.required,
                           py::arg("iteration") = piece.iteration, py::arg("dots") = piece.dots,
                           py::arg("sums") = piece.sums, py::arg("initial") = piece.initial));
  }
  py::dict result;
  result["layers"] = layers;
  result["pieces"] = pieces;
  result["tickets"] = plan.tickets;
  result["phases"] = plan.phases;
  result["workspace_bytes"] = plan.workspace_bytes;
  return result;
}

using ShapeTuple = std::array<int64_t, 3>;

std::vector<Shape> to_shapes(const std::vector<ShapeTuple>& shapes) {
  if (shapes.empty() || shapes.size() > cuda::kMaxLayers) {
    throw std::invalid_argument("a launch has between 1 and " + std::to_string(cuda::kMaxLayers) +
                                " layers, got " + std::to_string(shapes.size()));
  }
  constexpr int64_t kMaxElements = int64_t{1} << 36;  // of a tensor that a device has room for
  std::vector<Shape> result;
  for (const auto& [outer, rows, inner] : shapes) {
    if (outer < 1 || rows < 1 || inner < 1) throw std::invalid_argument("sizes must be at least 1");
    if (outer > kMaxElements / rows || inner > kMaxElements / (outer * rows)) {
      throw std::invalid_argument("a layer has at most " + std::to_string(kMaxElements) +
                                  " elements");
    }
    result.push_back({outer, rows, inner, {}});
  }
  return result;
}

py::dict plan_forward(const std::vector<ShapeTuple>& shapes, const std::string& dtype, bool v_first,
                      int n_power_iterations, bool update, int tickets, int64_t max_columns) {
  const std::vector<Shape> described = to_shapes(shapes);
  if (n_power_iterations > 1000) {  // what is described here is a list that a person reads
    throw std::invalid_argument("n_power_iterations is " + std::to_string(n_power_iterations) +
                                ", expected at most 1000");
  }
  std::vector<Layer> layers;
  for (const Shape& shape : described) {
    Layer& layer = layers.emplace_back();
    layer.shape = shape;
    layer.dtype = layer.output_dtype = element_type(dtype);
    layer.v_first = v_first;
    layer.n_power_iterations = n_power_iterations;
    layer.eps = 1e-12;
    layer.scale = 1;
    layer.u_stride = layer.v_stride = 1;
  }
  return describe(cuda::plan_forward(layers, cuda::consecutive_places(described), update,
                                     {tickets, max_columns}));
}

py::dict plan_backward(const std::vector<ShapeTuple>& shapes, const std::string& dtype,
                       int tickets) {
  const std::vector<Shape> described = to_shapes(shapes);
  std::vector<LayerGradient> layers;
  for (const Shape& shape : described) {
    LayerGradient& layer = layers.emplace_back();
    layer.shape = shape;
    layer.dtype = layer.grad_dtype = element_type(dtype);
    layer.scale = 1;
  }
  return describe(
      cuda::plan_backward(layers, cuda::consecutive_places(described), {tickets, 1 << 30}));
}

/// Whether each dictionary has, under its key, the very object that is named. Asked in every
/// forward, for five objects of every layer.
bool hold(const py::tuple& dictionaries, const py::tuple& keys, const py::tuple& objects) {
  if (dictionaries.size() != keys.size() || keys.size() != objects.size()) {
    throw std::invalid_argument("the tuples are not of one length");
  }
  for (size_t i = 0; i < keys.size(); ++i) {
    const auto at = static_cast<Py_ssize_t>(i);
    PyObject* dictionary = PyTuple_GET_ITEM(dictionaries.ptr(), at);
    if (!PyDict_Check(dictionary)) throw py::type_error("the first tuple is not of dictionaries");
    PyObject* found = PyDict_GetItemWithError(dictionary, PyTuple_GET_ITEM(keys.ptr(), at));
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    PyObject* expected = PyTuple_GET_ITEM(objects.ptr(), at);
    if (found != expected && !(found == nullptr && expected == Py_None)) return false;
  }
  return true;
}

}  // namespace
}  // namespace spectral_ext

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native library of spectral_ext.";
  m.def("build_info", &spectral_ext::build_info, "What the library was built from and with.");
  m.def("empty_cache", &spectral_ext::cpu::release_unused, "Return unused memory; how many bytes.");
  m.def("hold", &spectral_ext::hold, py::arg("dictionaries"), py::arg("keys"), py::arg("objects"),
        "Whether each dictionary has this object (or, for None, nothing) under its key.");
  m.def("plan_forward", &spectral_ext::plan_forward, py::arg("shapes"),
        py::arg("dtype") = "float32", py::arg("v_first") = false, py::arg("n_power_iterations") = 1,
        py::arg("update") = true, py::arg("tickets") = 264,
        py::arg("max_columns") = int64_t{1} << 30,
        "How a CUDA launch cuts the forward of layers of shapes (outer, rows, inner).");
  m.def("plan_backward", &spectral_ext::plan_backward, py::arg("shapes"),
        py::arg("dtype") = "float32", py::arg("tickets") = 264,
        "How a CUDA launch cuts the backward of layers.");
}
