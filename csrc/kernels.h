// The table of CPU kernels. One source, kernels_cpu.cpp, is compiled once for each instruction set;
// dispatch.cpp picks a table at run time. Kernels take pointers, counts and rows: no torch, no
// allocation, no globals, no thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adam_math.h"
#include "moments_math.h"

namespace zerolite {

enum class Dtype : int { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

// N tensors of one dtype whose elementwise sum, in this order, is meant.
struct Sources {
  const void* const* data;
  int count;
  Dtype dtype;
  float mean;  // factor of the sum, 1 / world size; the product is rounded to `dtype`
};

// What an update reads and writes. `rest` is the int16 remainder of a bf16 parameter, the fp32 master
// of an fp16 parameter, and null for an fp32 parameter.
struct AdamTensors {
  void* param;
  void* rest;
  float* m;
  float* v;
  Dtype dtype;
};

// Elements [start, stop) of a packed tensor: a copy of those at `from`, or 0 where that is null.
struct Part {
  int64_t start, stop;
  const void* from;
};

// The same with stored moments: bytes with two scales a group, or bf16.
struct MomentTensors {
  void* param;
  void* rest;
  void* m;
  void* v;
  uint8_t* scales;  // first moment's, second moment's, for each group of kGroup elements; unused by bf16
  Dtype dtype;
  bool bytes;
};

struct Kernels {
  const char* name;
  // Elements [start, stop) of every tensor.
  void (*reduce_adam)(const AdamTensors&, const Sources&, const AdamRow&, int64_t start, int64_t stop);
  // `start` is a multiple of kGroup.
  void (*reduce_adam_moments)(const MomentTensors&, const Sources&, const MomentRow&, int64_t start, int64_t stop);
  // `past`: by stores that leave the caches as they are.
  void (*reduce)(void* out, Dtype out_dtype, bool accumulate, bool past, const Sources&, int64_t start, int64_t stop);
  // limbs[kLimbs] += exact sum of squares of the average of elements [start, stop).
  void (*square_sum)(int64_t* limbs, const Sources&, int64_t start, int64_t stop);
  // reduce without accumulation, and square_sum of what it writes, in one pass.
  void (*reduce_squares)(void* out, Dtype out_dtype, bool past, int64_t* limbs, const Sources&, int64_t start, int64_t stop);
  // True where an element in [start, stop) is NaN or its magnitude is `limit` or more.
  bool (*exceeds)(const void* src, Dtype dtype, float limit, int64_t start, int64_t stop);
  // Copies n elements and answers as `exceeds`; `past` as above.
  bool (*copy)(void* to, const void* from, Dtype dtype, float limit, int64_t n, bool past);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vbmi;  // and GFNI: Ice Lake, Zen 4 and later
#endif

// The table in use: ZEROLITE_ISA=baseline|avx2|avx512|avx512vbmi, else the widest that the processor has.
const Kernels& kernels();
// Forces a table (tests); returns false where the processor lacks it or the name is unknown.
bool use_isa(const char* name);

}  // namespace zerolite
