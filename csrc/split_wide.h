// The exact update of bf16 parameters in vectors of 256 bits (AVX2): a part of kernels_cpu.cpp, which has plain loops of the
// same for every other instruction set and dtype.
//
// Intrinsics, since with AVX2 the plain loops are bound by instructions and by how far a processor looks ahead: it takes a
// fifth more of them to join, split and average, and a root is followed by the quotient that waits for it. Here the roots of
// one piece are taken beside the quotients of the piece before.
#pragma once

#include "moments_wide.h"

#if defined(__AVX2__) && !defined(__AVX512BW__)
#define ZL_SPLIT_WIDE
namespace zerolite {
namespace {

struct SplitTensors {
  uint16_t* param;
  int16_t* rest;
  float* m;
  float* v;

  ZL_METHOD SplitTensors at(int64_t i) const { return {param + i, rest + i, m + i, v + i}; }
};

struct Pair {
  Floats first, last;  // of kWords elements
};

ZL_FN Pair masters(const SplitTensors& t, int at) {
  const Ints lo = spread(load(t.rest + at));
  const Ints hi = joined(spread(load(t.param + at)), lo);
  return {as_floats(widened(lo, hi, 0)), as_floats(widened(lo, hi, 1))};
}
ZL_FN Pair gradients(const float* g) { return {ZL_OP(loadu_ps)(g), ZL_OP(loadu_ps)(g + kFloats)}; }
ZL_FN Pair gradients(const uint16_t* g) {
  const Ints words = spread(load(g));
  return {as_floats(widened(zeros(), words, 0)), as_floats(widened(zeros(), words, 1))};
}

// As adam_averages(), and what the first moment is divided by.
template <bool l2>
ZL_FN void averages(Floats g, Floats p, float* m, float* v, float* divisor, const WideRow& r) {
  g = g * r.grad_scale;
  if constexpr (l2) g = g + r.l2 * p;
  const Floats before = ZL_OP(loadu_ps)(m);
  const Floats square = ZL_OP(loadu_ps)(v) * r.beta2 + (g * g) * r.mix2;
  ZL_OP(storeu_ps)(m, before + (g - before) * r.mix1);
  ZL_OP(storeu_ps)(v, square);
  ZL_OP(store_ps)(divisor, ZL_OP(sqrt_ps)(square) + r.eps);
}
// As adam_step().
ZL_FN Floats stepped(Floats p, const float* m, const float* divisor, const WideRow& r) {
  return p * r.decay - r.step_size * ZL_OP(div_ps)(ZL_OP(loadu_ps)(m), ZL_OP(load_ps)(divisor));
}
ZL_FN void split_words(const SplitTensors& t, int at, Floats first, Floats last, Ints halves) {
  const Ints x = ZL_OP(shuffle_epi8)(as_ints(first), halves), y = ZL_OP(shuffle_epi8)(as_ints(last), halves);
  const Ints lo = gathered(ZL_OP(unpacklo_epi64)(x, y)), hi = gathered(ZL_OP(unpackhi_epi64)(x, y));
  store(t.rest + at, lo);
  store(t.param + at, parted(hi, lo));
}
__attribute__((noinline)) void split_plain(const SplitTensors& t) {
  for (int i = 0; i < kPiece; ++i) split(plain(join(t.param[i], t.rest[i])), t.param[i], t.rest[i]);
}

// A piece begins (`read`: averages and divisors, by the gradients at g) while the one before it ends (`write`: masters).
template <bool l2, bool read, bool write, class G>
ZL_FN void split_turn(const SplitTensors& begins, const G* g, float* divisors, const float* before, const WideRow& r,
                      Ints halves) {
  const SplitTensors ends = begins.at(write ? -kPiece : 0);
  Floats any = as_floats(zeros());  // NaN where a master is, or where infinities meet
  if constexpr (read) ahead(begins.param), ahead(begins.rest), ahead(begins.m), ahead(begins.v);
#pragma GCC unroll 4
  for (int i = 0; i < kPiece; i += kWords) {
    if constexpr (read) {
      const Pair p = l2 ? masters(begins, i) : Pair{}, by = gradients(g + i);
      averages<l2>(by.first, p.first, begins.m + i, begins.v + i, divisors + i, r);
      averages<l2>(by.last, p.last, begins.m + i + kFloats, begins.v + i + kFloats, divisors + i + kFloats, r);
    }
    if constexpr (write) {
      const Pair p = masters(ends, i);
      const Floats first = stepped(p.first, ends.m + i, before + i, r);
      const Floats last = stepped(p.last, ends.m + i + kFloats, before + i + kFloats, r);
      any = any + (first + last);
      split_words(ends, i, first, last, halves);
    }
  }
  if constexpr (write)
    if (__builtin_expect(any_nan(any), 0)) split_plain(ends);
}

// Averaged gradients of a piece, as average() makes them: where they lie, or in `space`.
ZL_FN void average_piece(uint16_t* to, const Sources& s, int64_t at) { average_group<true>(to, s, at); }
ZL_FN void average_piece(float* to, const Sources& s, int64_t at) { average_pieces<float>(to, s, at, kPiece); }
template <class G>
ZL_FN const G* averaged(G* space, const Sources& s, int64_t at) {
  if (s.count > 1 || s.mean != 1.0f) {
    average_piece(space, s, at);
    return space;
  }
  ahead_of<G>(s, at);
  return static_cast<const G*>(s.data[0]) + at;
}

// Whole pieces from element `at` on.
template <bool l2, class G>
__attribute__((noinline)) void adam_split(const SplitTensors& tensors, const Sources& s, const AdamRow& row, int64_t at,
                                          int64_t pieces) {
  static_assert(kPiece == kGroup);
  const WideRow r({row, 0});
  const Ints halves = split_order();
  alignas(64) G space[kPiece];
  alignas(64) float divisors[2][kPiece];
  SplitTensors t = tensors.at(at);
  split_turn<l2, true, false>(t, averaged(space, s, at), divisors[0], divisors[1], r, halves);
  for (int64_t k = 1; k < pieces; ++k) {
    t = t.at(kPiece), at += kPiece;
    split_turn<l2, true, true>(t, averaged(space, s, at), divisors[k % 2], divisors[1 - k % 2], r, halves);
  }
  split_turn<l2, false, true>(t.at(kPiece), space, divisors[pieces % 2], divisors[1 - pieces % 2], r, halves);
}

template <class G>
void adam_split(const SplitTensors& t, const Sources& s, const AdamRow& r, int64_t at, int64_t pieces) {
  if (r.l2 != 0.0f) return adam_split<true, G>(t, s, r, at, pieces);
  adam_split<false, G>(t, s, r, at, pieces);
}

// Returns the first element that is left: there is no whole piece of them, or their gradients have another dtype.
int64_t adam_split_any(const AdamTensors& x, const Sources& s, const AdamRow& r, int64_t start, int64_t stop) {
  const SplitTensors t = {static_cast<uint16_t*>(x.param), static_cast<int16_t*>(x.rest), x.m, x.v};
  const int64_t pieces = (stop - start) / kPiece;
  if (pieces == 0 || s.dtype == Dtype::kHalf) return start;
  s.dtype == Dtype::kFloat ? adam_split<float>(t, s, r, start, pieces) : adam_split<uint16_t>(t, s, r, start, pieces);
  return start + pieces * kPiece;
}

}  // namespace
}  // namespace zerolite
#endif
