// The update with int8 moments of bf16 parameters by bf16 gradients, in vectors of 256 bits (AVX2) or 512 (AVX-512): a part
// of kernels_cpu.cpp. Same formats and bits as moments_cpu.h, whose plain loops have all other dtypes.
//
// Intrinsics, since the pass is bound by instructions and compilers miss what saves them: codes are decoded by a table
// of 16 bytes, widened by interleaving with zeros (no shift, no mask), and packed with saturation, which keeps a sign.
// The best plain loops take a third longer.
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

#include "moments_cpu.h"

#if defined(__AVX2__)
namespace zerolite {
namespace {

// Processors that move any bytes, and any bits in them, in one instruction.
#if defined(__AVX512VBMI__) && defined(__GFNI__)
#define ZL_BYTES
#endif

// Intrinsics of either width that differ by their names only.
#if defined(__AVX512BW__)
using Ints = __m512i;
using Floats = __m512;
#define ZL_OP(name) _mm512_##name
#define ZL_BITS(name) _mm512_##name##_si512
#else
using Ints = __m256i;
using Floats = __m256;
#define ZL_OP(name) _mm256_##name
#define ZL_BITS(name) _mm256_##name##_si256
#endif

// Elements of a vector: codes, words, floats.
constexpr int kCodes = sizeof(Ints), kWords = kCodes / 2, kFloats = kCodes / 4;
static_assert(kGroup % kCodes == 0);

ZL_FN Ints load(const void* p) { return ZL_BITS(loadu)(static_cast<const Ints*>(p)); }
ZL_FN void store(void* p, Ints x) { ZL_BITS(storeu)(static_cast<Ints*>(p), x); }
ZL_FN Ints zeros() { return ZL_BITS(setzero)(); }
ZL_FN Ints as_ints(Floats x) { return (Ints)x; }
ZL_FN Floats as_floats(Ints x) { return (Floats)x; }
ZL_FN Ints all(uint32_t x) { return ZL_OP(set1_epi32)(static_cast<int>(x)); }
ZL_FN Ints all_bytes(uint8_t x) { return ZL_OP(set1_epi8)(static_cast<char>(x)); }
ZL_FN Ints all_words(uint16_t x) { return ZL_OP(set1_epi16)(static_cast<short>(x)); }
ZL_FN Ints both(Ints a, Ints b) { return ZL_BITS(and)(a, b); }
ZL_FN Ints either(Ints a, Ints b) { return ZL_BITS(or)(a, b); }
ZL_FN Ints differ(Ints a, Ints b) { return ZL_BITS(xor)(a, b); }
ZL_FN Ints without(Ints a, Ints b) { return ZL_BITS(andnot)(b, a); }  // a's bits that b has not

// a ^ b ^ c, (a & b) | c, and what `spare` has not of a, xor b.
#if defined(__AVX512BW__)
ZL_FN Ints differ(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
ZL_FN Ints both_or(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi64(a, b, c, 0xea); }
ZL_FN Ints without_differ(Ints a, Ints spare, Ints b) { return _mm512_ternarylogic_epi64(a, spare, b, 0x9a); }
#else
ZL_FN Ints differ(Ints a, Ints b, Ints c) { return differ(differ(a, b), c); }
ZL_FN Ints both_or(Ints a, Ints b, Ints c) { return either(both(a, b), c); }
ZL_FN Ints without_differ(Ints a, Ints spare, Ints b) { return differ(without(a, spare), b); }
#endif

#if defined(__AVX512BW__)
// Packing and unpacking work in quarters: what a quarter takes from two vectors' halves lies side by side before, or after.
ZL_FN Ints spread(Ints x) { return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), x); }
ZL_FN Ints gathered(Ints x) { return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), x); }
ZL_FN Ints repeat(__m128i x) { return _mm512_broadcast_i32x4(x); }
ZL_FN Ints where_bytes(Ints x, Ints value) { return _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(x, x), value); }
ZL_FN Ints raised(Ints x, Ints least) { return _mm512_maskz_max_epu32(_mm512_test_epi32_mask(x, x), x, least); }
ZL_FN Ints plus_odd(Ints to, Ints x, Ints bit) { return _mm512_mask_sub_epi32(to, _mm512_test_epi32_mask(x, bit), to, all(~0u)); }
ZL_FN __m256i folded(Ints x) { return _mm256_max_epu32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1)); }
#else
// Packing and unpacking work in halves: the middle quarters change places before, or after.
ZL_FN Ints spread(Ints x) { return _mm256_permute4x64_epi64(x, 0xd8); }
ZL_FN Ints gathered(Ints x) { return spread(x); }
ZL_FN Ints repeat(__m128i x) { return _mm256_set_m128i(x, x); }
ZL_FN Ints where_bytes(Ints x, Ints value) { return without(value, _mm256_cmpeq_epi8(x, zeros())); }
ZL_FN Ints raised(Ints x, Ints least) { return _mm256_sign_epi32(_mm256_max_epu32(x, least), x); }  // no x is negative
ZL_FN Ints plus_odd(Ints to, Ints x, Ints bit) { return _mm256_add_epi32(to, _mm256_srli_epi32(both(x, bit), 16)); }
ZL_FN __m256i folded(Ints x) { return x; }
#endif

