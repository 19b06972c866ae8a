// The Python module spectral_ext._C: what the native library was built from and with. The operators
// are not here: importing the library registers them with torch (see ops.cpp).
//
// build_config.py passes what only the build knows: SPECTRAL_EXT_TORCH, _FLAGS, _CUDA and
// _CUDA_ARCHITECTURES (the last two are empty without CUDA kernels).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/levels.h"
#include "cpu/memory.h"

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

}  // namespace
}  // namespace spectral_ext

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native library of spectral_ext.";
  m.def("build_info", &spectral_ext::build_info, "What the library was built from and with.");
  m.def("empty_cache", &spectral_ext::cpu::release_unused, "Return unused memory; how many bytes.");
}
