// The arithmetic of zerolite, written once. CPU loops and CUDA kernels include this file.
//
// Every operation is an IEEE-754 binary32 add, subtract, multiply, divide or square root, rounded by
// itself, in the order written here. Compile with -ffp-contract=off (nvcc: --fmad=false -prec-div=true
// -prec-sqrt=true -ftz=false): a fused multiply-add anywhere would make instruction sets disagree in the last bit.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define ZL_FN __host__ __device__ __forceinline__
#define ZL_METHOD ZL_FN
#else
#define ZL_FN static inline __attribute__((always_inline))
#define ZL_METHOD inline __attribute__((always_inline))
#endif

namespace zerolite {

// Hyper-parameters of one span of elements, prepared in binary64 by zerolite/update.py and rounded once.
// Field order is the column order of the `rows` tensor.
struct AdamRow {
  float grad_scale;  // product of the recorded gradient factors; negative for maximize
  float l2;          // weight_decay of Adam (coupled); 0 for AdamW
  float decay;       // 1 - lr * weight_decay of AdamW; 1 for Adam
  float mix1;        // 1 - beta1
  float beta2;
  float mix2;        // 1 - beta2
  float eps;         // eps * sqrt(1 - beta2^t)
  float step_size;   // lr * sqrt(1 - beta2^t) / (1 - beta1^t)
};
constexpr int kAdamRow = 8;

struct bf16 {
  uint16_t bits;
};

ZL_FN float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
ZL_FN uint32_t as_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

ZL_FN float widen(float x) { return x; }
ZL_FN float widen(bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

// Round to nearest even, as Tensor.to(torch.bfloat16); every NaN becomes 0x7fc0 (torch makes 0xffff of some).
ZL_FN uint16_t nearest_even(float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
ZL_FN void narrow(float& to, float x) { to = x; }
ZL_FN void narrow(bf16& to, float x) { to.bits = nearest_even(x); }

#if defined(__CUDACC__)
using half = __half;
ZL_FN float widen(half x) { return __half2float(x); }
ZL_FN void narrow(half& to, float x) { to = __float2half_rn(x); }
#else
using half = _Float16;
ZL_FN float widen(half x) { return static_cast<float>(x); }
ZL_FN void narrow(half& to, float x) { to = static_cast<half>(x); }
#endif

template <class T>
ZL_FN float round_to(float x) {
  T t;
  narrow(t, x);
  return widen(t);
}

// A NaN with low bits, as a GPU's own (0x7fffffff), would round up to a zero, in a bf16 parameter or moment, and raise the
// scale of an int8 moment's neighbours. Where one may come, it becomes this one first.
constexpr uint32_t kInfinity = 0x7f800000u, kNan = 0x7fc00000u;
ZL_FN float plain(float x) { return x == x ? x : as_float(kNan); }

// An fp32 master kept as a bf16 parameter and an int16 remainder. `hi` rounds to nearest, ties away
// from zero, so that (hi << 16) + lo is the master again for all 2^32 bit patterns.
ZL_FN float join(uint16_t hi, int16_t lo) {
  return as_float((static_cast<uint32_t>(hi) << 16) + static_cast<uint32_t>(static_cast<int32_t>(lo)));
}
ZL_FN void split(float master, uint16_t& hi, int16_t& lo) {
  const uint32_t bits = as_bits(master);
  hi = static_cast<uint16_t>((bits + 0x8000u) >> 16);
  lo = static_cast<int16_t>(bits & 0xffffu);
}

// Adam and AdamW (Kingma & Ba 2015, Loshchilov & Hutter 2019), with the bias corrections folded into
// eps and step_size so that one square root and one division remain: both averages, and then the step.
ZL_FN void adam_averages(float g, float p, float& m, float& v, const AdamRow& r) {
  g = g * r.grad_scale;
  if (r.l2 != 0.0f) g = g + r.l2 * p;
  m = m + (g - m) * r.mix1;
  v = v * r.beta2 + (g * g) * r.mix2;
}
ZL_FN float adam_step(float p, float m, float root_and_eps, const AdamRow& r) {
  return p * r.decay - r.step_size * (m / root_and_eps);
}
// `root` is the correctly rounded square root of the processor at hand: a function, or an object that is called like one.
template <class Root>
ZL_FN void adam(float g, float& p, float& m, float& v, const AdamRow& r, Root root) {
  adam_averages(g, p, m, v, r);
  p = adam_step(p, m, root(v) + r.eps, r);
}

// Sums of squares are exact: an fp32 value is M * 2^s with a 24-bit M, so M^2 is an integer. Totals are
// kept in fixed point, `kLimbs - 1` limbs of 32 bits whose unit is 2^-298, and one limb that counts
// non-finite values. Integers add in any order to the same result, however a tensor was cut.
constexpr int kLimbs = 20;

ZL_FN int square_bin(uint32_t bits) { return static_cast<int>((bits >> 23) & 0xffu); }
ZL_FN uint64_t square_of(uint32_t bits) {
  const uint32_t fraction = bits & 0x7fffffu;
  const uint32_t m = square_bin(bits) == 0 ? fraction : (fraction | 0x800000u);
  return static_cast<uint64_t>(m) * m;
}
ZL_FN int square_shift(int bin) { return bin == 0 ? 0 : 2 * bin - 2; }

}  // namespace zerolite
