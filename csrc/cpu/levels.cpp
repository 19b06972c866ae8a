#include "levels.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace spectral_ext::cpu {

#if defined(__x86_64__)
/// Older compilers do not know this name in __builtin_cpu_supports.
static bool has_f16c() {
  unsigned int a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

static const Level& choose() {
#if defined(__x86_64__)
  const char* wish = std::getenv("SPECTRAL_EXT_CPU_LEVEL");
  const bool lowered = wish != nullptr && std::strcmp(wish, "baseline") == 0;
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (has_avx2 && !lowered) return kAvx2;
#endif
  return kBaseline;
}

const Level& level() {
  static const Level& chosen = choose();
  return chosen;
}

template <>
const Kernels<float>& kernels<float>() {
  return level().float32;
}
template <>
const Kernels<double>& kernels<double>() {
  return level().float64;
}
template <>
const Kernels<BFloat16>& kernels<BFloat16>() {
  return level().bfloat16;
}
template <>
const Kernels<Float16>& kernels<Float16>() {
  return level().float16;
}

const char* instruction_level() { return level().name; }

}  // namespace spectral_ext::cpu
