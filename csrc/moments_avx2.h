// The update with int8 moments of bf16 parameters by bf16 gradients, in vectors of 256 bits: a part of kernels_cpu.cpp,
// compiled for AVX2 and for AVX-512. Same formats and bits as moments_cpu.h, whose plain loops have all other dtypes.
//
// Intrinsics, since the pass is bound by instructions and compilers miss what saves them: codes are decoded by a table
// of 16 bytes, widened by interleaving with zeros (no shift, no mask), and packed with saturation, which keeps a sign.
// The best plain loops take a third longer.
//
// A processor looks ahead by less than it takes for a root and a quotient one after another (in one stage, with fewer
// instructions, they take 6 % longer). So a group passes four stages, one a turn, and a turn has four groups in hand:
//
//   read:  decode, averages, largest magnitudes      turn k
//   root:  root of the second moment                 turn k + 1
//   step:  quotient, master                          turn k + 2
//   write: dice, codes                               turn k + 3
#pragma once

#include "moments_cpu.h"

#if defined(__AVX2__)
namespace zerolite {
namespace {

using Ints = __m256i;
using Floats = __m256;

ZL_FN Ints load(const void* p) { return _mm256_loadu_si256(static_cast<const Ints*>(p)); }
ZL_FN void store(void* p, Ints x) { _mm256_storeu_si256(static_cast<Ints*>(p), x); }
ZL_FN Ints as_ints(Floats x) { return _mm256_castps_si256(x); }
ZL_FN Floats as_floats(Ints x) { return _mm256_castsi256_ps(x); }
ZL_FN Ints all(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
ZL_FN Ints all_bytes(uint8_t x) { return _mm256_set1_epi8(static_cast<char>(x)); }
ZL_FN Ints all_words(uint16_t x) { return _mm256_set1_epi16(static_cast<short>(x)); }
// Packing and unpacking work in halves of 128 bits: the middle quarters change places before or after.
ZL_FN Ints swap_middle(Ints x) { return _mm256_permute4x64_epi64(x, 0xd8); }

// Elements of 16 words go to two vectors of floats, elements 0-3 and 8-11, and the others. Packing is the reverse.
ZL_FN Ints widened(Ints low, Ints high, int half) {
  return half == 0 ? _mm256_unpacklo_epi16(low, high) : _mm256_unpackhi_epi16(low, high);
}

struct Constants {
  // Bytes of the bf16 patterns of codes below 16, xor what the rule for codes of higher fields makes of them.
  Ints low_fix, high_fix;
  Ints byte_size, byte_past, byte_exponent, byte_base, byte_fraction, byte_nonzero;
  Ints word_size, word_byte, split;
  Ints size, first, second, low_word, least;
  Floats half, two;
};
ZL_FN Constants constants() {
  alignas(32) uint8_t low[32], high[32];
  for (uint32_t c = 0; c < 16; ++c) {
    const uint32_t fix = as_bits(decode_moment(c, 1.0f)) >> 16 ^ (0x400u + c) << 4;
    low[c] = low[c + 16] = static_cast<uint8_t>(fix);
    high[c] = high[c + 16] = static_cast<uint8_t>(fix >> 8);
  }
  const __m128i split = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  Constants c = {load(low),
                 load(high),
                 all_bytes(0x7f),
                 all_bytes(0x70),
                 all_bytes(0x07),
                 all_bytes(0x40),
                 all_bytes(0x0f),
                 all_bytes(0x04),
                 all_words(0x7f),
                 all_words(0xff),
                 _mm256_set_m128i(split, split),
                 all(0x7fffffffu),
                 all(0x85ebca6bu),
                 all(0xc2b2ae35u),
                 all(0xffffu),
                 all((128u << 23) + kStep),
                 _mm256_set1_ps(0.5f),
                 _mm256_set1_ps(2.0f)};
  return c;
}

// Hyper-parameters in every lane.
struct WideRow {
  Floats grad_scale, l2, decay, mix1, beta2, mix2, eps, step_size;
  Ints salt;
  explicit ZL_METHOD WideRow(const MomentRow& r)
      : grad_scale(_mm256_set1_ps(r.adam.grad_scale)),
        l2(_mm256_set1_ps(r.adam.l2)),
        decay(_mm256_set1_ps(r.adam.decay)),
        mix1(_mm256_set1_ps(r.adam.mix1)),
        beta2(_mm256_set1_ps(r.adam.beta2)),
        mix2(_mm256_set1_ps(r.adam.mix2)),
        eps(_mm256_set1_ps(r.adam.eps)),
        step_size(_mm256_set1_ps(r.adam.step_size)),
        salt(all(salt_of(r.step))) {}
};

struct Units {
  Floats m, v;
};

struct Tensors {
  uint16_t* param;
  int16_t* rest;
  uint8_t* m;
  uint8_t* v;
  uint8_t* scales;
  const uint16_t* g;
};

struct Staged {
  alignas(64) float p[kGroup], m[kGroup], v[kGroup], d[kGroup];
  float in_m, in_v;  // factors to units
  bool past;         // a second moment is above kLargest: it is stored as kLargest, after its root was taken
};

// bf16 patterns, in units, of 32 codes. As words they are (0x400 + code) << 4; of 0 and of field 0 they are not.
ZL_FN void words_of_moments(Ints* to, const uint8_t* codes, const Constants& k) {
  const Ints c = swap_middle(load(codes)), size = _mm256_and_si256(c, k.byte_size);
  const Ints low = _mm256_andnot_si256(k.byte_fraction, _mm256_slli_epi16(c, 4));
  const Ints exponent = _mm256_and_si256(_mm256_srli_epi16(c, 4), k.byte_exponent);
  const Ints high = _mm256_or_si256(exponent, _mm256_or_si256(_mm256_andnot_si256(k.byte_size, c), k.byte_base));
  const Ints at = _mm256_add_epi8(size, k.byte_past);  // of codes above 15 the sign bit, and so no fix
  const Ints l = _mm256_xor_si256(low, _mm256_shuffle_epi8(k.low_fix, at));
  const Ints h = _mm256_xor_si256(high, _mm256_shuffle_epi8(k.high_fix, at));
  to[0] = _mm256_unpacklo_epi8(l, h);
  to[1] = _mm256_unpackhi_epi8(l, h);
}
ZL_FN void words_of_squares(Ints* to, const uint8_t* codes, const Constants& k) {
  const Ints c = swap_middle(load(codes));
  const Ints high = _mm256_andnot_si256(_mm256_cmpeq_epi8(c, _mm256_setzero_si256()), k.byte_nonzero);
  to[0] = _mm256_slli_epi16(_mm256_unpacklo_epi8(c, high), 4);
  to[1] = _mm256_slli_epi16(_mm256_unpackhi_epi8(c, high), 4);
}

// The stages, of 16 elements; `tops` are the largest magnitudes so far, of both moments.
ZL_FN void read16(Staged& x, int at, const Tensors& t, Ints mw, Ints vw, const Units& from, const WideRow& r,
                  const Constants& k, Ints* tops) {
  const Ints zero = _mm256_setzero_si256();
  const Ints lo = load(t.rest + at), gw = load(t.g + at);
  const Ints hi = _mm256_add_epi16(load(t.param + at), _mm256_srai_epi16(lo, 15));  // as join()
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // as adam_averages()
    const Floats p = as_floats(widened(lo, hi, i)), g = as_floats(widened(zero, gw, i)) * r.grad_scale + r.l2 * p;
    Floats m = as_floats(widened(zero, mw, i)) * from.m, v = as_floats(widened(zero, vw, i)) * from.v;
    m = m + (g - m) * r.mix1;
    v = v * r.beta2 + (g * g) * r.mix2;
    _mm256_store_ps(x.p + at + 8 * i, p);
    _mm256_store_ps(x.m + at + 8 * i, m);
    _mm256_store_ps(x.v + at + 8 * i, v);
    tops[0] = _mm256_max_epu32(tops[0], _mm256_and_si256(as_ints(m), k.size));
    tops[1] = _mm256_max_epu32(tops[1], as_ints(v));
  }
}
ZL_FN void root16(Staged& x, int at, const WideRow& r) {
#pragma GCC unroll 2
  for (int i = at; i < at + 16; i += 8) _mm256_store_ps(x.d + i, _mm256_sqrt_ps(_mm256_load_ps(x.v + i)) + r.eps);
}
ZL_FN void step16(Staged& x, int at, const Tensors& t, const WideRow& r, const Constants& k) {
  Ints words[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    float* const p = x.p + at + 8 * i;
    const Floats quotient = _mm256_load_ps(x.m + at + 8 * i) / _mm256_load_ps(x.d + at + 8 * i);
    const Floats next = _mm256_load_ps(p) * r.decay - r.step_size * quotient;
    _mm256_store_ps(p, next);
    words[i] = _mm256_shuffle_epi8(as_ints(next), k.split);
  }
  const Ints lo = _mm256_unpacklo_epi64(words[0], words[1]), hi = _mm256_unpackhi_epi64(words[0], words[1]);
  store(t.rest + at, lo);
  store(t.param + at, _mm256_sub_epi16(hi, _mm256_srai_epi16(lo, 15)));  // as split()
}
// Words that hold the codes of first moments without signs, their signs, and the codes of second moments.
struct Coded {
  Ints m, sign, v;
};
ZL_FN Coded write16(const Staged& x, int at, const Tensors& t, const Units& to, const WideRow& r, const Constants& k) {
  const Ints gw = load(t.g + at);
  Ints m[2], code_m[2], code_v[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Ints g = widened(_mm256_setzero_si256(), gw, i);
    Ints h = _mm256_mullo_epi32(_mm256_xor_si256(load(x.p + at + 8 * i), r.salt), k.first);  // as dice_of()
    h = _mm256_mullo_epi32(_mm256_xor_si256(_mm256_xor_si256(h, g), _mm256_srli_epi32(h, 15)), k.second);
    const Ints dice = _mm256_xor_si256(h, _mm256_srli_epi32(h, 16));
    m[i] = load(x.m + at + 8 * i);
    const Floats y = as_floats(_mm256_and_si256(m[i], k.size)) * to.m;  // as encode_moment()
    const Ints top = as_ints(_mm256_max_ps(y, _mm256_fmadd_ps(y, k.half, k.two)));
    code_m[i] = _mm256_srli_epi32(_mm256_add_epi32(top, _mm256_srli_epi32(dice, 32 - kDropped)), kDropped);
    const Ints z = as_ints(_mm256_load_ps(x.v + at + 8 * i) * to.v);         // as encode_square()
    const Ints raised = _mm256_sign_epi32(_mm256_max_epu32(z, k.least), z);  // 0 stays 0; no square is negative
    // The last 4 bits meet no dice, so that they carry nothing.
    code_v[i] =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_srli_epi32(raised, 4), _mm256_and_si256(dice, k.low_word)), 16);
  }
  return {_mm256_and_si256(_mm256_packus_epi32(code_m[0], code_m[1]), k.word_size), _mm256_packs_epi32(m[0], m[1]),
          _mm256_and_si256(_mm256_packus_epi32(code_v[0], code_v[1]), k.word_byte)};
}
ZL_FN void store_codes(const Tensors& t, int at, const Coded& a, const Coded& b, const Constants& k) {
  const Ints sign = _mm256_andnot_si256(k.byte_size, _mm256_packs_epi16(a.sign, b.sign));
  store(t.m + at, swap_middle(_mm256_or_si256(_mm256_packus_epi16(a.m, b.m), sign)));
  store(t.v + at, swap_middle(_mm256_packus_epi16(a.v, b.v)));
}

