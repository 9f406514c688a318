// From arguments to launches: which addresses line up, how spans become tables of tiles. Host code without CUDA or
// torch; the bindings pass a launch, and tests/emulate.cpp a loop over simulated blocks.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <unordered_set>

#include "bodies.h"
#include "moments.h"
#include "square.h"

namespace zerolite {

inline int bytes_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

struct Address {
  const void* at;
  int bytes;  // of an element
};

// The phase in which vectors of `width` elements are aligned in every tensor at once, else kScattered.
inline int common_phase(std::initializer_list<Address> tensors, const void* const* more, int count, int bytes,
                        int width) {
  int phase = -2;  // none seen
  const auto meet = [&](const void* at, int size) {
    const auto address = reinterpret_cast<uintptr_t>(at);
    const int found = address % size ? kScattered : static_cast<int>(address / size % width);
    phase = phase == -2 || phase == found ? found : kScattered;
  };
  for (const Address& tensor : tensors)
    if (tensor.at != nullptr) meet(tensor.at, tensor.bytes);
  for (int k = 0; k < count; ++k) meet(more[k], bytes);
  return phase;
}

inline int64_t tiles_of(int64_t start, int64_t stop, int phase, int width, int64_t tile) {
  return (count_groups(start, stop, phase, width) * width + tile - 1) / tile;
}

// Fills `table` with entry(i) for i in [0, count), `tile` elements to a tile, and calls launch(tiles) when it is full.
template <class Payload, int N, class EntryOf, class Launch>
void in_tables(Table<Payload, N>& table, int64_t count, int width, int64_t tile, const EntryOf& entry,
               const Launch& launch) {
  constexpr int64_t kMostTiles = 0x7fffffff;  // blocks of a grid
  int64_t tiles = 0;
  table.count = 0;
  const auto flush = [&] {
    if (table.count > 0) launch(tiles);
    table.count = 0;
    tiles = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    Entry<Payload> e = entry(i);
    const int64_t more = tiles_of(e.start, e.stop, e.phase, width, tile);
    if (more == 0) continue;
    if (table.count == N || tiles + more > kMostTiles) flush();
    e.first = tiles;
    table.entries[table.count++] = e;
    tiles += more;
  }
  flush();
}

inline void fill(SourceTable& to, const Sources& from, const void* const* in_device_memory) {
  to.more = in_device_memory;
  to.count = from.count;
  to.mean = from.mean;
  if (in_device_memory == nullptr) std::copy(from.data, from.data + from.count, to.data);
}

// launch(task, tiles) for each table.
template <class Launch>
void run_adam(const AdamTensors& t, const Sources& sources, const void* const* in_device_memory, const int64_t* spans,
              int64_t count, const float* rows, const Launch& launch) {
  constexpr int W = kWidth<float>;
  const Address param{t.param, bytes_of(t.dtype)};
  const Address rest{t.dtype == Dtype::kFloat ? nullptr : t.rest, t.dtype == Dtype::kBFloat16 ? 2 : 4};
  const int phase =
      common_phase({param, rest, {t.m, 4}, {t.v, 4}}, sources.data, sources.count, bytes_of(sources.dtype), W);
  AdamTask task{};
  task.t = t;
  fill(task.sources, sources, in_device_memory);
  const auto entry = [&](int64_t i) {
    Entry<AdamRow> e{spans[3 * i], spans[3 * i + 1], 0, phase, {}};
    memcpy(&e.with, rows + spans[3 * i + 2] * kAdamRow, sizeof e.with);
    return e;
  };
  in_tables(task.table, count, W, kThreads * kUnroll * W, entry, [&](int64_t tiles) { launch(task, tiles); });
}

// Groups are counted from the tensors' first element, so vectors fit only where that is aligned.
template <class Launch>
void run_moments(const MomentTensors& t, const Sources& sources, const void* const* in_device_memory,
                 const int64_t* spans, int64_t count, const float* rows, const Launch& launch) {
  const int width = moment_width(t.dtype, sources.dtype), bytes = t.bytes ? 1 : 2;
  const Address param{t.param, bytes_of(t.dtype)};
  const Address rest{t.dtype == Dtype::kFloat ? nullptr : t.rest, t.dtype == Dtype::kBFloat16 ? 2 : 4};
  const int phase = common_phase({param, rest, {t.m, bytes}, {t.v, bytes}}, sources.data, sources.count,
                                 bytes_of(sources.dtype), width);
  MomentTask task{};
  task.t = t;
  fill(task.sources, sources, in_device_memory);
  const auto entry = [&](int64_t i) {
    Entry<MomentRow> e{spans[3 * i], spans[3 * i + 1], 0, phase == 0 ? 0 : kScattered, {}};
    memcpy(&e.with, rows + spans[3 * i + 2] * kMomentRow, sizeof e.with);
    return e;
  };
  in_tables(task.table, count, width, kThreads * width, entry, [&](int64_t tiles) { launch(task, tiles); });
}

template <class Launch>
void run_reduce(void* out, Dtype dtype, const Sources& sources, const void* const* in_device_memory, int64_t numel,
                const Launch& launch) {
  const int width = 16 / std::max(bytes_of(dtype), bytes_of(sources.dtype));
  ReduceTask task{};
  task.out = out;
  fill(task.sources, sources, in_device_memory);
  const int phase =
      common_phase({{out, bytes_of(dtype)}}, sources.data, sources.count, bytes_of(sources.dtype), width);
  task.all = {0, numel, 0, phase, {}};
  const int64_t tiles = tiles_of(0, numel, phase, width, kThreads * kUnroll * width);
  if (tiles > 0) launch(task, tiles);
}

template <class Launch>
void run_exceeds(int64_t* flag, const void* src, Dtype dtype, int64_t numel, float limit, const Launch& launch) {
  const int width = 16 / bytes_of(dtype);
  const int phase = common_phase({{src, bytes_of(dtype)}}, nullptr, 0, 0, width);
  const ExceedsTask task{src, flag, as_bits(limit), {0, numel, 0, phase, {}}};
  const int64_t tiles = tiles_of(0, numel, phase, width, kThreads * kExceedsUnroll * width);
  if (tiles > 0) launch(task, tiles);
}

// One span of each row says `carries`, in each table.
template <class Launch>
void run_square_sum(int64_t* sums, const void* src, Dtype dtype, const int64_t* spans, int64_t count,
                    const Launch& launch) {
  const int width = 16 / bytes_of(dtype);
  const int phase = common_phase({{src, bytes_of(dtype)}}, nullptr, 0, 0, width);
  SquareTask task{};
  task.src = src;
  task.sums = sums;
  const auto entry = [&](int64_t i) {
    return Entry<Row>{spans[3 * i], spans[3 * i + 1], 0, phase, {spans[3 * i + 2], 0}};
  };
  in_tables(task.table, count, width, kSquareChunk, entry, [&](int64_t tiles) {
    std::unordered_set<int64_t> seen;
    for (int k = 0; k < task.table.count; ++k) {
      Row& row = task.table.entries[k].with;
      row.carries = seen.insert(row.index).second;
    }
    launch(task, tiles);
  });
}

template <class Launch>
void run_pack(char* out, Dtype dtype, const Part* parts, int64_t count, int64_t* flag, float limit,
              const Launch& launch) {
  const int bytes = bytes_of(dtype), width = 16 / bytes;
  PackTask task{};
  task.flag = flag;
  task.top = as_bits(limit);
  const auto entry = [&](int64_t i) {
    char* to = out + parts[i].start * bytes;
    const void* from = parts[i].from != nullptr ? parts[i].from : to;  // zeros are aligned as what they go to
    const int phase = common_phase({{from, bytes}, {to, bytes}}, nullptr, 0, 0, width);
    return Entry<Copy>{0, parts[i].stop - parts[i].start, 0, phase, {parts[i].from, to}};
  };
  in_tables(task.table, count, width, kThreads * kPackUnroll * width, entry,
            [&](int64_t tiles) { launch(task, tiles); });
}

}  // namespace zerolite
