// The update with moments of 8 or 16 bits of bf16 parameters by bf16 gradients, in vectors of 256 bits (AVX2) or 512 (AVX-512):
// a part of kernels_cpu.cpp. moments_cpu.h has plain loops of the same for all other dtypes.
//
// Intrinsics, since the pass is bound by instructions and compilers miss what saves them: the best plain loops take a third
// longer.
//
// A processor looks ahead by less than it takes for a root and a quotient one after another (in one stage, with fewer
// instructions, they take 6 % longer). So a group passes five stages, one a turn, and a turn has five groups in hand:
//
//   read:   decode, averages, largest magnitudes      turn k
//   root:   root of the second moment                 turn k + 1
//   divide: quotient                                  turn k + 2
//   step:   master                                    turn k + 3
//   write:  dice, codes                               turn k + 4
#pragma once

#include "codes_wide.h"

#if defined(__AVX2__)
namespace zerolite {
namespace {

// Stages of a turn, and how many turns after it was read a group passes them.
constexpr int kRead = 1, kRoot = 2, kDivide = 4, kStepping = 8, kWrite = 16;
constexpr int kRootAfter = 1, kDivideAfter = 2, kStepAfter = 3, kWriteAfter = 4;
constexpr int kHand = kWriteAfter + 1;  // groups in hand

// C: uint8_t, or uint16_t for moments in bf16, which have no scales: their units are 1.
template <class C>
constexpr bool kScaled = sizeof(C) == 1;

template <class C>
struct Tensors {
  uint16_t* param;
  int16_t* rest;
  C* m;
  C* v;
  uint8_t* scales;
  const uint16_t* g;

