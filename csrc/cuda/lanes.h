// How threads walk over elements: groups of neighbours that move as one vector, and the cut ones at the ends of a span.
//
// Element i of a span, with vectors of 4 and pointers that are aligned where (i + phase) % 4 == 0, phase 1:
//
//   i        2   | 3   4   5   6 | 7   8   9  10 | 11           span [2, 12)
//   group    0     1               2               3
//   lo..hi   3..4  0..4            0..4            0..1         group 0 begins at element -1
//
// A group is read and written by one thread; whole ones in one access. The arithmetic between does not know which kind
// it works on. Everything here compiles as host code too: tests/emulate.cpp runs it over simulated blocks.
#pragma once

#include <cstdint>

#include "../kernels.h"

#if defined(__CUDACC__)
#define ZL_UNROLL _Pragma("unroll")
#define ZL_UNROLL_4 _Pragma("unroll 4")
#define ZL_NO_UNROLL _Pragma("unroll 1")
#else
#define ZL_UNROLL
#define ZL_UNROLL_4
#define ZL_NO_UNROLL
#endif
#if !defined(ZL_TOUCH)  // tests/emulate.cpp checks each access here
#define ZL_TOUCH(pointer, bytes, alignment)
#endif

namespace zerolite {

constexpr int kThreads = 256;          // of a block
constexpr int kUnroll = 2;             // groups of a thread whose loads are in flight together
constexpr int kMaxSources = 64;        // pointers that travel as kernel arguments; more need a table in device memory
constexpr int kParameterBytes = 4096;  // of one kernel's arguments, on every driver
constexpr int kScattered = -1;         // phase of pointers that are never aligned together

// Elements of a vector: the widest tensor moves 16 bytes an access. With more, a warp's accesses to that tensor would
// leave gaps, and half sectors would be written.
template <class A, class B = A>
constexpr int kWidth = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

template <class T, int W>
struct alignas(sizeof(T) * W) Pack {
  T x[W];
};

// A group that lies inside its span, at an address that is aligned for all tensors.
struct Whole {
  int64_t at;
};
// Elements at + [lo, hi) of any other group.
struct Cut {
  int64_t at;
  int lo, hi;
};

ZL_FN int64_t first_group(int64_t start, int phase, int width) {
  return static_cast<int64_t>(static_cast<uint64_t>(start + (phase > 0 ? phase : 0)) / static_cast<uint64_t>(width));
}

ZL_FN int64_t count_groups(int64_t start, int64_t stop, int phase, int width) {
  return start < stop ? first_group(stop + width - 1, phase, width) - first_group(start, phase, width) : 0;
}

template <int W>
ZL_FN Cut group_at(int64_t start, int64_t stop, int phase, int64_t index) {
  const int64_t at = (first_group(start, phase, W) + index) * W - (phase > 0 ? phase : 0);
  const int64_t before = start - at, left = stop - at;
  return {at, before > 0 ? static_cast<int>(before) : 0, left > W ? W : (left > 0 ? static_cast<int>(left) : 0)};
}

template <class T, int W>
ZL_FN void load(Pack<T, W>& to, const T* from, const Whole& g) {
  ZL_TOUCH(from + g.at, sizeof to, alignof(Pack<T, W>));
  to = *reinterpret_cast<const Pack<T, W>*>(from + g.at);
}
template <class T, int W>
ZL_FN void load(Pack<T, W>& to, const T* from, const Cut& g) {
  to = Pack<T, W>{};
  ZL_UNROLL
  for (int i = 0; i < W; ++i)  // a constant index keeps the vector in registers
    if (g.lo <= i && i < g.hi) {
      ZL_TOUCH(from + g.at + i, sizeof(T), alignof(T));
      to.x[i] = from[g.at + i];
    }
}

template <class T, int W>
ZL_FN void store(T* to, const Pack<T, W>& from, const Whole& g) {
  ZL_TOUCH(to + g.at, sizeof from, alignof(Pack<T, W>));
  *reinterpret_cast<Pack<T, W>*>(to + g.at) = from;
}
template <class T, int W>
ZL_FN void store(T* to, const Pack<T, W>& from, const Cut& g) {
  ZL_UNROLL
  for (int i = 0; i < W; ++i)
    if (g.lo <= i && i < g.hi) {
      ZL_TOUCH(to + g.at + i, sizeof(T), alignof(T));
      to[g.at + i] = from.x[i];
    }
}

ZL_FN bool holds(const Whole&, int) { return true; }
ZL_FN bool holds(const Cut& g, int i) { return g.lo <= i && i < g.hi; }

// One span of a launch. A tile is what one block does; tiles of a launch are counted over all its spans.
template <class Payload>
struct Entry {
  int64_t start, stop;
  int64_t first;  // tiles before this span
  int phase;
  Payload with;
};

// The spans of one launch, as kernel arguments: no copy to wait for, no memory to keep alive.
template <class Payload, int N>
struct Table {
  static constexpr int kRoom = N;
  int count;
  Entry<Payload> entries[N];
};

template <class Payload, int N>
ZL_FN const Entry<Payload>& entry_of(const Table<Payload, N>& table, int64_t tile) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  return table.entries[low];
}

// The u-th group of a thread: neighbours in a warp take neighbouring groups.
template <int W, int U, class Payload>
ZL_FN Cut group_of(const Entry<Payload>& e, int64_t tile, int thread, int u) {
  return group_at<W>(e.start, e.stop, e.phase, ((tile - e.first) * U + u) * kThreads + thread);
}

// Calls body on a thread's U groups: all at once where they are whole, so that their loads are in flight together, else
// one by one, so that the rare path needs no registers of its own.
template <int W, int U, class Payload, class Body>
ZL_FN void visit(const Entry<Payload>& e, int64_t tile, int thread, const Body& body) {
  Whole at[U];
  bool whole = e.phase >= 0;
  ZL_UNROLL
  for (int u = 0; u < U; ++u) {
    const Cut g = group_of<W, U>(e, tile, thread, u);
    at[u].at = g.at;
    whole = whole && g.lo == 0 && g.hi == W;
  }
  if (whole) return body(at);
  ZL_NO_UNROLL
  for (int u = 0; u < U; ++u) {
    const Cut one[1] = {group_of<W, U>(e, tile, thread, u)};
    body(one);
  }
}

}  // namespace zerolite
