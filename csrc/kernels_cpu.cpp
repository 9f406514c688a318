// CPU loops over adam_math.h, compiled once for each instruction set (ZL_TABLE names the result).
// Plain loops: the compiler vectorises them, and body and tail are the same expression. Nothing from
// the C++ library is used here: an inline function compiled for AVX-512 could be the copy that the
// linker keeps for every caller.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef ZL_TABLE
#error "compile with -DZL_TABLE=kBaseline|kAvx2|kAvx512|kAvx512Vbmi and -DZL_NAME=\"...\""
#endif

namespace zerolite {
namespace {

constexpr int64_t kBlock = 1024;  // gradients of one block stay in L1 between the sum and what becomes of it
constexpr int64_t kTurns = 256;   // of an update, whose streams then come to memory in an even mix

ZL_FN float root(float x) { return __builtin_sqrtf(x); }

}  // namespace
}  // namespace zerolite

#include "ahead_cpu.h"
#include "copy_cpu.h"
#include "half_cpu.h"
#include "moments_wide.h"
#include "moments_cpu.h"
#include "square_cpu.h"

namespace zerolite {
namespace {

// g[0, n) = round_to<G>(mean * (source 0 + source 1 + ...)), the averaged gradient as a G holds it.
template <class G>
ZL_FN void average(float* __restrict g, const Sources& s, int64_t at, int64_t n) {
  const G* __restrict first = static_cast<const G*>(s.data[0]) + at;
  if (s.count == 1 && s.mean == 1.0f) {
    for (int64_t i = 0; i < n; ++i) g[i] = widen(first[i]);
    return;
  }
  if (s.count == 1) {
    for (int64_t i = 0; i < n; ++i) g[i] = round_to<G>(widen(first[i]) * s.mean);
    return;
  }
  const G* __restrict last = static_cast<const G*>(s.data[s.count - 1]) + at;
  if (s.count == 2) {
    for (int64_t i = 0; i < n; ++i) g[i] = round_to<G>((widen(first[i]) + widen(last[i])) * s.mean);
    return;
  }
  const G* __restrict second = static_cast<const G*>(s.data[1]) + at;
  for (int64_t i = 0; i < n; ++i) g[i] = widen(first[i]) + widen(second[i]);
  for (int k = 2; k < s.count - 1; ++k) {
    const G* __restrict next = static_cast<const G*>(s.data[k]) + at;
    for (int64_t i = 0; i < n; ++i) g[i] = g[i] + widen(next[i]);
  }
  for (int64_t i = 0; i < n; ++i) g[i] = round_to<G>((g[i] + widen(last[i])) * s.mean);
}

ZL_FN void average_half(float* __restrict g, const Sources& s, int64_t at, int64_t n) {
  alignas(64) float next[kBlock];
  alignas(64) half rounded[kBlock];
  widen_all(g, static_cast<const half*>(s.data[0]) + at, n);
  for (int k = 1; k < s.count; ++k) {
    widen_all(next, static_cast<const half*>(s.data[k]) + at, n);
    for (int64_t i = 0; i < n; ++i) g[i] = g[i] + next[i];
  }
  if (s.count == 1 && s.mean == 1.0f) return;
  for (int64_t i = 0; i < n; ++i) g[i] = g[i] * s.mean;
  narrow_all(rounded, g, n);
  widen_all(g, rounded, n);
}

// In pieces, with requests for the same of what comes later.
template <class G>
void average_pieces(float* g, const Sources& s, int64_t at, int64_t n) {
  int64_t k = 0;
  for (; k + kPiece <= n; k += kPiece) {
    ahead_of<G>(s, at + k);
    average<G>(g + k, s, at + k, kPiece);
  }
  average<G>(g + k, s, at + k, n - k);
}

void average_any(float* g, const Sources& s, int64_t at, int64_t n) {
  switch (s.dtype) {
    case Dtype::kFloat: return average_pieces<float>(g, s, at, n);
    case Dtype::kBFloat16: return average_pieces<bf16>(g, s, at, n);
    case Dtype::kHalf: return average_half(g, s, at, n);
  }
}

// For what is rounded: processors keep the bits of a NaN that they compute with, so those of gradients decide. bf16 ones have
// no low bits.
void average_plain(float* g, const Sources& s, int64_t at, int64_t n) {
  average_any(g, s, at, n);
  if (s.dtype == Dtype::kBFloat16) return;
  for (int64_t i = 0; i < n; ++i) g[i] = plain(g[i]);
}

}  // namespace
}  // namespace zerolite