ZL_FN Tensors at_group(const Tensors& t, int64_t k) {
  const int64_t i = k * kGroup;
  return {t.param + i, t.rest + i, t.m + i, t.v + i, t.scales + 2 * k, t.g + i};
}

ZL_FN void set_scales(Staged& x, const Tensors& t, const Ints* tops) {
  const Ints pairs = _mm256_max_epu32(_mm256_unpacklo_epi32(tops[0], tops[1]), _mm256_unpackhi_epi32(tops[0], tops[1]));
  __m128i both = _mm_max_epu32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  both = _mm_max_epu32(both, _mm_unpackhi_epi64(both, both));
  const uint64_t top = static_cast<uint64_t>(_mm_cvtsi128_si64(both));
  const uint32_t top_v = static_cast<uint32_t>(top >> 32);
  x.past = top_v > kLargest;
  t.scales[0] = scale_of<MomentCode>(static_cast<uint32_t>(top));
  t.scales[1] = scale_of<SquareCode>(x.past ? kLargest : top_v);
  x.in_m = to_units<MomentCode>(t.scales[0]);
  x.in_v = to_units<SquareCode>(t.scales[1]);
}
ZL_FN void end_at_largest(Staged& x) {
  for (int i = 0; i < kGroup; ++i) x.v[i] = as_float(as_bits(x.v[i]) < kLargest ? as_bits(x.v[i]) : kLargest);
}

