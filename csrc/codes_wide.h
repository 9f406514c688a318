// Vectors of 256 bits (AVX2) or 512 (AVX-512), and in them moments of 8 and 16 bits and back: a part of kernels_cpu.cpp.
// Same formats and bits as moments_cpu.h.
//
// Codes of 8 bits are decoded by a table of 16 bytes, widened by interleaving with zeros (no shift, no mask), and packed with
// saturation, which keeps a sign. Processors that move any bits of a byte in one instruction (GFNI), and any bytes (VBMI), need
// fewer: matrices beside the table, and no packing.
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

// a ^ b ^ c, (a ^ b) & c, (a & b) | c, and what `spare` has not of a, xor b.
#if defined(__AVX512BW__)
ZL_FN Ints differ(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
ZL_FN Ints differ_both(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi64(a, b, c, 0x28); }
ZL_FN Ints both_or(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi64(a, b, c, 0xea); }
ZL_FN Ints without_differ(Ints a, Ints spare, Ints b) { return _mm512_ternarylogic_epi64(a, spare, b, 0x9a); }
#else
ZL_FN Ints differ(Ints a, Ints b, Ints c) { return differ(differ(a, b), c); }
ZL_FN Ints differ_both(Ints a, Ints b, Ints c) { return both(differ(a, b), c); }
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
ZL_FN Ints raised_above_0(Ints x, Ints unless, Ints least) {
  return _mm512_mask_max_epu32(x, _mm512_test_epi32_mask(unless, unless), x, least);
}
ZL_FN Ints plus_odd(Ints to, Ints x, Ints bit) {
  return _mm512_mask_sub_epi32(to, _mm512_test_epi32_mask(x, bit), to, all(~0u));
}
ZL_FN Ints nan_where(Ints x, Ints value, Ints nan) {  // x is one
  return _mm512_mask_mov_epi32(value, _mm512_cmp_ps_mask(as_floats(x), as_floats(x), _CMP_UNORD_Q), nan);
}
ZL_FN bool any_nan(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
ZL_FN __m256i folded(Ints x) { return _mm256_max_epu32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1)); }
#else
// Packing and unpacking work in halves: the middle quarters change places before, or after.
ZL_FN Ints spread(Ints x) { return _mm256_permute4x64_epi64(x, 0xd8); }
ZL_FN Ints gathered(Ints x) { return spread(x); }
ZL_FN Ints repeat(__m128i x) { return _mm256_set_m128i(x, x); }
ZL_FN Ints where_bytes(Ints x, Ints value) { return without(value, _mm256_cmpeq_epi8(x, zeros())); }
ZL_FN Ints raised(Ints x, Ints least) { return _mm256_sign_epi32(_mm256_max_epu32(x, least), x); }  // no x is negative
ZL_FN Ints raised_above_0(Ints x, Ints unless, Ints least) {
  return _mm256_max_epu32(x, without(least, _mm256_cmpeq_epi32(unless, zeros())));
}
ZL_FN Ints plus_odd(Ints to, Ints x, Ints bit) { return _mm256_add_epi32(to, _mm256_srli_epi32(both(x, bit), 16)); }
ZL_FN Ints nan_where(Ints x, Ints value, Ints nan) {  // x is one
  return _mm256_blendv_epi8(value, nan, as_ints(_mm256_cmp_ps(as_floats(x), as_floats(x), _CMP_UNORD_Q)));
}
ZL_FN bool any_nan(Floats x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
ZL_FN __m256i folded(Ints x) { return x; }
#endif

// Elements of kWords words go to two vectors of floats, in each part of 128 bits the first four and the last: to where
// placed() says. Packing is the reverse.
ZL_FN Ints widened(Ints low, Ints high, int half) {
  return half == 0 ? ZL_OP(unpacklo_epi16)(low, high) : ZL_OP(unpackhi_epi16)(low, high);
}

ZL_FN int placed(int n) { return n / kWords * kWords + n % 8 / 4 * kFloats + n % kWords / 8 * 4 + n % 4; }

// Of masters and words: upper words of masters as join() makes them of a parameter's and a remainder's words, those of the
// parameter as split() makes them of upper and lower words, and the bytes of four masters in order: lower words, upper ones.
ZL_FN Ints joined(Ints hi, Ints lo) { return ZL_OP(add_epi16)(hi, ZL_OP(srai_epi16)(lo, 15)); }
ZL_FN Ints parted(Ints hi, Ints lo) { return ZL_OP(sub_epi16)(hi, ZL_OP(srai_epi16)(lo, 15)); }
ZL_FN Ints split_order() { return repeat(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)); }

