// What one thread of an elementwise kernel does. The expressions are those of csrc/kernels_cpu.cpp.
#pragma once

#include "lanes.h"

namespace zerolite {

struct Root {
  ZL_METHOD float operator()(float x) const {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return __builtin_sqrtf(x);
#endif
  }
};

// The sources of a sum, as kernel arguments; `more` is a copy in device memory where they do not fit.
struct SourceTable {
  const void* data[kMaxSources];
  const void* const* more;
  int count;
  float mean;
};

template <class G, int W, int U, class Where>
ZL_FN void add_source(float (&g)[U][W], const void* source, const Where (&at)[U]) {
  Pack<G, W> x[U];
  ZL_UNROLL
  for (int u = 0; u < U; ++u) load(x[u], static_cast<const G*>(source), at[u]);
  ZL_UNROLL
  for (int u = 0; u < U; ++u)
    ZL_UNROLL
    for (int i = 0; i < W; ++i) g[u][i] = g[u][i] + widen(x[u].x[i]);
}

// g = round_to<G>(mean * (source 0 + source 1 + ...)), the averaged gradient as a G holds it.
template <class G, int W, int U, class Where>
ZL_FN void average(float (&g)[U][W], const SourceTable& s, const Where (&at)[U]) {
  const G* first = static_cast<const G*>(s.more == nullptr ? s.data[0] : s.more[0]);
  Pack<G, W> x[U];
  ZL_UNROLL
  for (int u = 0; u < U; ++u) load(x[u], first, at[u]);
  ZL_UNROLL
  for (int u = 0; u < U; ++u)
    ZL_UNROLL
    for (int i = 0; i < W; ++i) g[u][i] = widen(x[u].x[i]);
  if (s.more == nullptr) {  // a loop of its own: pointers come from the constant bank, ahead of the loads
    ZL_UNROLL_4
    for (int k = 1; k < s.count; ++k) add_source<G>(g, s.data[k], at);
  } else {
    ZL_NO_UNROLL
    for (int k = 1; k < s.count; ++k) add_source<G>(g, s.more[k], at);
  }
  ZL_UNROLL
  for (int u = 0; u < U; ++u)
    ZL_UNROLL
    for (int i = 0; i < W; ++i) g[u][i] = round_to<G>(g[u][i] * s.mean);
}

// A parameter and what completes it to its fp32 master, by dtype of the parameter. `Tensors` names them param and rest.
template <class P, int W>
struct Stored;
template <int W>
struct Stored<float, W> {
  Pack<float, W> p;
};
template <int W>
struct Stored<bf16, W> {
  Pack<uint16_t, W> hi;
  Pack<int16_t, W> lo;
};
template <int W>
struct Stored<half, W> {
  Pack<float, W> master;
};

template <int W, class Tensors, class Where>
ZL_FN void load(Stored<float, W>& to, const Tensors& t, const Where& g) {
  load(to.p, static_cast<const float*>(t.param), g);
}
template <int W, class Tensors, class Where>
ZL_FN void load(Stored<bf16, W>& to, const Tensors& t, const Where& g) {
  load(to.hi, static_cast<const uint16_t*>(t.param), g);
  load(to.lo, static_cast<const int16_t*>(t.rest), g);
}
template <int W, class Tensors, class Where>
ZL_FN void load(Stored<half, W>& to, const Tensors& t, const Where& g) {
  load(to.master, static_cast<const float*>(t.rest), g);
}

template <int W>
ZL_FN float master(const Stored<float, W>& s, int i) {
  return s.p.x[i];
}
template <int W>
ZL_FN float master(const Stored<bf16, W>& s, int i) {
  return join(s.hi.x[i], s.lo.x[i]);
}
template <int W>
ZL_FN float master(const Stored<half, W>& s, int i) {
  return s.master.x[i];
}

template <int W>
ZL_FN void keep(Stored<float, W>& s, int i, float p) {
  s.p.x[i] = p;
}
template <int W>
ZL_FN void keep(Stored<bf16, W>& s, int i, float p) {
  split(plain(p), s.hi.x[i], s.lo.x[i]);
}
template <int W>
ZL_FN void keep(Stored<half, W>& s, int i, float p) {
  s.master.x[i] = p;
}

template <int W, class Tensors, class Where>
ZL_FN void store(const Tensors& t, const Stored<float, W>& from, const Where& g) {
  store(static_cast<float*>(t.param), from.p, g);
}
template <int W, class Tensors, class Where>
ZL_FN void store(const Tensors& t, const Stored<bf16, W>& from, const Where& g) {
  store(static_cast<uint16_t*>(t.param), from.hi, g);
  store(static_cast<int16_t*>(t.rest), from.lo, g);
}
template <int W, class Tensors, class Where>
ZL_FN void store(const Tensors& t, const Stored<half, W>& from, const Where& g) {
  Pack<half, W> p;
  ZL_UNROLL
  for (int i = 0; i < W; ++i) narrow(p.x[i], from.master.x[i]);
  store(static_cast<half*>(t.param), p, g);
  store(static_cast<float*>(t.rest), from.master, g);
}

struct AdamTask {
  AdamTensors t;
  SourceTable sources;
  Table<AdamRow, 48> table;
};
static_assert(sizeof(AdamTask) <= kParameterBytes);

template <class P, class G, class Where, int U>
ZL_FN void adam_groups(const AdamTask& task, const AdamRow& row, const Where (&at)[U]) {
  constexpr int W = kWidth<float>;
  Stored<P, W> p[U];
  Pack<float, W> m[U], v[U];
  float g[U][W];
  ZL_UNROLL
  for (int u = 0; u < U; ++u) {
    load(p[u], task.t, at[u]);
    load(m[u], task.t.m, at[u]);
    load(v[u], task.t.v, at[u]);
  }
  average<G>(g, task.sources, at);
  ZL_UNROLL
  for (int u = 0; u < U; ++u) {
    ZL_UNROLL
    for (int i = 0; i < W; ++i) {
      float x = master(p[u], i);
      adam(g[u][i], x, m[u].x[i], v[u].x[i], row, Root{});
      keep(p[u], i, x);
    }
    store(task.t, p[u], at[u]);
    store(task.t.m, m[u], at[u]);
    store(task.t.v, v[u], at[u]);
  }
}

template <class P, class G>
ZL_FN void adam_tile(const AdamTask& task, int64_t tile, int thread) {
  const Entry<AdamRow>& e = entry_of(task.table, tile);
  visit<kWidth<float>, kUnroll>(e, tile, thread, [&](const auto& at) { adam_groups<P, G>(task, e.with, at); });
}

struct Nothing {};

struct ReduceTask {
  void* out;
  SourceTable sources;
  Entry<Nothing> all;
};

template <class O, class G, bool kAccumulate, class Where, int U>
ZL_FN void reduce_groups(const ReduceTask& task, const Where (&at)[U]) {
  constexpr int W = kWidth<O, G>;
  O* out = static_cast<O*>(task.out);
  Pack<O, W> to[U];
  float g[U][W];
  ZL_UNROLL
  for (int u = 0; u < U && kAccumulate; ++u) load(to[u], out, at[u]);
  average<G>(g, task.sources, at);
  ZL_UNROLL
  for (int u = 0; u < U; ++u) {
    ZL_UNROLL
    for (int i = 0; i < W; ++i) narrow(to[u].x[i], kAccumulate ? widen(to[u].x[i]) + g[u][i] : g[u][i]);
    store(out, to[u], at[u]);
  }
}

template <class O, class G, bool kAccumulate>
ZL_FN void reduce_tile(const ReduceTask& task, int64_t tile, int thread) {
  visit<kWidth<O, G>, kUnroll>(task.all, tile, thread,
                               [&](const auto& at) { reduce_groups<O, G, kAccumulate>(task, at); });
}

struct ExceedsTask {
  const void* src;
  int64_t* flag;
  uint32_t top;  // bits of the limit: magnitudes of floats order as their bits do, NaN above all
  Entry<Nothing> all;
};
constexpr int kExceedsUnroll = 4;

template <class T, int W, class Where, int U>
ZL_FN void mark_large(int64_t* flag, uint32_t top, const Pack<T, W> (&x)[U], const Where (&at)[U]) {
  bool any = false;
  ZL_UNROLL
  for (int u = 0; u < U; ++u)
    ZL_UNROLL
    for (int i = 0; i < W; ++i)  // `holds`: a limit of 0 is reached by what fills a cut group up
      any = any || (holds(at[u], i) && (as_bits(widen(x[u].x[i])) & 0x7fffffffu) >= top);
  if (any) {
    ZL_TOUCH(flag, 8, 8);
    *flag = 1;
  }
}

template <class T, class Where, int U>
ZL_FN void exceeds_groups(const ExceedsTask& task, const Where (&at)[U]) {
  constexpr int W = kWidth<T>;
  Pack<T, W> x[U];
  ZL_UNROLL
  for (int u = 0; u < U; ++u) load(x[u], static_cast<const T*>(task.src), at[u]);
  mark_large(task.flag, task.top, x, at);
}

template <class T>
ZL_FN void exceeds_tile(const ExceedsTask& task, int64_t tile, int thread) {
  visit<kWidth<T>, kExceedsUnroll>(task.all, tile, thread, [&](const auto& at) { exceeds_groups<T>(task, at); });
}

struct Copy {
  const void* from;  // null: zeros
  void* to;
};
struct PackTask {
  int64_t* flag;
  uint32_t top;  // as in ExceedsTask, of what is copied
  Table<Copy, 64> table;
};
static_assert(sizeof(PackTask) <= kParameterBytes);
constexpr int kPackUnroll = 4;

template <class T, class Where, int U>
ZL_FN void pack_groups(const PackTask& task, const Copy& copy, const Where (&at)[U]) {
  Pack<T, kWidth<T>> x[U] = {};
  ZL_UNROLL
  for (int u = 0; u < U; ++u)
    if (copy.from != nullptr) load(x[u], static_cast<const T*>(copy.from), at[u]);
  ZL_UNROLL
  for (int u = 0; u < U; ++u) store(static_cast<T*>(copy.to), x[u], at[u]);
  if (copy.from != nullptr) mark_large(task.flag, task.top, x, at);
}

template <class T>
ZL_FN void pack_tile(const PackTask& task, int64_t tile, int thread) {
  const Entry<Copy>& e = entry_of(task.table, tile);
  visit<kWidth<T>, kPackUnroll>(e, tile, thread, [&](const auto& at) { pack_groups<T>(task, e.with, at); });
}

}  // namespace zerolite
