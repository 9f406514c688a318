// Copies that look at magnitudes on the way: a part of kernels_cpu.cpp, compiled once for each instruction set.
#pragma once

#include "ahead_cpu.h"

namespace zerolite {
namespace {

#if defined(__AVX512F__)
constexpr int kLine = 64;
#elif defined(__AVX2__)
constexpr int kLine = 32;
#else
constexpr int kLine = 16;
#endif
typedef int64_t Line __attribute__((vector_size(kLine), may_alias));

// Stores an aligned line past the caches: no read of what it overwrites, and what they hold stays.
ZL_FN void store_past(void* to, const Line& line) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)line);
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)line);
#elif defined(__x86_64__)
  _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)line);
#else
  memcpy(to, &line, kLine);
#endif
}
// Other threads see the lines before anything that this thread stores later.
ZL_FN void fence_past() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Copies what a block holds. past: whole lines go past the caches, where `to` begins with one; `fence_past` ends it.
ZL_FN void put(void* to_, const void* from_, int64_t bytes, bool past) {
  char* to = static_cast<char*>(to_);
  const char* from = static_cast<const char*>(from_);
  int64_t i = 0;
  if (past && reinterpret_cast<uintptr_t>(to) % kLine == 0) {
    for (; i + kLine <= bytes; i += kLine) {
      Line x;
      memcpy(&x, from + i, kLine);
      store_past(to + i, x);
    }
  }
  memcpy(to + i, from + i, bytes - i);
}

// The magnitude of the least binary16 that is not below `limit`.
ZL_FN int32_t size_of_half(float limit) {
  const half nearest = static_cast<half>(limit);
  uint16_t bits;
  memcpy(&bits, &nearest, 2);
  return bits + (widen(nearest) < limit);
}

template <class I>
ZL_FN I magnitude(I x) {
  return static_cast<I>(x & (sizeof(I) == 2 ? 0x7fff : 0x7fffffff));
}

// Copies n elements whose bits are an I; true where a magnitude's bits are `top` or more (NaN is above all).
template <class I>
ZL_FN bool copy_sizes(void* to_, const void* from_, int64_t n, int32_t top, bool past) {
  typedef I Lane __attribute__((vector_size(kLine), may_alias));
  constexpr int64_t kWidth = kLine / sizeof(I);
  char* to = static_cast<char*>(to_);
  const char* from = static_cast<const char*>(from_);
  const auto single = [&](int64_t i) {
    I x;
    memcpy(&x, from + i * sizeof(I), sizeof x);
    memcpy(to + i * sizeof(I), &x, sizeof x);
    return magnitude(x) >= top;
  };
  bool any = false;
  int64_t i = 0;
  const uintptr_t off = reinterpret_cast<uintptr_t>(to) % kLine;
  for (const int64_t head = off == 0 ? 0 : static_cast<int64_t>(kLine - off) / static_cast<int64_t>(sizeof(I));
       i < n && i < head; ++i)
    any |= single(i);
  past = past && (reinterpret_cast<uintptr_t>(to) + i * sizeof(I)) % kLine == 0;
  Lane largest = {};
  const I mask = magnitude(static_cast<I>(-1));
  for (; i + kWidth <= n; i += kWidth) {
    Lane x;
    memcpy(&x, from + i * sizeof(I), kLine);
    if (past) {
      if (i + kAhead < n && i * sizeof(I) % 64 < kLine) __builtin_prefetch(from + (i + kAhead) * sizeof(I));
      store_past(to + i * sizeof(I), (Line)x);
    } else {
      memcpy(to + i * sizeof(I), &x, kLine);
    }
    const Lane size = x & mask;
    largest = size > largest ? size : largest;
  }
  for (; i < n; ++i) any |= single(i);
  if (past) fence_past();
  for (int64_t k = 0; k < kWidth; ++k) any |= largest[k] >= top;
  return any;
}

}  // namespace
}  // namespace zerolite
