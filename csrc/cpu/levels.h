// The instruction levels that the kernels are compiled for, and the choice among them.
#pragma once

#include "kernels.h"

namespace spectral_ext::cpu {

struct Level {
  const char* name;
  Kernels<float> float32;
  Kernels<double> float64;
  Kernels<BFloat16> bfloat16;
  Kernels<Float16> float16;
};

extern const Level kBaseline;
extern const Level kAvx2;  // x86-64 only

/// The best level that this processor runs, chosen once. SPECTRAL_EXT_CPU_LEVEL=baseline lowers it.
const Level& level();

}  // namespace spectral_ext::cpu