// Elements of kWords words go to two vectors of floats, in each part of 128 bits the first four and the last: to where
// placed() says. Packing is the reverse.
ZL_FN Ints widened(Ints low, Ints high, int half) {
  return half == 0 ? ZL_OP(unpacklo_epi16)(low, high) : ZL_OP(unpackhi_epi16)(low, high);
}

ZL_FN int placed(int n) { return n / kWords * kWords + n % 8 / 4 * kFloats + n % kWords / 8 * 4 + n % 4; }

struct Constants {
  // Bytes of the bf16 patterns of codes below 16, xor what the rule for codes of higher fields makes of them.
  Ints low_fix, high_fix;
  Ints byte_size, byte_past, byte_exponent, byte_base, byte_sign, byte_fraction, byte_nonzero;
  Ints word_size, word_byte, split;
#if defined(ZL_BYTES)
  Ints low_bits, high_bits, high_bits_signed, code_bits, sign_bits, byte_order;
  __mmask64 pairs[4];
#endif
  Ints size, factor, least;
  Floats half, two;
};
#if defined(ZL_BYTES)
// The matrix by which each bit of a byte, from the highest on, is the one that its mask shows.
struct Bits {
  uint8_t from[8];
};
ZL_FN Ints bits_of(Bits b) {
  uint64_t rows = 0;
  for (int i = 0; i < 8; ++i) rows |= static_cast<uint64_t>(b.from[i]) << 8 * i;
  return _mm512_set1_epi64(static_cast<int64_t>(rows));
}
// Where bytes of two floats begin: at bit `at` of the one and of the other.
ZL_FN Ints positions(uint64_t at) { return _mm512_set1_epi16(static_cast<short>(at | (at + 32) << 8)); }
constexpr uint64_t kPair = 0x0303030303030303;  // the first two bytes of each eight
// Which byte of Codes is that of each element of a group.
ZL_FN Ints byte_order() {
  alignas(64) uint8_t order[kGroup];
  for (int n = 0; n < kGroup; ++n) {
    const int vector = placed(n) / kFloats, at = placed(n) % kFloats;
    order[n] = static_cast<uint8_t>(at / 2 * 8 + vector * 2 + at % 2);
  }
  return load(order);
}
#endif
ZL_FN Constants constants() {
  alignas(64) uint8_t low[kCodes], high[kCodes];
  for (uint32_t c = 0; c < 16; ++c) {
    const uint32_t fix = as_bits(decode_moment(c, 1.0f)) >> 16 ^ (0x400u + c) << 4;
    for (int part = 0; part < kCodes; part += 16) {
      low[c + part] = static_cast<uint8_t>(fix);
      high[c + part] = static_cast<uint8_t>(fix >> 8);
    }
  }
  const __m128i split = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  Constants c = {load(low),
                 load(high),
                 all_bytes(0x7f),
                 all_bytes(0x70),
                 all_bytes(0x07),
                 all_bytes(0x40),
                 all_bytes(0x80),
                 all_bytes(0x0f),
                 all_bytes(0x04),
                 all_words(0x7f),
                 all_words(0xff),
                 repeat(split),
#if defined(ZL_BYTES)
                 bits_of({0x08, 0x04, 0x02, 0x01, 0, 0, 0, 0}),
                 bits_of({0, 0, 0, 0, 0x80, 0x40, 0x20, 0x10}),
                 bits_of({0x80, 0, 0, 0, 0, 0x40, 0x20, 0x10}),
                 positions(kDropped),
                 positions(24),
                 byte_order(),
                 {kPair, kPair << 2, kPair << 4, kPair << 6},
#endif
                 all(0x7fffffffu),
                 all(0x85ebca6bu),
                 all((128u << 23) + kStep),
                 ZL_OP(set1_ps)(0.5f),
                 ZL_OP(set1_ps)(2.0f)};
  return c;
}