// One turn: `read` says whether group k has this stage in it, and so on.
template <bool read, bool roots, bool step, bool write>
ZL_FN void turn(const Tensors& all_groups, int64_t k, Staged* ring, const WideRow& r, const Constants& c) {
  const Tensors first = at_group(all_groups, read ? k : 0), third = at_group(all_groups, step ? k - 2 : 0);
  const Tensors fourth = at_group(all_groups, write ? k - 3 : 0);
  Units from = {}, to = {};
  if constexpr (read)
    from = {_mm256_set1_ps(from_units<MomentCode>(first.scales[0])),
            _mm256_set1_ps(from_units<SquareCode>(first.scales[1]))};
  Staged& last = ring[(k - 3) & 3];
  if constexpr (write) {
    if (last.past) end_at_largest(last);
    to = {_mm256_set1_ps(last.in_m), _mm256_set1_ps(last.in_v)};
  }
  Ints tops[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 1
  for (int at = 0; at < kGroup; at += 32) {
    Ints mw[2], vw[2];
    Coded coded[2];
    if constexpr (read) words_of_moments(mw, first.m + at, c);
    if constexpr (read) words_of_squares(vw, first.v + at, c);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      if constexpr (read) read16(ring[k & 3], at + 16 * j, first, mw[j], vw[j], from, r, c, tops);
      if constexpr (roots) root16(ring[(k - 1) & 3], at + 16 * j, r);
      if constexpr (write) coded[j] = write16(last, at + 16 * j, fourth, to, r, c);
      if constexpr (step) step16(ring[(k - 2) & 3], at + 16 * j, third, r, c);
    }
    if constexpr (write) store_codes(fourth, at, coded[0], coded[1], c);
  }
  if constexpr (read) set_scales(ring[k & 3], first, tops);
}

