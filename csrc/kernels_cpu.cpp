// CPU loops over adam_math.h, compiled once for each instruction set (ZL_TABLE names the result).
// Plain loops: the compiler vectorises them, and body and tail are the same expression. Nothing from
// the C++ library is used here: an inline function compiled for AVX-512 could be the copy that the
// linker keeps for every caller.
#include "kernels.h"

#ifndef ZL_TABLE
#error "compile with -DZL_TABLE=kBaseline|kAvx2|kAvx512 and -DZL_NAME=\"...\""
#endif

namespace zerolite {
namespace {

constexpr int64_t kBlock = 1024;  // gradients of one block stay in L1 between the sum and the update

ZL_FN float root(float x) { return __builtin_sqrtf(x); }

}  // namespace
}  // namespace zerolite

#include "moments_cpu.h"

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
  for (int64_t i = 0; i < n; ++i) g[i] = widen(first[i]);
  for (int k = 1; k < s.count - 1; ++k) {
    const G* __restrict next = static_cast<const G*>(s.data[k]) + at;
    for (int64_t i = 0; i < n; ++i) g[i] = g[i] + widen(next[i]);
  }
  const G* __restrict last = static_cast<const G*>(s.data[s.count - 1]) + at;
  for (int64_t i = 0; i < n; ++i) g[i] = round_to<G>((g[i] + widen(last[i])) * s.mean);
}

void average_any(float* g, const Sources& s, int64_t at, int64_t n) {
  switch (s.dtype) {
    case Dtype::kFloat: return average<float>(g, s, at, n);
    case Dtype::kBFloat16: return average<bf16>(g, s, at, n);
    case Dtype::kHalf: return average<half>(g, s, at, n);
  }
}

void adam_float(const AdamTensors& t, const float* __restrict g, const AdamRow& r, int64_t at, int64_t n) {
  float* __restrict p = static_cast<float*>(t.param) + at;
  float* __restrict m = t.m + at;
  float* __restrict v = t.v + at;
  for (int64_t i = 0; i < n; ++i) adam(g[i], p[i], m[i], v[i], r, root);
}

void adam_split(const AdamTensors& t, const float* __restrict g, const AdamRow& r, int64_t at, int64_t n) {
  uint16_t* __restrict hi = static_cast<uint16_t*>(t.param) + at;
  int16_t* __restrict lo = static_cast<int16_t*>(t.rest) + at;
  float* __restrict m = t.m + at;
  float* __restrict v = t.v + at;
  for (int64_t i = 0; i < n; ++i) {
    float p = join(hi[i], lo[i]);
    adam(g[i], p, m[i], v[i], r, root);
    split(p, hi[i], lo[i]);
  }
}

void adam_half(const AdamTensors& t, const float* __restrict g, const AdamRow& r, int64_t at, int64_t n) {
  half* __restrict p = static_cast<half*>(t.param) + at;
  float* __restrict master = static_cast<float*>(t.rest) + at;
  float* __restrict m = t.m + at;
  float* __restrict v = t.v + at;
  for (int64_t i = 0; i < n; ++i) {
    adam(g[i], master[i], m[i], v[i], r, root);
    narrow(p[i], master[i]);
  }
}

void reduce_adam(const AdamTensors& t, const Sources& s, const AdamRow& r, int64_t start, int64_t stop) {
  alignas(64) float g[kBlock];
  for (int64_t at = start; at < stop; at += kBlock) {
    const int64_t n = stop - at < kBlock ? stop - at : kBlock;
    average_any(g, s, at, n);
    switch (t.dtype) {
      case Dtype::kFloat: adam_float(t, g, r, at, n); break;
      case Dtype::kBFloat16: adam_split(t, g, r, at, n); break;
      case Dtype::kHalf: adam_half(t, g, r, at, n); break;
    }
  }
}

void reduce_adam_moments(const MomentTensors& t, const Sources& s, const MomentRow& r, int64_t start, int64_t stop) {
  alignas(64) float g[kBlock];
  for (int64_t at = start; at < stop; at += kBlock) {
    const int64_t n = stop - at < kBlock ? stop - at : kBlock;
    average_any(g, s, at, n);
    if (t.bytes)
      adam_moments<uint8_t>(t, g, r, at, n);
    else
      adam_moments<uint16_t>(t, g, r, at, n);
  }
}