struct Constants {
  // Bytes of the bf16 patterns of codes below 16, xor what the rule for codes of higher fields makes of them.
  Ints low_fix, high_fix;
  Ints byte_size, byte_past, byte_sign, split;
#if defined(ZL_BYTES)
  Ints low_bits, high_bits, high_bits_signed, code_bits, sign_bits, byte_order;
  __mmask64 pairs[4];
#else
  Ints byte_exponent, byte_base, byte_fraction, byte_nonzero, word_size, word_byte;
#endif
  Ints size, factor, least;
  Ints nan, largest, low_word, one_word;  // of moments in bf16
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
  Constants c = {load(low),
                 load(high),
                 all_bytes(0x7f),
                 all_bytes(0x70),
                 all_bytes(0x80),
                 split_order(),
#if defined(ZL_BYTES)
                 bits_of({0x08, 0x04, 0x02, 0x01, 0, 0, 0, 0}),
                 bits_of({0, 0, 0, 0, 0x80, 0x40, 0x20, 0x10}),
                 bits_of({0x80, 0, 0, 0, 0, 0x40, 0x20, 0x10}),
                 positions(kDropped),
                 positions(24),
                 byte_order(),
                 {kPair, kPair << 2, kPair << 4, kPair << 6},
#else
                 all_bytes(0x07),
                 all_bytes(0x40),
                 all_bytes(0x0f),
                 all_bytes(0x04),
                 all_words(0x7f),
                 all_words(0xff),
#endif
                 all(0x7fffffffu),
                 all(0x85ebca6bu),
                 all((128u << 23) + kStep),
                 all(kNan),
                 all(kLargest),
                 all(0xffffu),
                 all(0x10000u),
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

struct Staged {
  alignas(64) float p[kGroup], m[kGroup], v[kGroup];
  alignas(64) float size[kGroup];  // of m, where moments are bytes
  alignas(64) float d[kGroup];     // root of v, then the quotient
  alignas(64) uint16_t g[kGroup];  // where it is an average
  float in_m, in_v;                // factors to units
  bool past;  // a second moment is above kLargest: it is stored as kLargest, after its root was taken
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

// Words of bf16 patterns of kCodes elements.
ZL_FN void words_of(Ints* m, Ints* v, const uint8_t* codes_m, const uint8_t* codes_v, const Constants& k) {
  words_of_moments(m, codes_m, k);
  words_of_squares(v, codes_v, k);
}
ZL_FN void words_of(Ints* m, Ints* v, const uint16_t* codes_m, const uint16_t* codes_v, const Constants&) {
  for (int j = 0; j < 2; ++j) m[j] = load(codes_m + kWords * j), v[j] = load(codes_v + kWords * j);
}

ZL_FN Ints hash_of(const Staged& x, int at, Ints g, const WideRow& r, const Constants& k) {  // as dice_of(); g: turned
  return ZL_OP(mullo_epi32)(differ(load(x.p + at), r.salt, g), k.factor);
}

// What becomes codes: patterns in units whose bits from kDropped on are codes, of kFloats elements, after dice are added.
struct Thrown {
  Ints m, v;  // of first moments without their signs
};
ZL_FN Thrown throw_dice(const Staged& x, int at, Ints g, const Units& to, const WideRow& r, const Constants& k) {
  const Ints dice = ZL_OP(srli_epi32)(hash_of(x, at, g, r, k), 32 - kDropped);
  const Floats y = ZL_OP(load_ps)(x.size + at) * to.m;  // as encode_moment()
  const Ints top = as_ints(ZL_OP(max_ps)(y, ZL_OP(fmadd_ps)(y, k.half, k.two)));
  const Ints z = as_ints(ZL_OP(load_ps)(x.v + at) * to.v);  // as encode_square()
  return {ZL_OP(add_epi32)(top, dice), ZL_OP(add_epi32)(raised(z, k.least), dice)};
}

// What write_words() makes of kCodes elements, one half after the other, for store_codes(). C: uint8_t or uint16_t.
template <class C>
struct Codes;

#if defined(ZL_BYTES)
// Codes of a group, in bytes: those of floats 2q and 2q + 1 of the group's vector i are bytes 8q + 2i and 8q + 2i + 1.
template <>
struct Codes<uint8_t> {
  Ints m, sign, v;
};
template <int i>
ZL_FN Ints with_bytes(Ints to, Ints positions, Ints from, const Constants& k) {
  if constexpr (i == 0) return _mm512_multishift_epi64_epi8(positions, from);
  return _mm512_mask_multishift_epi64_epi8(to, k.pairs[i], positions, from);
}
template <int i>
ZL_FN void write_floats(Codes<uint8_t>& to, const Staged& x, Ints g, const Units& units, const WideRow& r, const Constants& k) {
  const Thrown t = throw_dice(x, kFloats * i, g, units, r, k);
  to.m = with_bytes<i>(to.m, k.code_bits, t.m, k);
  to.v = with_bytes<i>(to.v, k.code_bits, t.v, k);
  to.sign = with_bytes<i>(to.sign, k.sign_bits, load(x.m + kFloats * i), k);
}
template <int i>
ZL_FN void write_words(Codes<uint8_t>& to, const Staged& x, int, Ints gw, const Units& units, const WideRow& r,
                       const Constants& k) {
  write_floats<2 * i>(to, x, widened(gw, zeros(), 0), units, r, k);
  write_floats<2 * i + 1>(to, x, widened(gw, zeros(), 1), units, r, k);
}
ZL_FN void store_codes(uint8_t* to_m, uint8_t* to_v, const Codes<uint8_t>& c, const Constants& k) {
  const Ints m = _mm512_ternarylogic_epi64(k.byte_sign, c.sign, c.m, 0xca);  // byte_sign ? sign : m
  store(to_m, _mm512_permutexvar_epi8(k.byte_order, m));
  store(to_v, _mm512_permutexvar_epi8(k.byte_order, c.v));
}
#else
// Words that hold the codes of first moments without signs, their signs, and the codes of second moments.
template <>
struct Codes<uint8_t> {
  Ints m[2], sign[2], v[2];
};
template <int i>
ZL_FN void write_words(Codes<uint8_t>& to, const Staged& x, int at, Ints gw, const Units& units, const WideRow& r,
                       const Constants& k) {
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
ZL_FN void store_codes(uint8_t* to_m, uint8_t* to_v, const Codes<uint8_t>& c, const Constants& k) {
  const Ints sign = ZL_OP(packs_epi16)(c.sign[0], c.sign[1]);
  store(to_m, gathered(both_or(sign, k.byte_sign, ZL_OP(packus_epi16)(c.m[0], c.m[1]))));
  store(to_v, gathered(ZL_OP(packus_epi16)(c.v[0], c.v[1])));
}
#endif

template <>
struct Codes<uint16_t> {
  Ints m[2], v[2];
};
template <int i>
ZL_FN void write_words(Codes<uint16_t>& to, const Staged& x, int at, Ints gw, const Units&, const WideRow& r,
                       const Constants& k) {
  Ints m[2], v[2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const Ints h = hash_of(x, at + kFloats * j, widened(gw, zeros(), j), r, k), high = ZL_OP(srli_epi32)(h, 16);
    const Ints mean = load(x.m + at + kFloats * j);  // as moment_bf16()
    m[j] = ZL_OP(srli_epi32)(ZL_OP(add_epi32)(nan_where(mean, mean, k.nan), high), 16);
    const Ints bits = ZL_OP(min_epu32)(load(x.v + at + kFloats * j), k.largest);  // as square_bf16()
    const Ints thrown = ZL_OP(add_epi32)(bits, differ_both(h, high, k.low_word));
    v[j] = ZL_OP(srli_epi32)(raised_above_0(thrown, bits, k.one_word), 16);
  }
  to.m[i] = ZL_OP(packus_epi32)(m[0], m[1]);
  to.v[i] = ZL_OP(packus_epi32)(v[0], v[1]);
}
ZL_FN void store_codes(uint16_t* to_m, uint16_t* to_v, const Codes<uint16_t>& c, const Constants&) {
  for (int j = 0; j < 2; ++j) store(to_m + kWords * j, c.m[j]), store(to_v + kWords * j, c.v[j]);
}

}  // namespace
}  // namespace zerolite
#endif