  ZL_METHOD Tensors at_group(int64_t k) const {
    const int64_t i = k * kGroup;
    return {param + i, rest + i, m + i, v + i, kScaled<C> ? scales + 2 * k : scales, g + i};
  }
};

// The stages, of kWords elements; `tops` are the largest magnitudes so far, of both moments, where they are bytes.
//
// A product with units is exact. So what is made of it has the same bits with one rounding less, where it is fused, and where
// units have beta2 in them; is_rare() tells the exceptions.
template <bool l2, class C>
ZL_FN void read_words(Staged& x, int at, const Tensors<C>& t, Ints gw, Ints mw, Ints vw, const Units& from, const WideRow& r,
                      const Constants& k, Ints* tops) {
  const Ints zero = zeros();
  const Ints lo = load(t.rest + at);
  const Ints hi = joined(load(t.param + at), lo);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // as adam_averages()
    const Floats p = as_floats(widened(lo, hi, i));
    Floats g = as_floats(widened(zero, gw, i)) * r.grad_scale;
    if constexpr (l2) g = g + r.l2 * p;
    const Floats units = as_floats(widened(zero, mw, i));
    const Floats m = ZL_OP(fmadd_ps)(units, from.m, ZL_OP(fnmadd_ps)(units, from.m, g) * r.mix1);
    const Floats v = as_floats(widened(zero, vw, i)) * from.v + (g * g) * r.mix2;
    ZL_OP(store_ps)(x.p + at + kFloats * i, p);
    ZL_OP(store_ps)(x.m + at + kFloats * i, m);
    ZL_OP(store_ps)(x.v + at + kFloats * i, v);
    if constexpr (!kScaled<C>) continue;
    const Ints size = both(as_ints(m), k.size);
    store(x.size + at + kFloats * i, size);
    tops[0] = ZL_OP(max_epu32)(tops[0], size);
    tops[1] = ZL_OP(max_epu32)(tops[1], as_ints(v));
  }
}
// Roots and quotients are taken of 8 floats also where vectors have 16: the divider is as fast, and other units have less to
// do for it.
ZL_FN void root_words(Staged& x, int at) {
#pragma GCC unroll 4
  for (int i = at; i < at + kWords; i += 8) _mm256_store_ps(x.d + i, _mm256_sqrt_ps(_mm256_load_ps(x.v + i)));
}
ZL_FN void eps_words(Staged& x, int at, const WideRow& r) {
#pragma GCC unroll 2
  for (int i = at; i < at + kWords; i += kFloats) ZL_OP(store_ps)(x.d + i, ZL_OP(load_ps)(x.d + i) + r.eps);
}
ZL_FN void divide_words(Staged& x, int at) {
#pragma GCC unroll 4
  for (int i = at; i < at + kWords; i += 8)
    _mm256_store_ps(x.d + i, _mm256_div_ps(_mm256_load_ps(x.m + i), _mm256_load_ps(x.d + i)));
}
template <class C>
ZL_FN void step_words(Staged& x, int at, const Tensors<C>& t, const WideRow& r, const Constants& k) {
  Ints words[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    float* const p = x.p + at + kFloats * i;
    const Floats next = ZL_OP(load_ps)(p) * r.decay - r.step_size * ZL_OP(load_ps)(x.d + at + kFloats * i);
    ZL_OP(store_ps)(p, next);
    words[i] = ZL_OP(shuffle_epi8)(as_ints(next), k.split);
  }
  const Ints lo = ZL_OP(unpacklo_epi64)(words[0], words[1]), hi = ZL_OP(unpackhi_epi64)(words[0], words[1]);
  store(t.rest + at, lo);
  store(t.param + at, parted(hi, lo));
}

// Where one is NaN; returns the group's largest.
__attribute__((noinline)) uint32_t plain_moments(Staged& x) {
  make_plain(x.m);
  for (int i = 0; i < kGroup; ++i) x.size[i] = as_float(as_bits(x.m[i]) & 0x7fffffffu);
  return kNan;
}
// The largest magnitudes of a group.
struct Tops {
  uint32_t m, v;
};
ZL_FN Tops largest(const Ints* tops) {
  const Ints pairs = ZL_OP(max_epu32)(ZL_OP(unpacklo_epi32)(tops[0], tops[1]), ZL_OP(unpackhi_epi32)(tops[0], tops[1]));
  const __m256i half = folded(pairs);
  __m128i quarter = _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  quarter = _mm_max_epu32(quarter, _mm_unpackhi_epi64(quarter, quarter));
  const uint64_t top = static_cast<uint64_t>(_mm_cvtsi128_si64(quarter));
  return {static_cast<uint32_t>(top), static_cast<uint32_t>(top >> 32)};
}
ZL_FN void set_scales(Staged& x, const Tensors<uint8_t>& t, Tops top) {
  if (top.m > kInfinity) top.m = plain_moments(x);
  x.past = top.v > kLargest;
  t.scales[0] = scale_of<MomentCode>(top.m);
  t.scales[1] = scale_of<SquareCode>(x.past ? kLargest : top.v);
  x.in_m = to_units<MomentCode>(t.scales[0]);
  x.in_v = to_units<SquareCode>(t.scales[1]);
}

// Whether read_words() has other bits than adam_averages(): moments that are infinite as floats, and not as products before
// they are rounded; beta2 times units of second moments below what floats hold exactly (it may round to the least normal one).
ZL_FN bool is_rare(const uint8_t* scales, float beta2) {
  constexpr uint8_t infinite_m = 255 - MomentCode::kLowest, infinite_v = 255 - SquareCode::kLowest;
  if (scales[0] >= infinite_m || scales[1] >= infinite_v) return true;
  return beta2 != 0.0f && from_units<SquareCode>(scales[1]) * beta2 <= 0x1p-126f;
}
__attribute__((noinline)) Tops read_plain(Staged& x, const Tensors<uint8_t>& t, const uint16_t* g, const AdamRow& r) {
  const float unit_m = from_units<MomentCode>(t.scales[0]), unit_v = from_units<SquareCode>(t.scales[1]);
  Tops top = {0, 0};
  for (int i = 0; i < kGroup; ++i) {
    const int to = placed(i);
    float m = decode_moment(t.m[i], unit_m), v = decode_square(t.v[i], unit_v);
    x.p[to] = join(t.param[i], t.rest[i]);
    adam_averages(widen(bf16{g[i]}), x.p[to], m, v, r);
    const uint32_t size = as_bits(m) & 0x7fffffffu, square = as_bits(v);
    x.m[to] = m, x.v[to] = v, x.size[to] = as_float(size);
    top = {top.m > size ? top.m : size, top.v > square ? top.v : square};
  }
  return top;
}

// Patterns of a group of the averaged gradient, as average() and narrow() make them; but without `nans` those of a NaN are not
// looked after, for moments of 8 or 16 bits that are NaN are plain ones. Of a pair of words each is a float where it lies, but for
// a shift of the lower one. A loop of its own: inside the stages' it leaves too few registers.
template <bool nans>
ZL_FN void average_group(uint16_t* to, const Sources& s, int64_t at) {
  const Ints bit = all(0x10000u), below_half = all(0x7fffu), upper = all(0xffff0000u);
  const uint16_t* const* const from = reinterpret_cast<const uint16_t* const*>(s.data);
  const Floats mean = ZL_OP(set1_ps)(s.mean);
  Floats any = as_floats(zeros());
  ahead_of<uint16_t>(s, at);
#pragma GCC unroll 4
  for (int i = 0; i < kGroup; i += kWords) {
    const Ints first = load(from[0] + at + i);
    Floats sum[2] = {as_floats(ZL_OP(slli_epi32)(first, 16)), as_floats(both(first, upper))};
    for (int k = 1; k < s.count; ++k) {
      const Ints next = load(from[k] + at + i);
      sum[0] = sum[0] + as_floats(ZL_OP(slli_epi32)(next, 16));
      sum[1] = sum[1] + as_floats(both(next, upper));
    }
    Ints near[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {  // as nearest_even()
      const Ints x = as_ints(sum[j] * mean);
      near[j] = plus_odd(ZL_OP(add_epi32)(x, below_half), x, bit);
    }
    store(to + i, both_or(near[1], upper, ZL_OP(srli_epi32)(near[0], 16)));
    if constexpr (nans) any = any + (sum[0] + sum[1]);
  }
  if (nans && __builtin_expect(any_nan(any), 0))
    for (int i = 0; i < kGroup; ++i) to[i] = nearest_even(widen(bf16{to[i]}));
}

// One turn, `stages` of which have a group: hand[i] was read i turns before. `average`: the gradient is that of `s`, from
// `start`.
template <bool average, bool l2, int stages, class C>
ZL_FN void turn(const Tensors<C>& all_groups, const Sources& s, int64_t start, int64_t k, Staged* const* hand,
                const WideRow& r, const MomentRow& row, const Constants& c) {
  constexpr bool read = stages & kRead, step = stages & kStepping, write = stages & kWrite;
  const Tensors<C> first = all_groups.at_group(read ? k : 0), stepped = all_groups.at_group(step ? k - kStepAfter : 0);
  const Tensors<C> written = all_groups.at_group(write ? k - kWriteAfter : 0);
  Staged& now = *hand[0];
  Staged& last = *hand[kWriteAfter];
  const uint16_t* const g = average ? now.g : first.g;
  Units from = {}, to = {};
  if constexpr (read && kScaled<C>)
    from = {ZL_OP(set1_ps)(from_units<MomentCode>(first.scales[0])),
            ZL_OP(set1_ps)(from_units<SquareCode>(first.scales[1]) * row.adam.beta2)};
  if constexpr (read && !kScaled<C>) from = {ZL_OP(set1_ps)(1.0f), r.beta2};
  if constexpr (write && kScaled<C>) {
    if (last.past) end_at_largest(last.v);
    to = {ZL_OP(set1_ps)(last.in_m), ZL_OP(set1_ps)(last.in_v)};
  }
  if constexpr (read) ahead(first.param), ahead(first.rest), ahead(first.m), ahead(first.v);
  if constexpr (read && !average) ahead(first.g);
  if constexpr (read && average) average_group<false>(now.g, s, start + k * kGroup);
  Ints tops[2] = {zeros(), zeros()};
#pragma GCC unroll 1
  for (int at = 0; at < kGroup; at += kCodes) {
    Ints mw[2], vw[2];
    Codes<C> codes = {};
    if constexpr (read) words_of(mw, vw, first.m + at, first.v + at, c);
    const auto half = [&]<int j>() __attribute__((always_inline)) {
      const int here = at + kWords * j;
      if constexpr (read) read_words<l2>(now, here, first, load(g + here), mw[j], vw[j], from, r, c, tops);
      if constexpr (stages & kRoot) root_words(*hand[kRootAfter], here);
      if constexpr (stages & kDivide) eps_words(*hand[kDivideAfter], here, r);
      if constexpr (write) write_words<j>(codes, last, here, load((average ? last.g : written.g) + here), to, r, c);
      if constexpr (step) step_words(*hand[kStepAfter], here, stepped, r, c);
      if constexpr (stages & kDivide) divide_words(*hand[kDivideAfter], here);
    };
    half.template operator()<0>();
    half.template operator()<1>();
    if constexpr (write) store_codes(written.m + at, written.v + at, codes, c);
  }
  if constexpr (read && kScaled<C>) {
    Tops top = largest(tops);
    if (is_rare(first.scales, row.adam.beta2)) top = read_plain(now, first, g, row.adam);
    set_scales(now, first, top);
  }
}

// Whole groups, by the gradients in `tensors`, or (`average`) by that of `s` from element `start` on.
template <bool average, bool l2, class C>
__attribute__((noinline)) void adam_codes(const Tensors<C>& tensors, const Sources& s, int64_t start, const MomentRow& row,
                                          int64_t groups) {
  const Tensors<C> t = tensors;
  const WideRow r(row);
  Constants c = constants();
#if defined(__GNUC__)
  asm volatile(
      ""
      : "+m"(c));  // else the compiler, which knows them, makes them anew in each turn, three instructions each
#endif
  Staged groups_in_hand[kHand];
  Staged* hand[kHand];
  for (int i = 0; i < kHand; ++i) hand[i] = groups_in_hand + i;
  const auto in = [&](int64_t k, int after) { return k >= after && k - after < groups; };

  for (int64_t k = 0; k < groups + kWriteAfter; ++k) {
    if (k >= kWriteAfter && k < groups) {
      turn<average, l2, kRead | kRoot | kDivide | kStepping | kWrite>(t, s, start, k, hand, r, row, c);
    } else {
      if (in(k, 0)) turn<average, l2, kRead>(t, s, start, k, hand, r, row, c);
      if (in(k, kRootAfter)) turn<average, l2, kRoot>(t, s, start, k, hand, r, row, c);
      if (in(k, kDivideAfter)) turn<average, l2, kDivide>(t, s, start, k, hand, r, row, c);
      if (in(k, kStepAfter)) turn<average, l2, kStepping>(t, s, start, k, hand, r, row, c);
      if (in(k, kWriteAfter)) turn<average, l2, kWrite>(t, s, start, k, hand, r, row, c);
    }
    Staged* const written = hand[kWriteAfter];
#pragma GCC unroll 8
    for (int i = kWriteAfter; i > 0; --i) hand[i] = hand[i - 1];
    hand[0] = written;
  }
}

// The same, with a term for weight decay where the row has one.
template <bool average, class C>
void adam_codes(const Tensors<C>& t, const Sources& s, int64_t start, const MomentRow& row, int64_t groups) {
  if (row.adam.l2 != 0.0f) return adam_codes<average, true>(t, s, start, row, groups);
  adam_codes<average, false>(t, s, start, row, groups);
}

template <class C>
ZL_FN Tensors<C> tensors_at(const MomentTensors& x, int64_t at) {
  return {static_cast<uint16_t*>(x.param) + at, static_cast<int16_t*>(x.rest) + at, static_cast<C*>(x.m) + at,
          static_cast<C*>(x.v) + at, kScaled<C> ? x.scales + at / kGroup * 2 : x.scales, nullptr};
}

// Groups from element `at` on, by the average of their sources.
template <class C>
void adam_whole(const MomentTensors& x, const Sources& s, const MomentRow& row, int64_t at, int64_t groups) {
  Tensors<C> t = tensors_at<C>(x, at);
  t.g = static_cast<const uint16_t*>(s.data[0]) + at;
  if (s.count == 1 && s.mean == 1.0f) return adam_codes<false>(t, s, at, row, groups);
  adam_codes<true>(t, s, at, row, groups);
}

// A parameter's last group of `left` elements, by a gradient that is padded.
template <class C>
void adam_last(const MomentTensors& x, const Sources& s, const uint16_t* g, const MomentRow& row, int64_t at, int64_t left) {
  uint16_t param[kGroup] = {};
  int16_t rest[kGroup] = {};
  C m[kGroup] = {}, v[kGroup] = {};
  const Tensors<C> end = tensors_at<C>(x, at), group = {param, rest, m, v, end.scales, g};
  copy(param, end.param, left);
  copy(rest, end.rest, left);
  copy(m, end.m, left);
  copy(v, end.v, left);
  adam_codes<false>(group, s, 0, row, 1);
  copy(end.param, param, left);
  copy(end.rest, rest, left);
  copy(end.m, m, left);
  copy(end.v, v, left);
}

}  // namespace
}  // namespace zerolite
#endif
