// CPU loops over moments_math.h: a part of kernels_cpu.cpp, compiled once for each instruction set. With AVX2,
// int8 moments of bf16 parameters by bf16 gradients are in moments_wide.h.
//
// Loops are cut where the width of elements changes: a loop over bytes and floats at once is vectorised for
// the bytes, with four registers a value, and spills; short loops leave registers for constants.
//
// Two things keep the processor busy:
//
// - A group lies in halves, its even elements and then its odd ones. A pair of 16-bit elements is one
//   32-bit word there, so that reading and writing are shifts and masks in place of shuffles.
// - Two groups are under way. A processor looks a few hundred instructions ahead, less than a group; so the
//   codes of one group are written between the roots and the quotients of the next.
#pragma once

#include "ahead_cpu.h"
#include "half_cpu.h"
#include "moments_math.h"

namespace zerolite {
namespace {

#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first element of a pair is the low half of its word");
#endif

constexpr int64_t kPairs = kGroup / 2;

// Whether groups lie in halves. fp32 masters take shuffles for that, which codes alone are worth on AVX2 only.
#if defined(__AVX2__) && !defined(__AVX512F__)
template <class P>
constexpr bool kHalves = true;
#else
template <class P>
constexpr bool kHalves = false;
template <>
inline constexpr bool kHalves<uint16_t> = true;
#endif

// Pair i of elements of 16 bits, or of codes.
template <class T>
ZL_FN uint32_t pair(const T* p, int64_t i) {
  static_assert(sizeof(T) == 2);
  uint32_t w;
  memcpy(&w, p + 2 * i, 4);
  return w;
}
ZL_FN uint16_t pair(const uint8_t* p, int64_t i) {
  uint16_t w;
  memcpy(&w, p + 2 * i, 2);
  return w;
}
template <class T, class W>
ZL_FN void set_pair(T* p, int64_t i, W w) {
  static_assert(sizeof(W) == 2 * sizeof(T));
  memcpy(p + 2 * i, &w, sizeof w);
}

// kGroup gradients in halves.
ZL_FN void halve(float* __restrict to, const float* __restrict from) {
  for (int64_t i = 0; i < kPairs; ++i) {
    to[i] = from[2 * i];
    to[kPairs + i] = from[2 * i + 1];
  }
}
ZL_FN void halve(float* __restrict to, const bf16* __restrict from) {
  for (int64_t i = 0; i < kPairs; ++i) {
    const uint32_t w = pair(from, i);
    to[i] = as_float(w << 16);
    to[kPairs + i] = as_float(w & 0xffff0000u);
  }
}

template <bool halves>
ZL_FN void load_floats(float* __restrict to, const float* __restrict from) {
  if constexpr (halves)
    halve(to, from);
  else
    for (int64_t i = 0; i < kGroup; ++i) to[i] = from[i];
}
template <bool halves>
ZL_FN void store_floats(float* __restrict to, const float* __restrict from) {
  if constexpr (halves)
    for (int64_t i = 0; i < kPairs; ++i) {
      to[2 * i] = from[i];
      to[2 * i + 1] = from[kPairs + i];
    }
  else
    for (int64_t i = 0; i < kGroup; ++i) to[i] = from[i];
}

ZL_FN void load_master(float* __restrict p, const float* param, const float*) { load_floats<kHalves<float>>(p, param); }
ZL_FN void load_master(float* __restrict p, const half*, const float* rest) { load_floats<kHalves<half>>(p, rest); }
ZL_FN void load_master(float* __restrict p, const uint16_t* __restrict param, const int16_t* __restrict rest) {
  for (int64_t i = 0; i < kPairs; ++i) {  // as join()
    const uint32_t hi = pair(param, i), lo = pair(rest, i);
    p[i] = as_float((hi << 16) + static_cast<uint32_t>(static_cast<int32_t>(lo << 16) >> 16));
    p[kPairs + i] = as_float((hi & 0xffff0000u) + static_cast<uint32_t>(static_cast<int32_t>(lo) >> 16));
  }
}
ZL_FN void store_master(float* param, float*, const float* __restrict p) { store_floats<kHalves<float>>(param, p); }
ZL_FN void store_master(half* __restrict param, float* __restrict rest, const float* __restrict p) {
  store_floats<kHalves<half>>(rest, p);
  const float* const natural = kHalves<half> ? rest : p;
  narrow_all(param, natural, kGroup);
}
ZL_FN void store_master(uint16_t* __restrict param, int16_t* __restrict rest, const float* __restrict p) {
  for (int64_t i = 0; i < kPairs; ++i) {  // as split()
    const uint32_t a = as_bits(p[i]), b = as_bits(p[kPairs + i]);
    set_pair(param, i, (a + 0x8000u) >> 16 | ((b + 0x8000u) & 0xffff0000u));
    set_pair(rest, i, (a & 0xffffu) | b << 16);
  }
}

template <bool halves>
ZL_FN void decode(float* __restrict m, float* __restrict v, const uint8_t* __restrict mc, const uint8_t* __restrict vc,
                  const uint8_t* scales) {
  alignas(64) uint32_t a[kGroup];
  alignas(64) uint16_t b[kGroup];
  const float unit_m = from_units<MomentCode>(scales[0]), unit_v = from_units<SquareCode>(scales[1]);
  if constexpr (halves) {
    for (int64_t i = 0; i < kPairs; ++i) a[i] = pair(mc, i);
    for (int64_t i = 0; i < kPairs; ++i) {
      b[i] = square_middle(pair(vc, i) & 0xff);
      b[kPairs + i] = square_middle(pair(vc, i) >> 8);
    }
    for (int64_t i = 0; i < kPairs; ++i) {
      m[i] = decode_moment(a[i], unit_m);
      m[kPairs + i] = decode_moment<8>(a[i], unit_m);
    }
  } else {
    for (int64_t i = 0; i < kGroup; ++i) a[i] = mc[i];
    for (int64_t i = 0; i < kGroup; ++i) b[i] = square_middle(vc[i]);
    for (int64_t i = 0; i < kGroup; ++i) m[i] = decode_moment(a[i], unit_m);
  }
  for (int64_t i = 0; i < kGroup; ++i) v[i] = decode_middle(b[i], unit_v);
}
template <bool halves>
ZL_FN void decode(float* __restrict m, float* __restrict v, const uint16_t* __restrict mc,
                  const uint16_t* __restrict vc, const uint8_t*) {
  if constexpr (halves) {
    for (int64_t i = 0; i < kPairs; ++i) {
      m[i] = as_float(pair(mc, i) << 16);
      m[kPairs + i] = as_float(pair(mc, i) & 0xffff0000u);
    }
    for (int64_t i = 0; i < kPairs; ++i) {
      v[i] = as_float(pair(vc, i) << 16);
      v[kPairs + i] = as_float(pair(vc, i) & 0xffff0000u);
    }
  } else {
    for (int64_t i = 0; i < kGroup; ++i) m[i] = as_float(static_cast<uint32_t>(mc[i]) << 16);
    for (int64_t i = 0; i < kGroup; ++i) v[i] = as_float(static_cast<uint32_t>(vc[i]) << 16);
  }
}

// What moments of a group become before they are encoded, where one is NaN or past the largest (rare).
ZL_FN void make_plain(float* __restrict m) {
  for (int64_t i = 0; i < kGroup; ++i) m[i] = plain(m[i]);
}
ZL_FN void end_at_largest(float* __restrict v) {
  for (int64_t i = 0; i < kGroup; ++i) v[i] = as_float(as_bits(v[i]) < kLargest ? as_bits(v[i]) : kLargest);
}

// Scales of updated moments. The last argument says that moments are bytes.
ZL_FN void set_scales(float* __restrict m, float* __restrict v, uint8_t* scales, const uint8_t*) {
  uint32_t top_m = 0, top_v = 0;
  for (int64_t i = 0; i < kGroup; ++i) {
    const uint32_t size = as_bits(m[i]) & 0x7fffffffu, square = as_bits(v[i]);
    top_m = top_m > size ? top_m : size;
    top_v = top_v > square ? top_v : square;
  }
  if (top_m > kInfinity) make_plain(m), top_m = kNan;
  if (top_v > kLargest) end_at_largest(v), top_v = kLargest;
  scales[0] = scale_of<MomentCode>(top_m);
  scales[1] = scale_of<SquareCode>(top_v);
}
ZL_FN void set_scales(float*, float*, uint8_t*, const uint16_t*) {}

// Stores u32 codes: kGroup of them, or kPairs pairs.
template <bool halves>
ZL_FN void store_codes(uint8_t* __restrict to, const uint32_t* __restrict codes) {
  if constexpr (halves)
    for (int64_t i = 0; i < kPairs; ++i) set_pair(to, i, static_cast<uint16_t>(codes[i]));
  else
    for (int64_t i = 0; i < kGroup; ++i) to[i] = static_cast<uint8_t>(codes[i]);
}
template <bool halves>
ZL_FN void encode_m(uint8_t* __restrict to, const float* __restrict m, const uint32_t* __restrict dice,
                    const uint8_t* scales) {
  alignas(64) uint32_t a[kGroup];
  const float in_m = to_units<MomentCode>(scales[0]);
  if constexpr (halves)
    for (int64_t i = 0; i < kPairs; ++i)
      a[i] = encode_moment(m[i], in_m, dice[i]) | encode_moment<8>(m[kPairs + i], in_m, dice[kPairs + i]);
  else
    for (int64_t i = 0; i < kGroup; ++i) a[i] = encode_moment(m[i], in_m, dice[i]);
  store_codes<halves>(to, a);
}
template <bool halves>
ZL_FN void encode_v(uint8_t* __restrict to, const float* __restrict v, const uint32_t* __restrict dice,
                    const uint8_t* scales) {
  alignas(64) uint32_t a[kGroup];
  const float in_v = to_units<SquareCode>(scales[1]);
  if constexpr (halves)
    for (int64_t i = 0; i < kPairs; ++i)
      a[i] = encode_square(v[i], in_v, dice[i]) | encode_square<8>(v[kPairs + i], in_v, dice[kPairs + i]);
  else
    for (int64_t i = 0; i < kGroup; ++i) a[i] = encode_square(v[i], in_v, dice[i]);
  store_codes<halves>(to, a);
}
template <bool halves>
ZL_FN void encode_m(uint16_t* __restrict to, const float* __restrict m, const uint32_t* __restrict dice,
                    const uint8_t*) {
  if constexpr (halves)
    for (int64_t i = 0; i < kPairs; ++i)
      set_pair(to, i, moment_bf16(m[i], dice[i]) | moment_bf16(m[kPairs + i], dice[kPairs + i]) << 16);
  else
    for (int64_t i = 0; i < kGroup; ++i) to[i] = static_cast<uint16_t>(moment_bf16(m[i], dice[i]));
}
template <bool halves>
ZL_FN void encode_v(uint16_t* __restrict to, const float* __restrict v, const uint32_t* __restrict dice,
                    const uint8_t*) {
  if constexpr (halves)
    for (int64_t i = 0; i < kPairs; ++i)
      set_pair(to, i, square_bf16(v[i], dice[i]) | square_bf16(v[kPairs + i], dice[kPairs + i]) << 16);
  else
    for (int64_t i = 0; i < kGroup; ++i) to[i] = static_cast<uint16_t>(square_bf16(v[i], dice[i]));
}

// The tensors at a group's first element.
template <class P, class R, class C>
struct Place {
  P* param;
  R* rest;
  C* m;
  C* v;
  uint8_t* scales;
  ZL_METHOD Place next() const {
    return {param + kGroup, rest == nullptr ? rest : rest + kGroup, m + kGroup, v + kGroup, scales + 2};
  }
};

// A group between reading and writing.
struct Group {
  alignas(64) float p[kGroup], m[kGroup], v[kGroup], d[kGroup];
  alignas(64) uint32_t dice[kGroup];
};

// The four parts of a group's update, in order.
template <class P, class R, class C>
ZL_FN void read(Group& __restrict x, const Place<P, R, C>& at, const float* __restrict g, const AdamRow& row) {
  decode<kHalves<P>>(x.m, x.v, at.m, at.v, at.scales);
  load_master(x.p, at.param, at.rest);
  for (int64_t i = 0; i < kGroup; ++i) adam_averages(g[i], x.p[i], x.m[i], x.v[i], row);
  for (int64_t i = 0; i < kGroup; ++i) x.d[i] = root(x.v[i]) + row.eps;
}
template <class P, class R, class C>
ZL_FN void step(Group& __restrict x, const Place<P, R, C>& at, const AdamRow& row) {
  set_scales(x.m, x.v, at.scales, at.m);
  for (int64_t i = 0; i < kGroup; ++i) x.p[i] = adam_step(x.p[i], x.m[i], x.d[i], row);
}
template <class P, class R, class C>
ZL_FN void write_v(Group& __restrict x, const Place<P, R, C>& at, const float* __restrict g, uint32_t salt) {
  for (int64_t i = 0; i < kGroup; ++i) x.dice[i] = dice_of(x.p[i], g[i], salt);
  encode_v<kHalves<P>>(at.v, x.v, x.dice, at.scales);
}
template <class P, class R, class C>
ZL_FN void write_m(const Group& __restrict x, const Place<P, R, C>& at) {
  store_master(at.param, at.rest, x.p);
  encode_m<kHalves<P>>(at.m, x.m, x.dice, at.scales);
}

// Whole groups, at least one.
template <class P, class R, class C>
void adam_groups(Place<P, R, C> at, const float* g, const MomentRow& row, int64_t groups) {
  const AdamRow r = row.adam;
  const uint32_t salt = salt_of(row.step);
  Group two[2];
  Group* now = two;
  Group* next = two + 1;
  read(*now, at, g, r);
  step(*now, at, r);
  for (int64_t k = 1; k < groups; ++k) {
    const Place<P, R, C> before = at;
    at = at.next();
    ahead(at.param), ahead(at.m), ahead(at.v);
    if (at.rest != nullptr) ahead(at.rest);
    read(*next, at, g + kGroup, r);
    write_v(*now, before, g, salt);
    step(*next, at, r);
    write_m(*now, before);
    g += kGroup;
    Group* const other = next;
    next = now;
    now = other;
  }
  write_v(*now, at, g, salt);
  write_m(*now, at);
}

template <class T>
ZL_FN void copy(T* to, const T* from, int64_t n) {
  if (from != nullptr) memcpy(to, from, n * sizeof(T));
}

// Elements [0, n) of a block; a parameter's last group may be short, and what follows in it is left alone. Gradients
// are those of whole groups, in halves where kHalves<P>.
template <class P, class R, class C>
void adam_block(P* param, R* rest, C* m, C* v, uint8_t* scales, const float* g, const MomentRow& row, int64_t n) {
  const int64_t groups = n / kGroup, at = groups * kGroup, left = n - at;
  if (groups > 0) adam_groups(Place<P, R, C>{param, rest, m, v, scales}, g, row, groups);
  if (left == 0) return;
  P p_[kGroup] = {};
  R rest_[kGroup] = {};
  C m_[kGroup] = {}, v_[kGroup] = {};
  copy(p_, param + at, left);
  if (rest != nullptr) copy(rest_, rest + at, left);
  copy(m_, m + at, left);
  copy(v_, v + at, left);
  adam_groups(Place<P, R, C>{p_, rest_, m_, v_, scales + groups * 2}, g + at, row, 1);
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
