// Exact sums of squares: a part of kernels_cpu.cpp, compiled once for each instruction set.
//
// Squares of bf16 and binary16 are short, and most blocks of gradients lie within 20 or 17 binades: there values are integers
// below 2^27, and a block's squares add up within 64 bits. The window is that of the block before; one that does not fit is
// summed as follows, and the next one gets a window of its own.
//
// Two accumulators a lane take in values whose exponents lie within a window, each without rounding: a binary64 that begins
// at a power of two above all sums keeps what of a square lies above its last bit, and another adds up what is left of it
// below. A window spans 22 binades or more. What lies below it takes another turn with the next one, which gradients rarely
// need.
#pragma once

#include "copy_cpu.h"

namespace zerolite {
namespace {

constexpr int64_t kSquares = 1024;
constexpr int kWide = kLine / 8;             // binary64 values of a register
constexpr int kWindows = kWide == 8 ? 2 : 4;  // side by side, so that an addition need not wait for the one before
constexpr int64_t kTurn = kWide * kWindows;
static_assert(kSquares / kTurn <= 128);
typedef float FloatLanes __attribute__((vector_size(4 * kWide)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kWide)));
typedef double DoubleLanes __attribute__((vector_size(8 * kWide)));

constexpr int kUnit = -298;  // exponent of the limbs' unit: the square of the least binary32
constexpr uint32_t kInf = 255;  // biased exponent of what is not finite

// Binades of a window: see `Window`. The last bit of a square lies twice the fraction bits below it.
template <class T>
constexpr int kBinades = 45 - 7;  // bf16
template <>
constexpr int kBinades<half> = 45 - 10;
template <>
constexpr int kBinades<float> = 45 - 23;
// Binades in which values are integers below 2^kWord.
constexpr int kWord = 27;
template <class T>
constexpr int kIntegers = kWord - 7;  // bf16
template <>
constexpr int kIntegers<half> = kWord - 10;
template <>
constexpr int kIntegers<float> = kWord - 23;  // too few

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

// The same of two words.
ZL_FN void add_wide(int64_t* limbs, unsigned __int128 value, int shift) {
  add_shifted(limbs, static_cast<uint64_t>(value), shift);
  if (value >> 64) add_shifted(limbs, static_cast<uint64_t>(value >> 64), shift + 64);
}

ZL_FN double power(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

ZL_FN int exponent_of(uint32_t size) { return size >> 23 > 1 ? static_cast<int>(size >> 23) : 1; }

ZL_FN IntLanes bits_of(const float* g) {
  IntLanes bits;
  memcpy(&bits, g, sizeof bits);
  return bits;
}

// The exact sum of squares of values below 2^(e - 126), up to 128 in each lane.
//
// high begins at 2^c, c = 2 e - 244, and its sums stay below twice that, so its last bit is 2^(c - 52) all along. What a
// square loses there is at most half of that, and 128 of these add without rounding to multiples of 2^(c - 99): squares of
// values of biased exponents from e - 44 + fraction bits up.
struct Window {
  DoubleLanes high, low;

  static ZL_METHOD int begin(int e) { return 2 * e - 244; }
  ZL_METHOD void clear(int e) {
    high = DoubleLanes{} + power(begin(e));
    low = DoubleLanes{};
  }
  ZL_METHOD void add(const IntLanes& bits) {
    const DoubleLanes x = __builtin_convertvector((FloatLanes)bits, DoubleLanes), square = x * x, sum = high + square;
    low += square - (sum - high);
    high = sum;
  }
};

// limbs += the sums of windows that began at e.
ZL_FN void add_windows(int64_t* limbs, const Window (&windows)[kWindows], int e) {
  const int c = Window::begin(e), last = c - 99 > kUnit ? c - 99 : kUnit;
  const double begin = power(c), up = power(52 - c), down = power(-last);
  int64_t high = 0, low = 0;
  for (const Window& window : windows)
    for (int k = 0; k < kWide; ++k) {
      high += static_cast<int64_t>((window.high[k] - begin) * up);
      low += static_cast<int64_t>(window.low[k] * down);
    }
  const unsigned __int128 sum = (static_cast<unsigned __int128>(high) << (c - 52 - last)) + static_cast<__int128>(low);
  add_wide(limbs, sum, last - kUnit);
}

// Where one window does not hold all: magnitudes from `from` up to `below`, then what is under it, and so on.
template <class T>
ZL_FN void square_windows(int64_t* limbs, const float* g, int64_t n) {
  for (uint32_t below = kInf << 23, from;; below = from) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t size = as_bits(g[i]) & 0x7fffffffu, candidate = size < below ? size : 0;
      top = candidate > top ? candidate : top;
    }
    if (top == 0) return;
    const int e = exponent_of(top);
    from = e >= kBinades<T> ? static_cast<uint32_t>(e - kBinades<T> + 1) << 23 : 1;
    Window windows[kWindows];
    for (Window& window : windows) window.clear(e);
    for (int64_t i = 0; i < n; i += kTurn)
      for (int k = 0; k < kWindows; ++k) {
        const IntLanes size = bits_of(g + i + k * kWide) & 0x7fffffff;
        windows[k].add(size & (size < static_cast<int32_t>(below)) & (size >= static_cast<int32_t>(from)));
      }
    add_windows(limbs, windows, e);
  }
}