#include "split_wide.h"

namespace zerolite {
namespace {

// Elements [0, n) of fp32 parameters or masters. Values are in locals in between: what is stored could else be another stream,
// as far as the compiler can tell here.
ZL_FN void adam_masters(float* p, float* m, float* v, const float* g, const AdamRow& r, int64_t n) {
  ahead(p), ahead(m), ahead(v);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    float p_ = p[i], m_ = m[i], v_ = v[i];
    adam(g[i], p_, m_, v_, r, root);
    p[i] = p_, m[i] = m_, v[i] = v_;
  }
}

// A piece of the update, of each dtype of parameters. n is kPiece, which loops then know, or less.
struct AdamFloat {
  ZL_METHOD void operator()(const AdamTensors& t, const float* g, const AdamRow& r, int64_t at, int64_t n) const {
    adam_masters(static_cast<float*>(t.param) + at, t.m + at, t.v + at, g, r, n);
  }
};
struct AdamSplit {
  ZL_METHOD void operator()(const AdamTensors& t, const float* g, const AdamRow& r, int64_t at, int64_t n) const {
    uint16_t* const hi = static_cast<uint16_t*>(t.param) + at;
    int16_t* const lo = static_cast<int16_t*>(t.rest) + at;
    float* const m = t.m + at;
    float* const v = t.v + at;
    ahead(hi), ahead(lo), ahead(m), ahead(v);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      float p_ = join(hi[i], lo[i]), m_ = m[i], v_ = v[i];
      adam(g[i], p_, m_, v_, r, root);
      m[i] = m_, v[i] = v_;
      split(plain(p_), hi[i], lo[i]);  // a moment of a checkpoint that a GPU wrote may be a NaN with low bits
    }
  }
};
struct AdamHalf {
  ZL_METHOD void operator()(const AdamTensors& t, const float* g, const AdamRow& r, int64_t at, int64_t n) const {
    half* const param = static_cast<half*>(t.param) + at;
    float* const master = static_cast<float*>(t.rest) + at;
    ahead(param);
    adam_masters(master, t.m + at, t.v + at, g, r, n);
    narrow_all(param, master, n);
  }
};

template <class Update>
void update_pieces(const Update& update, const AdamTensors& t, const Sources& s, const AdamRow& row, int64_t start,
                   int64_t stop) {
  const AdamRow r = row;
  alignas(64) float g[kTurns];
  for (int64_t at = start; at < stop; at += kTurns) {
    const int64_t n = stop - at < kTurns ? stop - at : kTurns;
    average_any(g, s, at, n);
    int64_t k = 0;
    for (; k + kPiece <= n; k += kPiece) update(t, g + k, r, at + k, kPiece);
    if (k < n) update(t, g + k, r, at + k, n - k);
  }
}

void reduce_adam(const AdamTensors& t, const Sources& s, const AdamRow& r, int64_t start, int64_t stop) {
#if defined(ZL_SPLIT_WIDE)
  if (t.dtype == Dtype::kBFloat16) start = adam_split_any(t, s, r, start, stop);
#endif
  switch (t.dtype) {
    case Dtype::kFloat: return update_pieces(AdamFloat(), t, s, r, start, stop);
    case Dtype::kBFloat16: return update_pieces(AdamSplit(), t, s, r, start, stop);
    case Dtype::kHalf: return update_pieces(AdamHalf(), t, s, r, start, stop);
  }
}

