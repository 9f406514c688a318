// Picks the kernel table at run time.
#include <initializer_list>
#include <cstring>

#include "kernels.h"

namespace zerolite {
namespace {

const Kernels* find(const char* name) {
  if (strcmp(name, "baseline") == 0) return &kBaseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  if (strcmp(name, "avx2") == 0 && avx2) return &kAvx2;
  if (strcmp(name, "avx512") == 0 && avx512) return &kAvx512;
  const bool bytes = avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
  if (strcmp(name, "avx512vbmi") == 0 && bytes) return &kAvx512Vbmi;
#endif
  return nullptr;
}

const Kernels* widest() {
  for (const char* name : {"avx512vbmi", "avx512", "avx2"})
    if (const Kernels* table = find(name)) return table;
  return &kBaseline;
}

// An unknown or unsupported ZEROLITE_ISA is reported by zerolite/kernels/native.py, which calls use_isa.
const Kernels* current = widest();

}  // namespace

const Kernels& kernels() { return *current; }

bool use_isa(const char* name) {
  const Kernels* table = strcmp(name, "auto") == 0 ? widest() : find(name);
  if (table == nullptr) return false;
  current = table;
  return true;
}

}  // namespace zerolite