// limbs += squares of g[0, n), of dtype T; n is a multiple of kTurn and at most kSquares. `top` and `least` are the
// bits of its largest and of its smallest magnitude above 0.
template <class T>
ZL_FN void square_block(int64_t* limbs, const float* g, int64_t n, uint32_t top, uint32_t least) {
  const int e = exponent_of(top);
  if (e == static_cast<int>(kInf)) {
    for (int64_t i = 0; i < n; ++i) limbs[kLimbs - 1] += (as_bits(g[i]) & 0x7fffffffu) >= kInf << 23;
    return square_windows<T>(limbs, g, n);
  }
  if (e >= kBinades<T> && exponent_of(least) <= e - kBinades<T>) return square_windows<T>(limbs, g, n);
  Window windows[kWindows];
  for (Window& window : windows) window.clear(e);
  for (int64_t i = 0; i < n; i += kTurn)
    for (int k = 0; k < kWindows; ++k) windows[k].add(bits_of(g + i + k * kWide));
  add_windows(limbs, windows, e);
}

typedef float FloatLine __attribute__((vector_size(kLine)));
typedef int32_t IntLine __attribute__((vector_size(kLine)));
typedef uint32_t WordLine __attribute__((vector_size(kLine)));
typedef uint64_t LongLine __attribute__((vector_size(kLine)));
constexpr int64_t kAcross = kLine / 4;
static_assert(kTurn % kAcross == 0);

// Squares of the lower 32 bits of each.
ZL_FN LongLine squares_of(const LongLine& x) {
#if defined(__AVX512F__)
  return (LongLine)_mm512_mul_epu32((__m512i)x, (__m512i)x);
#elif defined(__AVX2__)
  return (LongLine)_mm256_mul_epu32((__m256i)x, (__m256i)x);
#elif defined(__x86_64__)
  return (LongLine)_mm_mul_epu32((__m128i)x, (__m128i)x);
#else
  return (x & 0xffffffffu) * (x & 0xffffffffu);
#endif
}

// The exact sum of squares of blocks of one dtype.
//
// total counts squares of 2^(e - 126 - kWord); e is the biased exponent that magnitudes of the next block may have, 0: none yet.
template <class T>
struct Squares {
  int64_t* limbs;
  unsigned __int128 total = 0;
  int e = 0;

  ZL_METHOD void move(int to) {
    if (total != 0) add_wide(limbs, total, 2 * (e - 126 - kWord) - kUnit);
    total = 0;
    e = to;
  }

  // n is a multiple of kTurn and at most kSquares, so that the sum of a block stays below 2^64.
  ZL_METHOD void add(const float* g, int64_t n) {
    const bool integers = kIntegers<T> > 16 && e > 0;
    const FloatLine scale = FloatLine{} + static_cast<float>(power(integers ? kWord + 126 - e : 0));
    WordLine top = {}, least = ~top;  // of magnitudes less 1, so that 0 is above all
    LongLine even = {}, odd = {};
    const auto look = [&](bool multiply) __attribute__((always_inline)) {
      for (int64_t i = 0; i < n; i += kAcross) {
        WordLine size;
        memcpy(&size, g + i, sizeof size);
        size &= 0x7fffffffu;
        const WordLine less = size - 1;
        top = size > top ? size : top;
        least = less < least ? less : least;
        if (!multiply) continue;
        const LongLine word = (LongLine)__builtin_convertvector((FloatLine)size * scale, IntLine);
        even += squares_of(word);
        odd += squares_of(word >> 32);
      }
    };
    integers ? look(true) : look(false);
    uint32_t largest = 0, smallest = ~0u;
    for (int64_t k = 0; k < kAcross; ++k) {
      largest = top[k] > largest ? top[k] : largest;
      smallest = least[k] < smallest ? least[k] : smallest;
    }
    if (largest == 0) return;
    ++smallest;
    if (integers && exponent_of(largest) <= e && exponent_of(smallest) > e - kIntegers<T>) {
      even += odd;
      uint64_t sum = 0;
      for (int64_t k = 0; k < kAcross / 2; ++k) sum += even[k];
      total += sum;
      return;
    }
    square_block<T>(limbs, g, n, largest, smallest);
    const int next = exponent_of(largest) + 1;  // with room above; from 26 on its scale is a binary32
    move(next >= 26 && next < static_cast<int>(kInf) ? next : 0);
  }
};

}  // namespace
}  // namespace zerolite
