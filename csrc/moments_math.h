// Adam with its moments in 8 or 16 bits, written once: CPU loops and CUDA kernels include this file.
//
// As in adam_math.h every operation is one IEEE binary32 operation or an integer operation, in the order
// written, so all instruction sets, PyTorch (zerolite/kernels/codec.py) and CUDA agree in every bit.
// docs/moments.md draws the formats and says why they are what they are.
#pragma once

#include "adam_math.h"

namespace zerolite {

constexpr uint32_t kLargest = 0x7e800000u;  // 2^126: second moments end here, so that roots stay finite
constexpr int kGroup = 64;  // elements that share a scale; ALIGN of zerolite/layout.py, so that no cut divides one

// Magnitudes relative to a group's scale: `bits` bits, of which `fraction` bits are those below the leading
// one. Units are chosen so that a code is the middle of a binary32 pattern: field f is the binade [2^(f+1),
// 2^(f+2)) units. A scale is a byte, the biased binary32 exponent of the highest binade minus kLowest.
template <int bits, int fraction, int lowest>
struct Minifloat {
  static constexpr int kFields = (1 << (bits - fraction)) - 1;  // the highest field
  static constexpr int kDropped = 23 - fraction;  // fraction bits of binary32 that rounding removes
  static constexpr uint32_t kStep = 1u << fraction;  // codes of a binade
  static constexpr uint32_t kMask = (1u << bits) - 1u;
  static constexpr int32_t kTop = 128 + kFields;  // biased exponent of the highest binade in units
  static constexpr int32_t kLowest = lowest + kFields + fraction;
};

// First moment: a sign beside 4 exponent and 3 fraction bits; field 0 underflows gradually, in steps of 1/2
// unit. kLowest keeps what is decoded above the subnormals of binary32.
#ifndef ZL_MF
#define ZL_MF 3
#define ZL_RF 4
#endif
using MomentCode = Minifloat<7, ZL_MF, 0>;
// Root of the second moment: 4 exponent and 4 fraction bits; code 0 is 0, and what is above 0 is at least
// code 1. kLowest keeps its square above the subnormals of binary32.
using RootCode = Minifloat<8, ZL_RF, 60>;

// The scale of a group whose largest magnitude has the binary32 bits `top`. What would round above the
// highest code takes the next scale, so no code overflows.
template <class F>
ZL_FN uint8_t scale_of(uint32_t top) {
  const int32_t exponent = static_cast<int32_t>((top + ((1u << F::kDropped) - 1u)) >> 23);
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

// Codes round up or down by `dice`, uniform bits, so that the expectation of what is decoded is the value.
ZL_FN uint32_t encode_moment(float m, float units, uint32_t dice) {
  const uint32_t bits = as_bits(m);
  const float y = as_float(bits & 0x7fffffffu) * units;
  const bool low = y < 4.0f;  // field 0; y + 4 has its spacing
  const float z = y + (low ? 4.0f : 0.0f);
  const uint32_t code = ((as_bits(z) + (dice >> (32 - MomentCode::kDropped))) >> MomentCode::kDropped) - (low ? MomentCode::kStep : 0u);
  return (code & MomentCode::kMask) | (bits >> 31 << 7);
}
ZL_FN float decode_moment(uint32_t code, float units) {
  const uint32_t size = code & MomentCode::kMask;
  const bool low = size < MomentCode::kStep;
  const uint32_t bits = (size << MomentCode::kDropped) + (low ? 129u << 23 : 128u << 23);
  const float y = (as_float(bits) - (low ? 4.0f : 0.0f)) * units;
  return as_float(as_bits(y) | (code >> 7 << 31));
}
ZL_FN uint32_t encode_root(float r, float units, uint32_t dice) {
  const uint32_t bits = as_bits(r * units), least = (128u << 23) + (1u << RootCode::kDropped);
  const uint32_t code = ((bits > least ? bits : least) + (dice << 16 >> (32 - RootCode::kDropped))) >> RootCode::kDropped;
  return bits == 0 ? 0u : code & RootCode::kMask;
}
ZL_FN float decode_root(uint32_t code, float units) {
  const float y = as_float((code << RootCode::kDropped) + (128u << 23)) * units;
  return code == 0 ? 0.0f : y;
}

// The hyper-parameters of a span, and the number of the update.
struct MomentRow {
  AdamRow adam;
  float step;
};
constexpr int kMomentRow = kAdamRow + 1;

// Dice of one element and update: a hash of its master, its gradient and the step. No position goes in, so
// they do not depend on how tensors are cut. The first moment takes the high bits, the second the low ones.
ZL_FN uint32_t salt_of(float step) { return as_bits(step) * 0x9e3779b1u; }
ZL_FN uint32_t dice_of(float p, float g, uint32_t salt) {
  uint32_t h = (as_bits(p) ^ salt) * 0x85ebca6bu;
  h = (h ^ (h >> 15) ^ as_bits(g)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// `adam` on the root r of the second moment, whose new root it stores: one square root, as there.
template <class Sqrt>
ZL_FN void adam_root(float g, float& p, float& m, float& r, const AdamRow& row, Sqrt root) {
  g = g * row.grad_scale;
  g = g + row.l2 * p;
  p = p * row.decay;
  m = m + (g - m) * row.mix1;
  const uint32_t v = as_bits((r * r) * row.beta2 + (g * g) * row.mix2);
  r = root(as_float(v < kLargest ? v : kLargest));
  p = p - row.step_size * (m / (r + row.eps));
}

// bf16 of x, rounded up or down by 16 uniform bits so that the expectation is x.
ZL_FN uint32_t dithered(float x, uint32_t dice) { return (as_bits(x) + dice) >> 16; }
ZL_FN uint32_t moment_bf16(float m, uint32_t dice) { return dithered(m, dice >> 16); }
// A second moment above 0 stays above 0, and below infinity.
ZL_FN uint32_t square_bf16(float v, uint32_t dice) {
  const uint32_t bits = as_bits(v) < kLargest ? as_bits(v) : kLargest;
  const uint32_t code = dithered(as_float(bits), dice & 0xffffu), least = bits == 0 ? 0u : 1u;
  return code > least ? code : least;
}

}  // namespace zerolite
