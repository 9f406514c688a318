// Adam with its moments in 8 or 16 bits, written once: CPU loops and CUDA kernels include this file.
//
// As in adam_math.h every operation is one IEEE binary32 operation or an integer operation, in the order
// written, so all instruction sets, PyTorch (zerolite/kernels/codec.py) and CUDA agree in every bit.
// docs/moments.md draws the formats and says why they are what they are.
#pragma once

#include "adam_math.h"

namespace zerolite {

constexpr int kGroup = 64;  // elements that share a scale; ALIGN of zerolite/layout.py, so that no cut divides one
constexpr uint32_t kLargest = 0x7e800000u;  // 2^126: stored second moments end here, so that roundings stay finite
constexpr int kDropped = 20;                // of 23 fraction bits of binary32, those that codes leave out
constexpr uint32_t kStep = 1u << kDropped;  // one code, in binary32 patterns

// Magnitudes relative to a group's scale: 3 fraction bits under an exponent field. Units are chosen so that a
// code is the middle of a binary32 pattern: field f is the binade [2^(f+1), 2^(f+2)) units. A scale is a byte,
// the biased binary32 exponent of the group's highest binade minus kLowest, below which subnormals would begin.
template <int fields>
struct Minifloat {
  static constexpr int32_t kTop = 127 + fields;  // biased exponent of the highest binade, in units
  static constexpr int32_t kLowest = fields + 2;
};
using MomentCode = Minifloat<16>;  // beside a sign; field 0 underflows gradually, in steps of 1/2 unit
using SquareCode = Minifloat<32>;  // code 0 is 0, and what is above 0 is at least code 1

// The scale of a group whose largest magnitude has the binary32 bits `top`. What would round above the
// highest code takes the next scale, so no code overflows.
template <class F>
ZL_FN uint8_t scale_of(uint32_t top) {
  const int32_t exponent = static_cast<int32_t>((top + (kStep - 1u)) >> 23);
  return static_cast<uint8_t>(exponent > F::kLowest ? exponent - F::kLowest : 0);
}
// Factors between values and units, powers of two.
template <class F>
ZL_FN float to_units(uint8_t scale) {
  return as_float(static_cast<uint32_t>(127 + F::kTop - F::kLowest - scale) << 23);
}
template <class F>
ZL_FN float from_units(uint8_t scale) {
  return as_float(static_cast<uint32_t>(127 - F::kTop + F::kLowest + scale) << 23);
}

// a * b + c where a * b is exact, or too small to matter: fused or not, the same bits.
ZL_FN float exact_fma(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Codes round up or down by the high bits of `dice`, so that the expectation of what is decoded is the value. Both moments
// take the same bits: what that does to the expectation of their quotient is in docs/moments.md. `at` is the bit where a
// code begins.
//
// Field 0 of a first moment has the spacing of the field above and no leading one. Moved up by half a binade it is a
// pattern like the others: y / 2 + 2, which exceeds y exactly where y lies in field 0.
template <int at = 0>
ZL_FN uint32_t encode_moment(float m, float units, uint32_t dice) {
  const uint32_t bits = as_bits(m);
  const float y = as_float(bits & 0x7fffffffu) * units, low = exact_fma(y, 0.5f, 2.0f);
  const uint32_t code = as_bits(y > low ? y : low) + (dice >> (32 - kDropped));
  return (code >> (kDropped - at) & 0x7fu << at) | (bits >> (24 - at) & 0x80u << at);
}
template <int at = 0>
ZL_FN float decode_moment(uint32_t code, float units) {
  const float y = as_float((code << (kDropped - at) & 0x07f00000u) | 128u << 23), low = exact_fma(y, 2.0f, -4.0f);
  return as_float(as_bits((y < low ? y : low) * units) | (code << (24 - at) & 0x80000000u));
}
template <int at = 0>
ZL_FN uint32_t encode_square(float v, float units, uint32_t dice) {
  const uint32_t bits = as_bits(v * units), least = (128u << 23) + kStep;
  const uint32_t y = bits == 0 ? 0u : bits > least ? bits : least;
  return (y + (dice >> (32 - kDropped))) >> (kDropped - at) & 0xffu << at;
}
// The middle of the binary32 pattern, in units, of a second moment's code: 16 bits, so a register holds twice as many.
ZL_FN uint16_t square_middle(uint16_t code) {
  return static_cast<uint16_t>(code | (code == 0 ? 0 : 128 << (23 - kDropped)));
}
ZL_FN float decode_middle(uint16_t middle, float units) {
  return as_float(static_cast<uint32_t>(middle) << kDropped) * units;
}
ZL_FN float decode_square(uint32_t code, float units) {
  return decode_middle(square_middle(static_cast<uint16_t>(code)), units);
}

// The hyper-parameters of a span, and the number of the update.
struct MomentRow {
  AdamRow adam;
  float step;
};
constexpr int kMomentRow = kAdamRow + 1;

// Dice of one element and update: a hash of its master, its gradient and the step. No position goes in, so
// they do not depend on how tensors are cut. A product carries upwards only, so the gradient's halves change places (the
// low one of a bf16 gradient is empty), and whoever takes low bits mixes high ones in.
ZL_FN uint32_t salt_of(float step) { return as_bits(step) * 0x9e3779b1u; }
ZL_FN uint32_t dice_of(float p, float g, uint32_t salt) {
  const uint32_t turned = as_bits(g) << 16 | as_bits(g) >> 16;
  return (as_bits(p) ^ salt ^ turned) * 0x85ebca6bu;
}

// bf16 of x, rounded up or down by 16 uniform bits so that the expectation is x.
ZL_FN uint32_t dithered(float x, uint32_t dice) { return (as_bits(x) + dice) >> 16; }
ZL_FN uint32_t moment_bf16(float m, uint32_t dice) { return dithered(plain(m), dice >> 16); }
// A second moment above 0 stays above 0, and below infinity.
ZL_FN uint32_t square_bf16(float v, uint32_t dice) {
  const uint32_t bits = as_bits(v) < kLargest ? as_bits(v) : kLargest;
  const uint32_t code = dithered(as_float(bits), (dice ^ dice >> 16) & 0xffffu), least = bits == 0 ? 0u : 1u;
  return code > least ? code : least;
}

}  // namespace zerolite