template <class T>
ZL_FN void store(void* out, const float* __restrict g, int64_t at, int64_t n) {
  T* __restrict to = static_cast<T*>(out) + at;
  for (int64_t i = 0; i < n; ++i) narrow(to[i], g[i]);
}

void reduce(void* out, Dtype out_dtype, bool accumulate, const Sources& s, int64_t start, int64_t stop) {
  alignas(64) float g[kBlock];
  for (int64_t at = start; at < stop; at += kBlock) {
    const int64_t n = stop - at < kBlock ? stop - at : kBlock;
    average_any(g, s, at, n);
    if (accumulate) {  // fp32 only, checked in the binding
      float* __restrict to = static_cast<float*>(out) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = to[i] + g[i];
      continue;
    }
    switch (out_dtype) {
      case Dtype::kFloat: store<float>(out, g, at, n); break;
      case Dtype::kBFloat16: store<bf16>(out, g, at, n); break;
      case Dtype::kHalf: store<half>(out, g, at, n); break;
    }
  }
}

// Adds value * 2^shift to the limbs; each limb keeps 32 bits, carries go up.
void add_shifted(int64_t* limbs, unsigned __int128 value, int shift) {
  int k = shift / 32;
  const int low = shift % 32;
  uint64_t carry = 0;
  // value < 2^96, so its low part times 2^31 fits 128 bits after one limb is peeled off at a time.
  uint64_t spill = 0;
  while (value != 0 || carry != 0 || spill != 0) {
    const uint64_t word = static_cast<uint32_t>(value);
    value >>= 32;
    const uint64_t shifted = (word << low) | spill;
    spill = shifted >> 32;
    const uint64_t sum = static_cast<uint64_t>(limbs[k]) + (shifted & 0xffffffffu) + carry;
    limbs[k] = static_cast<int64_t>(sum & 0xffffffffu);
    carry = sum >> 32;
    ++k;
  }
}

template <class T>
void square_sum_of(int64_t* limbs, const T* src, int64_t start, int64_t stop) {
  constexpr int kLanes = 4;                // neighbours share exponents: four tables avoid waiting on a store
  constexpr int64_t kSafe = kLanes << 15;  // 2^15 squares of 48 bits fit 64 bits
  uint64_t table[kLanes][256];
  unsigned __int128 total[256];
  memset(total, 0, sizeof total);
  for (int64_t at = start; at < stop; at += kSafe) {
    const int64_t end = stop - at < kSafe ? stop : at + kSafe;
    memset(table, 0, sizeof table);
    int64_t i = at;
    for (; i + kLanes <= end; i += kLanes)
      for (int k = 0; k < kLanes; ++k) {
        const uint32_t bits = as_bits(widen(src[i + k]));
        table[k][square_bin(bits)] += square_of(bits);
      }
    for (; i < end; ++i) {
      const uint32_t bits = as_bits(widen(src[i]));
      table[0][square_bin(bits)] += square_of(bits);
    }
    if (table[0][255] | table[1][255] | table[2][255] | table[3][255])
      for (int64_t j = at; j < end; ++j) limbs[kLimbs - 1] += square_bin(as_bits(widen(src[j]))) == 255;
    for (int bin = 0; bin < 255; ++bin)
      for (int k = 0; k < kLanes; ++k) total[bin] += table[k][bin];
  }
  for (int bin = 0; bin < 255; ++bin)
    if (total[bin] != 0) add_shifted(limbs, total[bin], square_shift(bin));
}

void square_sum(int64_t* limbs, const void* src, Dtype dtype, int64_t start, int64_t stop) {
  switch (dtype) {
    case Dtype::kFloat: return square_sum_of(limbs, static_cast<const float*>(src), start, stop);
    case Dtype::kBFloat16: return square_sum_of(limbs, static_cast<const bf16*>(src), start, stop);
    case Dtype::kHalf: return square_sum_of(limbs, static_cast<const half*>(src), start, stop);
  }
}

template <class T>
bool exceeds_of(const T* __restrict src, float limit, int64_t start, int64_t stop) {
  const uint32_t top = as_bits(limit);  // magnitudes of floats order as their bits do, NaN above all
  for (int64_t at = start; at < stop; at += kBlock) {
    const int64_t n = stop - at < kBlock ? stop - at : kBlock;
    uint32_t any = 0;
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

}  // namespace

const Kernels ZL_TABLE = {ZL_NAME, reduce_adam, reduce_adam_moments, reduce, square_sum, exceeds};

}  // namespace zerolite