// Hyper-parameters in every lane.
struct WideRow {
  Floats grad_scale, l2, decay, mix1, beta2, mix2, eps, step_size;
  Ints salt;
  explicit ZL_METHOD WideRow(const MomentRow& r)
      : grad_scale(ZL_OP(set1_ps)(r.adam.grad_scale)),
        l2(ZL_OP(set1_ps)(r.adam.l2)),
        decay(ZL_OP(set1_ps)(r.adam.decay)),
        mix1(ZL_OP(set1_ps)(r.adam.mix1)),
        beta2(ZL_OP(set1_ps)(r.adam.beta2)),
        mix2(ZL_OP(set1_ps)(r.adam.mix2)),
        eps(ZL_OP(set1_ps)(r.adam.eps)),
        step_size(ZL_OP(set1_ps)(r.adam.step_size)),
        salt(all(salt_of(r.step))) {}
};

// Factors from units, of second moments with beta2 in it; factors to units.
struct Units {
  Floats m, v;
};

// Stages of a turn, and how many turns after it was read a group passes them.
constexpr int kRead = 1, kRoot = 2, kDivide = 4, kStepping = 8, kWrite = 16;
constexpr int kRootAfter = 1, kDivideAfter = 2, kStepAfter = 3, kWriteAfter = 4;
constexpr int kHand = kWriteAfter + 1;  // groups in hand

struct Tensors {
  uint16_t* param;
  int16_t* rest;
  uint8_t* m;
  uint8_t* v;
  uint8_t* scales;
  const uint16_t* g;
};

struct Staged {
  alignas(64) float p[kGroup], m[kGroup], size[kGroup], v[kGroup];  // size: of m
  alignas(64) float d[kGroup];  // root of v, then the quotient
  alignas(64) uint16_t g[kGroup];  // where it is an average
  float in_m, in_v;  // factors to units
  bool past;         // a second moment is above kLargest: it is stored as kLargest, after its root was taken
};

// bf16 patterns, in units, of kCodes codes. As words they are (0x400 + code) << 4; of 0 and of field 0 they are not.
#if defined(ZL_BYTES)
// Bits of bytes, moved in one instruction: `low` to the upper nibble; `high` to the lower one, under the exponent's highest
// bit; a sign stays where it is.
ZL_FN Ints low_bits(Ints c, const Constants& k) { return _mm512_gf2p8affine_epi64_epi8(c, k.low_bits, 0); }
ZL_FN void words_of_moments(Ints* to, const uint8_t* codes, const Constants& k) {
  const Ints c = spread(load(codes));
  const Ints at = ZL_OP(add_epi8)(both(c, k.byte_size), k.byte_past);  // of codes above 15 the sign bit, and so no fix
  const Ints high = _mm512_gf2p8affine_epi64_epi8(c, k.high_bits_signed, 0x40);
  const Ints l = differ(low_bits(c, k), ZL_OP(shuffle_epi8)(k.low_fix, at));
  const Ints h = differ(high, ZL_OP(shuffle_epi8)(k.high_fix, at));
  to[0] = ZL_OP(unpacklo_epi8)(l, h);
  to[1] = ZL_OP(unpackhi_epi8)(l, h);
}
ZL_FN void words_of_squares(Ints* to, const uint8_t* codes, const Constants& k) {
  const Ints c = spread(load(codes)), l = low_bits(c, k);
  const Ints h = _mm512_maskz_gf2p8affine_epi64_epi8(_mm512_test_epi8_mask(c, c), c, k.high_bits, 0x40);
  to[0] = ZL_OP(unpacklo_epi8)(l, h);
  to[1] = ZL_OP(unpackhi_epi8)(l, h);
}
#else
ZL_FN void words_of_moments(Ints* to, const uint8_t* codes, const Constants& k) {
  const Ints c = spread(load(codes)), size = both(c, k.byte_size);
  const Ints high = both_or(ZL_OP(srli_epi16)(c, 4), k.byte_exponent, both_or(c, k.byte_sign, k.byte_base));
  const Ints at = ZL_OP(add_epi8)(size, k.byte_past);  // of codes above 15 the sign bit, and so no fix
  const Ints l = without_differ(ZL_OP(slli_epi16)(c, 4), k.byte_fraction, ZL_OP(shuffle_epi8)(k.low_fix, at));
  const Ints h = differ(high, ZL_OP(shuffle_epi8)(k.high_fix, at));
  to[0] = ZL_OP(unpacklo_epi8)(l, h);
  to[1] = ZL_OP(unpackhi_epi8)(l, h);
}
ZL_FN void words_of_squares(Ints* to, const uint8_t* codes, const Constants& k) {
  const Ints c = spread(load(codes));
  const Ints high = where_bytes(c, k.byte_nonzero);
  to[0] = ZL_OP(slli_epi16)(ZL_OP(unpacklo_epi8)(c, high), 4);
  to[1] = ZL_OP(slli_epi16)(ZL_OP(unpackhi_epi8)(c, high), 4);
}
#endif

