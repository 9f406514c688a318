// Conversions of whole arrays: a part of kernels_cpu.cpp, compiled once for each instruction set. GCC 12 vectorises those of
// _Float16 nowhere; F16C has had them since AVX2, with the same rounding.
#pragma once

#include "kernels.h"

namespace zerolite {
namespace {

template <class T>
ZL_FN void widen_all(float* __restrict to, const T* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}
template <class T>
ZL_FN void narrow_all(T* __restrict to, const float* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(to[i], from[i]);
}

#if defined(__F16C__)
ZL_FN void widen_all(float* __restrict to, const half* __restrict from, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < n; ++i) to[i] = widen(from[i]);
}
ZL_FN void narrow_all(half* __restrict to, const float* __restrict from, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  for (; i < n; ++i) narrow(to[i], from[i]);
}
#endif

}  // namespace
}  // namespace zerolite