// The same average as the update of moments takes it: whole groups, in halves where those of the parameter are.
void average_groups(float* __restrict g, const Sources& s, int64_t at, int64_t n, bool halves) {
  const int64_t whole = (n + kGroup - 1) / kGroup * kGroup;
  if (halves && s.dtype == Dtype::kBFloat16 && s.count == 1 && s.mean == 1.0f && n == whole) {
    const bf16* from = static_cast<const bf16*>(s.data[0]) + at;
    for (int64_t k = 0; k < n; k += kGroup) halve(g + k, from + k);
    return;
  }
  alignas(64) float natural[kBlock];
  float* const to = halves ? natural : g;
  average_plain(to, s, at, n);
  for (int64_t i = n; i < whole; ++i) to[i] = 0;
  if (!halves) return;
  for (int64_t k = 0; k < n; k += kGroup) halve(g + k, natural + k);
}

#if defined(__AVX2__)
template <class C>
void reduce_adam_wide(const MomentTensors& t, const Sources& s, const MomentRow& r, int64_t start, int64_t stop) {
  const int64_t groups = (stop - start) / kGroup, at = start + groups * kGroup;
  if (groups > 0) adam_whole<C>(t, s, r, start, groups);
  if (at == stop) return;
  float g[kGroup] = {};
  bf16 words[kGroup];
  average<bf16>(g, s, at, stop - at);
  narrow_all(words, g, kGroup);
  adam_last<C>(t, s, &words[0].bits, r, at, stop - at);
}
#endif

void reduce_adam_moments(const MomentTensors& t, const Sources& s, const MomentRow& r, int64_t start, int64_t stop) {
#if defined(__AVX2__)
  if (t.dtype == Dtype::kBFloat16 && s.dtype == Dtype::kBFloat16)
    return t.bytes ? reduce_adam_wide<uint8_t>(t, s, r, start, stop) : reduce_adam_wide<uint16_t>(t, s, r, start, stop);
#endif
  const bool halves = t.dtype == Dtype::kBFloat16 ? kHalves<uint16_t> : kHalves<float>;
  alignas(64) float g[kBlock];
  for (int64_t at = start; at < stop; at += kBlock) {
    const int64_t n = stop - at < kBlock ? stop - at : kBlock;
    average_groups(g, s, at, n, halves);
    if (t.bytes)
      adam_moments<uint8_t>(t, g, r, at, n);
    else
      adam_moments<uint16_t>(t, g, r, at, n);
  }
}

// What becomes of averages: elements of a tensor of any dtype.
struct Out {
  void* data;
  Dtype dtype;
  bool past;     // by stores that leave the caches as they are
  bool rounded;  // the averages are bf16 values already

  template <class T>
  ZL_METHOD void store(const float* __restrict g, int64_t at, int64_t n) const {
    T* to = static_cast<T*>(data) + at;
    if (!past) return narrow_all(to, g, n);
    alignas(64) T values[kBlock];
    narrow_all(values, g, n);
    put(to, values, n * sizeof(T), true);
  }
  ZL_METHOD void store_rounded(const float* __restrict g, int64_t at, int64_t n) const {
    alignas(64) uint16_t values[kBlock];
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<uint16_t>(as_bits(g[i]) >> 16);
    put(static_cast<uint16_t*>(data) + at, values, n * 2, past);
  }
  void store_any(const float* g, int64_t at, int64_t n) const {
    switch (dtype) {
      case Dtype::kFloat: return past ? put(static_cast<float*>(data) + at, g, n * 4, true) : store<float>(g, at, n);
      case Dtype::kBFloat16: return rounded ? store_rounded(g, at, n) : store<bf16>(g, at, n);
      case Dtype::kHalf: return store<half>(g, at, n);
    }
  }
};

Out out_of(void* data, Dtype dtype, bool past, const Sources& s) {
  const bool rounded = s.dtype == Dtype::kBFloat16 && dtype == s.dtype && (s.count > 1 || s.mean != 1.0f);
  return {data, dtype, past, rounded};
}