// Whole groups.
__attribute__((noinline)) void adam_codes(const Tensors& tensors, const MomentRow& row, int64_t groups) {
  const Tensors t = tensors;
  const WideRow r(row);
  Constants c = constants();
#if defined(__GNUC__)
  asm volatile(
      ""
      : "+m"(c));  // else the compiler, which knows them, makes them anew in each turn, three instructions each
#endif
  Staged ring[4];

  for (int64_t k = 0; k < groups + 3; ++k) {
    if (k >= 3 && k < groups) {
      turn<true, true, true, true>(t, k, ring, r, c);
      continue;
    }
    if (k < groups) turn<true, false, false, false>(t, k, ring, r, c);
    if (k >= 1 && k < groups + 1) turn<false, true, false, false>(t, k, ring, r, c);
    if (k >= 2 && k < groups + 2) turn<false, false, true, false>(t, k, ring, r, c);
    if (k >= 3) turn<false, false, false, true>(t, k, ring, r, c);
  }
}

// Patterns of [at, at + n) of the averaged gradient, as average() and narrow() make them; n is a multiple of 16.
ZL_FN void average_words(uint16_t* to, const Sources& s, int64_t at, int64_t n) {
  const Ints zero = _mm256_setzero_si256(), one = all(1), below_half = all(0x7fffu), nan = all(0x7fc0u);
  const Floats mean = _mm256_set1_ps(s.mean);
  const uint16_t* const* const from = reinterpret_cast<const uint16_t* const*>(s.data);
  for (int64_t i = at; i < at + n; i += 16) {
    const Ints first = load(from[0] + i);
    Floats sum[2] = {as_floats(widened(zero, first, 0)), as_floats(widened(zero, first, 1))};
    for (int k = 1; k < s.count; ++k) {
      const Ints next = load(from[k] + i);
      sum[0] = sum[0] + as_floats(widened(zero, next, 0));
      sum[1] = sum[1] + as_floats(widened(zero, next, 1));
    }
    Ints words[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {  // as nearest_even()
      const Floats x = sum[j] * mean;
      const Ints odd = _mm256_and_si256(_mm256_srli_epi32(as_ints(x), 16), one);
      const Ints near = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(as_ints(x), below_half), odd), 16);
      words[j] = _mm256_blendv_epi8(near, nan, as_ints(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    }
    store(to + i - at, _mm256_packus_epi32(words[0], words[1]));
  }
}

// Elements [at, at + n) by their gradients; a parameter's last group may be short.
ZL_FN void adam_span(const MomentTensors& x, const uint16_t* g, const MomentRow& row, int64_t at, int64_t n) {
  const Tensors t = {static_cast<uint16_t*>(x.param) + at, static_cast<int16_t*>(x.rest) + at,
                     static_cast<uint8_t*>(x.m) + at,      static_cast<uint8_t*>(x.v) + at,
                     x.scales + at / kGroup * 2,           g};
  const int64_t groups = n / kGroup, left = n % kGroup;
  if (groups > 0) adam_codes(t, row, groups);
  if (left == 0) return;
  uint16_t param[kGroup] = {}, grad[kGroup] = {};
  int16_t rest[kGroup] = {};
  uint8_t m[kGroup] = {}, v[kGroup] = {};
  const Tensors end = at_group(t, groups);
  copy(param, end.param, left);
  copy(rest, end.rest, left);
  copy(m, end.m, left);
  copy(v, end.v, left);
  copy(grad, end.g, left);
  adam_codes({param, rest, m, v, end.scales, grad}, row, 1);
  copy(end.param, param, left);
  copy(end.rest, rest, left);
  copy(end.m, m, left);
  copy(end.v, v, left);
}

}  // namespace
}  // namespace zerolite
#endif
