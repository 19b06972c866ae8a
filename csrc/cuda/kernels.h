// The kernels of each element type, as host code finds them. Each type is compiled in a file of its
// own (float32.cu, …), so that nvcc compiles them at the same time.
#pragma once

#include "tables.h"

namespace spectral_ext::cuda {

struct Kernels {
  void (*forward)(ForwardArguments);
  void (*backward)(BackwardArguments);
};

Kernels float32_kernels();
Kernels float64_kernels();
Kernels bfloat16_kernels();
Kernels float16_kernels();

}  // namespace spectral_ext::cuda