void reduce(void* to, Dtype dtype, bool accumulate, bool past, const Sources& s, int64_t start, int64_t stop) {
  alignas(64) float g[kBlock];
  const Out out = out_of(to, dtype, past, s);
  for (int64_t at = start; at < stop; at += kBlock) {
    const int64_t n = stop - at < kBlock ? stop - at : kBlock;
    average_any(g, s, at, n);
    if (accumulate) {  // fp32 only, checked in the binding
      float* __restrict sum = static_cast<float*>(to) + at;
      int64_t k = 0;
      for (; k + kPiece <= n; k += kPiece) {
        ahead(sum + k);
        for (int64_t i = k; i < k + kPiece; ++i) sum[i] = sum[i] + g[i];
      }
      for (; k < n; ++k) sum[k] = sum[k] + g[k];
      continue;
    }
    out.store_any(g, at, n);
  }
  if (past) fence_past();
}

// out: null where only the squares are wanted.
template <class T>
ZL_FN void squares(const Out* out, int64_t* limbs, const Sources& s, int64_t start, int64_t stop) {
  static_assert(kSquares == kBlock);
  alignas(64) float g[kBlock];
  Squares<T> total{limbs};
  for (int64_t at = start; at < stop; at += kBlock) {
    const int64_t n = stop - at < kBlock ? stop - at : kBlock;
    average_any(g, s, at, n);
    if (out != nullptr) out->store_any(g, at, n);
    const int64_t whole = (n + kTurn - 1) / kTurn * kTurn;
    for (int64_t i = n; i < whole; ++i) g[i] = 0;
    total.add(g, whole);
  }
  total.move(0);
  if (out != nullptr && out->past) fence_past();
}

void squares_any(const Out* out, int64_t* limbs, const Sources& s, int64_t start, int64_t stop) {
  switch (s.dtype) {
    case Dtype::kFloat: return squares<float>(out, limbs, s, start, stop);
    case Dtype::kBFloat16: return squares<bf16>(out, limbs, s, start, stop);
    case Dtype::kHalf: return squares<half>(out, limbs, s, start, stop);
  }
}

void square_sum(int64_t* limbs, const Sources& s, int64_t start, int64_t stop) {
  squares_any(nullptr, limbs, s, start, stop);
}

void reduce_squares(void* to, Dtype dtype, bool past, int64_t* limbs, const Sources& s, int64_t start, int64_t stop) {
  const Out out = out_of(to, dtype, past, s);
  squares_any(&out, limbs, s, start, stop);
}

template <class T>
bool exceeds_of(const T* __restrict src, float limit, int64_t start, int64_t stop) {
  const uint32_t top = as_bits(limit);  // magnitudes of floats order as their bits do, NaN above all
  for (int64_t at = start; at < stop; at += kBlock) {
    const int64_t n = stop - at < kBlock ? stop - at : kBlock;
    uint32_t any = 0;
    for (int64_t k = 0; k + kPiece <= n; k += kPiece) ahead(src + at + k);
    for (int64_t i = 0; i < n; ++i) any |= static_cast<uint32_t>((as_bits(widen(src[at + i])) & 0x7fffffffu) >= top);
    if (any) return true;
  }
  return false;
}

bool exceeds(const void* src, Dtype dtype, float limit, int64_t start, int64_t stop) {
  switch (dtype) {
    case Dtype::kFloat: return exceeds_of(static_cast<const float*>(src), limit, start, stop);
    case Dtype::kBFloat16: return exceeds_of(static_cast<const bf16*>(src), limit, start, stop);
    case Dtype::kHalf: return exceeds_of(static_cast<const half*>(src), limit, start, stop);
  }
  return false;
}

bool copy(void* to, const void* from, Dtype dtype, float limit, int64_t n, bool past) {
  const int32_t top = static_cast<int32_t>(as_bits(limit));
  switch (dtype) {
    case Dtype::kFloat: return copy_sizes<int32_t>(to, from, n, top, past);
    case Dtype::kBFloat16: return copy_sizes<int16_t>(to, from, n, (top + 0xffff) >> 16, past);
    case Dtype::kHalf: return copy_sizes<int16_t>(to, from, n, size_of_half(limit), past);
  }
  return false;
}

}  // namespace

const Kernels ZL_TABLE = {ZL_NAME, reduce_adam, reduce_adam_moments, reduce, square_sum, reduce_squares, exceeds, copy};

}  // namespace zerolite
