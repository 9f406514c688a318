// Exact sums of squares: a part of kernels_cpu.cpp, compiled once for each instruction set.
//
// 16-bit types: squares of values whose exponents lie within a window add without rounding in binary64 (53 bits): for
// 1024 of them, 10 bits of count + 2 + 2 (binades - 1) + twice the fraction bits. What lies below the window takes
// another turn with the next one; gradients rarely need more than two. binary32: integer sums for each exponent.
#pragma once

#include "kernels.h"

namespace zerolite {
namespace {

constexpr int64_t kSquares = 1024;
constexpr int kWide = 8;
typedef float FloatLanes __attribute__((vector_size(4 * kWide)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kWide)));
typedef double DoubleLanes __attribute__((vector_size(8 * kWide)));

template <class T>
constexpr int kBinades = 14;  // bf16: fractions of 7 bits
template <>
constexpr int kBinades<half> = 11;

// Adds value * 2^shift to the limbs; each limb keeps 32 bits, carries go up.
ZL_FN void add_shifted(int64_t* limbs, uint64_t value, int shift) {
  int k = shift / 32;
  const int low = shift % 32;
  const uint64_t words[3] = {(value << low) & 0xffffffffu, low == 0 ? value >> 32 : (value >> (32 - low)) & 0xffffffffu,
                             low == 0 ? 0 : value >> (64 - low)};
  uint64_t carry = 0;
  for (int i = 0; i < 3 || carry != 0; ++i, ++k) {
    const uint64_t sum = static_cast<uint64_t>(limbs[k]) + (i < 3 ? words[i] : 0) + carry;
    limbs[k] = static_cast<int64_t>(sum & 0xffffffffu);
    carry = sum >> 32;
  }
}

// limbs += squares of g[0, n) in binary32. Neighbours share exponents: four tables avoid waiting on a store.
struct Bins {
  uint64_t table[4][256] = {};
  int64_t count = 0;

  void add(int64_t* limbs, const float* g, int64_t n) {
    for (int64_t i = 0; i < n; i += 4)
      for (int k = 0; k < 4; ++k) {
        const uint32_t bits = as_bits(g[i + k]);
        table[k][square_bin(bits)] += square_of(bits);
      }
    if (table[0][255] | table[1][255] | table[2][255] | table[3][255]) {
      for (int64_t i = 0; i < n; ++i) limbs[kLimbs - 1] += square_bin(as_bits(g[i])) == 255;
      for (auto& bins : table) bins[255] = 0;
    }
    if ((count += n) > (int64_t{1} << 16)) flush(limbs);  // 2^15 squares of 48 bits fit a bin
  }
  void flush(int64_t* limbs) {
    for (int bin = 0; bin < 255; ++bin)
      for (auto& bins : table) {
        if (bins[bin] != 0) add_shifted(limbs, bins[bin], square_shift(bin));
        bins[bin] = 0;
      }
    count = 0;
  }
};

// Adds a sum in binary64 that is a multiple of the limbs' unit, 2^-298.
ZL_FN void add_exact(int64_t* limbs, const DoubleLanes& lanes) {
  double sum = 0;
  for (int k = 0; k < kWide; ++k) sum += lanes[k];
  uint64_t bits;
  memcpy(&bits, &sum, 8);
  if (bits == 0) return;
  const int shift = static_cast<int>(bits >> 52) - 1075 + 298;
  const uint64_t value = (bits & ((uint64_t{1} << 52) - 1)) | uint64_t{1} << 52;
  if (shift >= 0)
    add_shifted(limbs, value, shift);
  else
    add_shifted(limbs, value >> -shift, 0);  // the bits that go are 0
}

ZL_FN IntLanes size_of_lanes(const float* g) {
  IntLanes bits;
  memcpy(&bits, g, sizeof bits);
  return bits & 0x7fffffff;
}

ZL_FN int32_t largest(const IntLanes& sizes) {
  int32_t found = 0;
  for (int k = 0; k < kWide; ++k) found = sizes[k] > found ? sizes[k] : found;
  return found;
}

// The sums over one window, `from` <= magnitude < `below`, and the largest magnitude under it.
struct Window {
  DoubleLanes sum = {};
  IntLanes next = {};

  inline __attribute__((always_inline)) void add(const float* g, int32_t from, int32_t below) {
    const IntLanes size = size_of_lanes(g), under = size < from;
    const IntLanes kept = size & (size < below) & ~under, rest = size & under;
    next = rest > next ? rest : next;
    const DoubleLanes x = __builtin_convertvector((FloatLanes)kept, DoubleLanes);
    sum += x * x;
  }
  inline __attribute__((always_inline)) int32_t flush(int64_t* limbs) {
    add_exact(limbs, sum);
    return largest(next);
  }
};

// limbs += squares of g[0, n), of dtype T (16 bits); n is a multiple of 2 kWide and at most kSquares.
template <class T>
ZL_FN void square_block(int64_t* limbs, const float* g, int64_t n) {
  IntLanes tops = {}, bad = {};
  for (int64_t i = 0; i < n; i += kWide) {
    const IntLanes size = size_of_lanes(g + i), finite = size < 0x7f800000;
    const IntLanes candidate = size & finite;
    tops = candidate > tops ? candidate : tops;
    bad |= ~finite;
  }
  if (largest(bad & 1) != 0)
    for (int64_t i = 0; i < n; ++i) limbs[kLimbs - 1] += (as_bits(g[i]) & 0x7fffffffu) >= 0x7f800000u;
  int32_t below = 0x7f800000, top = largest(tops);
  while (top != 0) {
    const int32_t exponent = top >> 23;
    const int32_t from = exponent >= kBinades<T> ? (exponent - kBinades<T> + 1) << 23 : 1;
    Window even, odd;  // two, so that an addition need not wait for the one before
    for (int64_t i = 0; i < n; i += 2 * kWide) {
      even.add(g + i, from, below);
      odd.add(g + i + kWide, from, below);
    }
    const int32_t a = even.flush(limbs), b = odd.flush(limbs);
    top = a > b ? a : b;
    below = from;
  }
}

}  // namespace
}  // namespace zerolite
