// CPU loops over moments_math.h: a part of kernels_cpu.cpp, compiled once for each instruction set.
//
// Loops are cut where the width of elements changes: a loop over bytes and floats at once is vectorised for
// the bytes, with four registers a value, and spills; short loops leave registers for constants. They are cut as well
// between the root, the division and the hash: a processor looks a few hundred instructions ahead, and a loop over the
// whole chain keeps too few elements in flight to hide how long each of these takes.
#pragma once

#include "kernels.h"
#include "moments_math.h"

namespace zerolite {
namespace {

ZL_FN float load_master(const float* p, const void*, int64_t i) { return p[i]; }
ZL_FN float load_master(const uint16_t* p, const int16_t* rest, int64_t i) { return join(p[i], rest[i]); }
ZL_FN float load_master(const half*, const float* rest, int64_t i) { return rest[i]; }

ZL_FN void store_master(float* p, void*, int64_t i, float x) { p[i] = x; }
ZL_FN void store_master(uint16_t* p, int16_t* rest, int64_t i, float x) { split(x, p[i], rest[i]); }
ZL_FN void store_master(half* p, float* rest, int64_t i, float x) {
  rest[i] = x;
  narrow(p[i], x);
}

// What both storages share, of a group whose moments are decoded: averages and masters, and then dice.
template <class P, class R>
ZL_FN void advance(const P* __restrict param, const R* __restrict rest, float* __restrict p, float* __restrict m,
                   float* __restrict v, const float* __restrict g, const AdamRow& row) {
  alignas(64) float d[kGroup];
  for (int64_t i = 0; i < kGroup; ++i) p[i] = load_master(param, rest, i);
  for (int64_t i = 0; i < kGroup; ++i) adam_averages(g[i], p[i], m[i], v[i], row);
  for (int64_t i = 0; i < kGroup; ++i) d[i] = root(v[i]) + row.eps;
  for (int64_t i = 0; i < kGroup; ++i) p[i] = adam_step(p[i], m[i], d[i], row);
}
template <class P, class R>
ZL_FN void finish(P* __restrict param, R* __restrict rest, const float* __restrict p, uint32_t* __restrict dice,
                  const float* __restrict g, uint32_t salt) {
  for (int64_t i = 0; i < kGroup; ++i) dice[i] = dice_of(p[i], g[i], salt);
  for (int64_t i = 0; i < kGroup; ++i) store_master(param, rest, i, p[i]);
}

// kGroup elements whose moments have 8 bits: decode, update, find the scales, encode.
template <class P, class R>
ZL_FN void adam_group(P* __restrict param, R* __restrict rest, uint8_t* __restrict mc, uint8_t* __restrict vc,
                      uint8_t* __restrict scales, const float* __restrict g, const MomentRow& row, uint32_t salt) {
  alignas(64) float p[kGroup], m[kGroup], s[kGroup];
  alignas(64) uint32_t a[kGroup], b[kGroup], v[kGroup];
  for (int64_t i = 0; i < kGroup; ++i) a[i] = mc[i];
  for (int64_t i = 0; i < kGroup; ++i) b[i] = vc[i];
  const float unit_m = from_units<MomentCode>(scales[0]), unit_v = from_units<SquareCode>(scales[1]);
  for (int64_t i = 0; i < kGroup; ++i) {
    m[i] = decode_moment(a[i], unit_m);
    s[i] = decode_square(b[i], unit_v);
  }
  advance(param, rest, p, m, s, g, row.adam);
  uint32_t top_m = 0, top_v = 0;
  for (int64_t i = 0; i < kGroup; ++i) {
    const uint32_t size = as_bits(m[i]) & 0x7fffffffu;
    const uint32_t square = as_bits(s[i]) < kLargest ? as_bits(s[i]) : kLargest;
    v[i] = square;
    top_m = top_m > size ? top_m : size;
    top_v = top_v > square ? top_v : square;
  }
  scales[0] = scale_of<MomentCode>(top_m);
  scales[1] = scale_of<SquareCode>(top_v);
  const float in_m = to_units<MomentCode>(scales[0]), in_v = to_units<SquareCode>(scales[1]);
  finish(param, rest, p, a, g, salt);  // work for the processor while the scales come out
  for (int64_t i = 0; i < kGroup; ++i) b[i] = encode_square(as_float(v[i]), in_v, a[i]);
  for (int64_t i = 0; i < kGroup; ++i) a[i] = encode_moment(m[i], in_m, a[i]);
  for (int64_t i = 0; i < kGroup; ++i) mc[i] = static_cast<uint8_t>(a[i]);
  for (int64_t i = 0; i < kGroup; ++i) vc[i] = static_cast<uint8_t>(b[i]);
}

// kGroup elements whose moments are bf16.
template <class P, class R>
ZL_FN void adam_group(P* __restrict param, R* __restrict rest, uint16_t* __restrict mc, uint16_t* __restrict vc,
                      const uint8_t*, const float* __restrict g, const MomentRow& row, uint32_t salt) {
  alignas(64) float p[kGroup], m[kGroup], v[kGroup];
  alignas(64) uint32_t dice[kGroup];
  for (int64_t i = 0; i < kGroup; ++i) m[i] = as_float(static_cast<uint32_t>(mc[i]) << 16);
  for (int64_t i = 0; i < kGroup; ++i) v[i] = as_float(static_cast<uint32_t>(vc[i]) << 16);
  advance(param, rest, p, m, v, g, row.adam);
  finish(param, rest, p, dice, g, salt);
  for (int64_t i = 0; i < kGroup; ++i) mc[i] = static_cast<uint16_t>(moment_bf16(m[i], dice[i]));
  for (int64_t i = 0; i < kGroup; ++i) vc[i] = static_cast<uint16_t>(square_bf16(v[i], dice[i]));
}

template <class T>
ZL_FN void copy(T* to, const T* from, int64_t n) {
  if (from != nullptr) memcpy(to, from, n * sizeof(T));
}

// Elements [0, n) of a block; a parameter's last group may be short, and what follows in it is left alone.
template <class P, class R, class C>
void adam_block(P* param, R* rest, C* m, C* v, uint8_t* scales, const float* g, const MomentRow& row, int64_t n) {
  const uint32_t salt = salt_of(row.step);
  int64_t at = 0;
  for (; at + kGroup <= n; at += kGroup)
    adam_group(param + at, rest == nullptr ? rest : rest + at, m + at, v + at, scales + at / kGroup * 2, g + at, row, salt);
  if (at == n) return;
  const int64_t left = n - at;
  P p_[kGroup] = {};
  R rest_[kGroup] = {};
  C m_[kGroup] = {}, v_[kGroup] = {};
  float g_[kGroup] = {};
  copy(p_, param + at, left);
  if (rest != nullptr) copy(rest_, rest + at, left);
  copy(m_, m + at, left);
  copy(v_, v + at, left);
  copy(g_, g + at, left);
  adam_group(p_, rest_, m_, v_, scales + at / kGroup * 2, g_, row, salt);
  copy(param + at, p_, left);
  if (rest != nullptr) copy(rest + at, rest_, left);
  copy(m + at, m_, left);
  copy(v + at, v_, left);
}

template <class C>
void adam_moments(const MomentTensors& t, const float* g, const MomentRow& row, int64_t at, int64_t n) {
  C* m = static_cast<C*>(t.m) + at;
  C* v = static_cast<C*>(t.v) + at;
  uint8_t* scales = t.scales + at / kGroup * 2;
  switch (t.dtype) {
    case Dtype::kFloat: {
      float* none = nullptr;
      return adam_block(static_cast<float*>(t.param) + at, none, m, v, scales, g, row, n);
    }
    case Dtype::kBFloat16:
      return adam_block(static_cast<uint16_t*>(t.param) + at, static_cast<int16_t*>(t.rest) + at, m, v, scales, g, row, n);
    case Dtype::kHalf:
      return adam_block(static_cast<half*>(t.param) + at, static_cast<float*>(t.rest) + at, m, v, scales, g, row, n);
  }
}

}  // namespace
}  // namespace zerolite