// The stages, of kWords elements; `tops` are the largest magnitudes so far, of both moments.
//
// A product with units is exact. So what is made of it has the same bits with one rounding less, where it is fused, and where
// units have beta2 in them; is_rare() tells the exceptions.
template <bool l2>
ZL_FN void read_words(Staged& x, int at, const Tensors& t, Ints gw, Ints mw, Ints vw, const Units& from, const WideRow& r,
                      const Constants& k, Ints* tops) {
  const Ints zero = zeros();
  const Ints lo = load(t.rest + at);
  const Ints hi = ZL_OP(add_epi16)(load(t.param + at), ZL_OP(srai_epi16)(lo, 15));  // as join()
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
ZL_FN void step_words(Staged& x, int at, const Tensors& t, const WideRow& r, const Constants& k) {
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
  store(t.param + at, ZL_OP(sub_epi16)(hi, ZL_OP(srai_epi16)(lo, 15)));  // as split()
}
// What becomes codes: patterns in units whose bits from kDropped on are codes, of kFloats elements, after dice are added.
struct Thrown {
  Ints m, v;  // of first moments without their signs
};
ZL_FN Thrown throw_dice(const Staged& x, int at, Ints g, const Units& to, const WideRow& r, const Constants& k) {
  const Ints h = ZL_OP(mullo_epi32)(differ(load(x.p + at), r.salt, g), k.factor);  // as dice_of()
  const Ints dice = ZL_OP(srli_epi32)(h, 32 - kDropped);
  const Floats y = ZL_OP(load_ps)(x.size + at) * to.m;  // as encode_moment()
  const Ints top = as_ints(ZL_OP(max_ps)(y, ZL_OP(fmadd_ps)(y, k.half, k.two)));
  const Ints z = as_ints(ZL_OP(load_ps)(x.v + at) * to.v);  // as encode_square()
  return {ZL_OP(add_epi32)(top, dice), ZL_OP(add_epi32)(raised(z, k.least), dice)};
}

#if defined(ZL_BYTES)
// Codes of a group, in bytes: those of floats 2q and 2q + 1 of the group's vector i are bytes 8q + 2i and 8q + 2i + 1.
struct Codes {
  Ints m, sign, v;
};
template <int i>
ZL_FN Ints with_bytes(Ints to, Ints positions, Ints from, const Constants& k) {
  if constexpr (i == 0) return _mm512_multishift_epi64_epi8(positions, from);
  return _mm512_mask_multishift_epi64_epi8(to, k.pairs[i], positions, from);
}
template <int i>
ZL_FN void write_floats(Codes& to, const Staged& x, Ints g, const Units& units, const WideRow& r, const Constants& k) {
  const Thrown t = throw_dice(x, kFloats * i, g, units, r, k);
  to.m = with_bytes<i>(to.m, k.code_bits, t.m, k);
  to.v = with_bytes<i>(to.v, k.code_bits, t.v, k);
  to.sign = with_bytes<i>(to.sign, k.sign_bits, load(x.m + kFloats * i), k);
}
template <int i>
ZL_FN void write_words(Codes& to, const Staged& x, int, Ints gw, const Units& units, const WideRow& r, const Constants& k) {
  write_floats<2 * i>(to, x, widened(gw, zeros(), 0), units, r, k);
  write_floats<2 * i + 1>(to, x, widened(gw, zeros(), 1), units, r, k);
}
ZL_FN void store_codes(const Tensors& t, int, const Codes& c, const Constants& k) {
  const Ints m = _mm512_ternarylogic_epi64(k.byte_sign, c.sign, c.m, 0xca);  // byte_sign ? sign : m
  store(t.m, _mm512_permutexvar_epi8(k.byte_order, m));
  store(t.v, _mm512_permutexvar_epi8(k.byte_order, c.v));
}
#else
// Words that hold the codes of first moments without signs, their signs, and the codes of second moments.
struct Codes {
  Ints m[2], sign[2], v[2];
};
template <int i>
ZL_FN void write_words(Codes& to, const Staged& x, int at, Ints gw, const Units& units, const WideRow& r, const Constants& k) {
  Ints m[2], code_m[2], code_v[2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const Thrown t = throw_dice(x, at + kFloats * j, widened(gw, zeros(), j), units, r, k);
    m[j] = load(x.m + at + kFloats * j);
    code_m[j] = ZL_OP(srli_epi32)(t.m, kDropped);
    code_v[j] = ZL_OP(srli_epi32)(t.v, kDropped);
  }
  to.m[i] = both(ZL_OP(packus_epi32)(code_m[0], code_m[1]), k.word_size);
  to.sign[i] = ZL_OP(packs_epi32)(m[0], m[1]);
  to.v[i] = both(ZL_OP(packus_epi32)(code_v[0], code_v[1]), k.word_byte);
}
ZL_FN void store_codes(const Tensors& t, int at, const Codes& c, const Constants& k) {
  const Ints sign = ZL_OP(packs_epi16)(c.sign[0], c.sign[1]);
  store(t.m + at, gathered(both_or(sign, k.byte_sign, ZL_OP(packus_epi16)(c.m[0], c.m[1]))));
  store(t.v + at, gathered(ZL_OP(packus_epi16)(c.v[0], c.v[1])));
}
#endif

ZL_FN Tensors at_group(const Tensors& t, int64_t k) {
  const int64_t i = k * kGroup;
  return {t.param + i, t.rest + i, t.m + i, t.v + i, t.scales + 2 * k, t.g + i};
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
ZL_FN void set_scales(Staged& x, const Tensors& t, Tops top) {
  if (top.m > kInfinity) top.m = plain_moments(x);
  x.past = top.v > kLargest;
  t.scales[0] = scale_of<MomentCode>(top.m);
  t.scales[1] = scale_of<SquareCode>(x.past ? kLargest : top.v);
  x.in_m = to_units<MomentCode>(t.scales[0]);
  x.in_v = to_units<SquareCode>(t.scales[1]);
}

// Whether read_words() has other bits than adam_averages(): first moments that are infinite as floats, and not as products
// before they are rounded; beta2 times units of second moments below what floats hold exactly.
ZL_FN bool is_rare(const uint8_t* scales, float beta2) {
  constexpr uint8_t infinite = 255 - MomentCode::kLowest;
  return scales[0] >= infinite || (beta2 != 0.0f && from_units<SquareCode>(scales[1]) * beta2 < 0x1p-126f);
}
__attribute__((noinline)) Tops read_plain(Staged& x, const Tensors& t, const uint16_t* g, const AdamRow& r) {
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

// Patterns of a group of the averaged gradient, as average() and narrow() make them, but for NaNs, which keep their bits. Of a
// pair of words each is a float where it lies, but for a shift of the lower one. A loop of its own: inside the stages' it
// leaves too few registers.
ZL_FN void average_group(uint16_t* to, const Sources& s, int64_t at) {
  const Ints bit = all(0x10000u), below_half = all(0x7fffu), upper = all(0xffff0000u);
  const uint16_t* const* const from = reinterpret_cast<const uint16_t* const*>(s.data);
  const Floats mean = ZL_OP(set1_ps)(s.mean);
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
  }
}
__attribute__((noinline)) void make_words_plain(uint16_t* g) {
  for (int i = 0; i < kGroup; ++i) g[i] = nearest_even(widen(bf16{g[i]}));
}

// One turn, `stages` of which have a group: hand[i] was read i turns before. `average`: the gradient is that of `s`, from `start`.
template <bool average, bool l2, int stages>
ZL_FN void turn(const Tensors& all_groups, const Sources& s, int64_t start, int64_t k, Staged* const* hand, const WideRow& r,
                const MomentRow& row, const Constants& c) {
  constexpr bool read = stages & kRead, step = stages & kStepping, write = stages & kWrite;
  const Tensors first = at_group(all_groups, read ? k : 0), stepped = at_group(all_groups, step ? k - kStepAfter : 0);
  const Tensors written = at_group(all_groups, write ? k - kWriteAfter : 0);
  Staged& now = *hand[0];
  Staged& last = *hand[kWriteAfter];
  Units from = {}, to = {};
  if constexpr (read)
    from = {ZL_OP(set1_ps)(from_units<MomentCode>(first.scales[0])),
            ZL_OP(set1_ps)(from_units<SquareCode>(first.scales[1]) * row.adam.beta2)};
  if constexpr (write) {
    if (last.past) end_at_largest(last.v);
    to = {ZL_OP(set1_ps)(last.in_m), ZL_OP(set1_ps)(last.in_v)};
  }
  if constexpr (read) ahead(first.param), ahead(first.rest), ahead(first.m), ahead(first.v);
  if constexpr (read && !average) ahead(first.g);
  if constexpr (read && average) average_group(now.g, s, start + k * kGroup);
  Ints tops[2] = {zeros(), zeros()};
#pragma GCC unroll 1
  for (int at = 0; at < kGroup; at += kCodes) {
    Ints mw[2], vw[2];
    Codes codes;
    if constexpr (read) words_of_moments(mw, first.m + at, c);
    if constexpr (read) words_of_squares(vw, first.v + at, c);
    const auto half = [&]<int j>() __attribute__((always_inline)) {
      const int here = at + kWords * j;
      if constexpr (read) {
        const Ints gw = load((average ? now.g : first.g) + here);
        read_words<l2>(now, here, first, gw, mw[j], vw[j], from, r, c, tops);
      }
      if constexpr (stages & kRoot) root_words(*hand[kRootAfter], here);
      if constexpr (stages & kDivide) eps_words(*hand[kDivideAfter], here, r);
      if constexpr (write) write_words<j>(codes, last, here, load((average ? last.g : written.g) + here), to, r, c);
      if constexpr (step) step_words(*hand[kStepAfter], here, stepped, r, c);
      if constexpr (stages & kDivide) divide_words(*hand[kDivideAfter], here);
    };
    half.template operator()<0>();
    half.template operator()<1>();
    if constexpr (write) store_codes(written, at, codes, c);
  }
  if constexpr (read) {
    Tops top = largest(tops);
    const bool nan = average && top.m > kInfinity;
    if (nan) make_words_plain(now.g);
    if (nan || is_rare(first.scales, row.adam.beta2)) top = read_plain(now, first, average ? now.g : first.g, row.adam);
    set_scales(now, first, top);
  }
}

// Whole groups, by the gradients in `tensors`, or (`average`) by that of `s` from element `start` on.
template <bool average, bool l2>
__attribute__((noinline)) void adam_codes(const Tensors& tensors, const Sources& s, int64_t start, const MomentRow& row,
                                          int64_t groups) {
  const Tensors t = tensors;
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

ZL_FN Tensors tensors_at(const MomentTensors& x, int64_t at) {
  return {static_cast<uint16_t*>(x.param) + at, static_cast<int16_t*>(x.rest) + at, static_cast<uint8_t*>(x.m) + at,
          static_cast<uint8_t*>(x.v) + at,      x.scales + at / kGroup * 2,         nullptr};
}

// Groups from element `at` on, by the average of their sources.
ZL_FN void adam_whole(const MomentTensors& x, const Sources& s, const MomentRow& row, int64_t at, int64_t groups) {
  Tensors t = tensors_at(x, at);
  t.g = static_cast<const uint16_t*>(s.data[0]) + at;
  const bool average = s.count > 1 || s.mean != 1.0f;
  if (row.adam.l2 != 0.0f)
    return average ? adam_codes<true, true>(t, s, at, row, groups) : adam_codes<false, true>(t, s, at, row, groups);
  return average ? adam_codes<true, false>(t, s, at, row, groups) : adam_codes<false, false>(t, s, at, row, groups);
}

// A parameter's last group of `left` elements, by a gradient that is padded.
ZL_FN void adam_last(const MomentTensors& x, const Sources& s, const uint16_t* g, const MomentRow& row, int64_t at,
                     int64_t left) {
  uint16_t param[kGroup] = {};
  int16_t rest[kGroup] = {};
  uint8_t m[kGroup] = {}, v[kGroup] = {};
  const Tensors end = tensors_at(x, at);
  copy(param, end.param, left);
  copy(rest, end.rest, left);
  copy(m, end.m, left);
  copy(v, end.v, left);
  adam_codes<false, true>({param, rest, m, v, end.scales, g}, s, 0, row, 1);
  copy(end.param, param, left);
  copy(end.rest, rest, left);
  copy(end.m, m, left);
  copy(end.v, v, left);
}

}  // namespace
}  // namespace zerolite
#endif
