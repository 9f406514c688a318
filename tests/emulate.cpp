// The CUDA kernels' own code over simulated blocks and threads, one after another: no GPU, and each access is checked.
// tests/test_cuda_lanes.py compiles this and compares what it leaves in memory with the CPU kernels.
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace {
struct Range {
  uintptr_t from, to;
};
std::vector<Range> ranges;  // memory that a kernel may touch

void touch(const void* pointer, size_t bytes, size_t alignment) {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  for (const Range& r : ranges)
    if (r.from <= at && at + bytes <= r.to && at % alignment == 0) return;
  throw std::out_of_range("an access outside the tensors, or a misaligned one");
}
}  // namespace

#define ZL_TOUCH(pointer, bytes, alignment) touch(pointer, bytes, alignment)
#include "cuda/tables.h"

using namespace zerolite;

namespace {

template <class Body>
void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat: return body(float{});
    case Dtype::kBFloat16: return body(bf16{});
    case Dtype::kHalf: return body(half{});
  }
}

// Blocks and threads backwards: nothing may depend on their order.
template <class Body>
void grid(int64_t tiles, const Body& body) {
  for (int64_t tile = tiles - 1; tile >= 0; --tile)
    for (int thread = kThreads - 1; thread >= 0; --thread) body(tile, thread);
}

void square_blocks(const SquareTask& task, Dtype dtype, int64_t tiles) {
  SquareShared shared;
  memset(&shared, 0xa5, sizeof shared);  // shared memory begins with what the block before left
  ranges.push_back({reinterpret_cast<uintptr_t>(&shared), reinterpret_cast<uintptr_t>(&shared + 1)});
  const auto threads = [](const auto& body) {
    for (int thread = kThreads - 1; thread >= 0; --thread) body(thread);
  };
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    threads([&](int thread) { square_clear(shared, thread); });
    with_dtype(dtype, [&](auto t) {
      threads([&](int thread) { square_add<decltype(t)>(task, shared, tile, thread); });
    });
    threads([&](int thread) { square_gather(shared, thread); });
    threads([&](int thread) { square_publish(task, shared, tile, thread); });
  }
  threads([&](int thread) { square_carry(task, thread); });
  ranges.pop_back();
}

// A block in find_largest: each thread's value as it was before the step.
struct Butterfly {
  Tops tops[kThreads];
  void meet(int by) {
    Tops before[kThreads];
    memcpy(before, tops, sizeof before);
    for (int thread = 0; thread < kThreads; ++thread) tops[thread] = larger(before[thread], before[thread ^ by]);
  }
};

template <class P, class G, class C>
void moment_blocks(const MomentTask& task, int64_t tiles) {
  using Lane = MomentLane<P, G, C>;
  std::vector<Lane> lanes(kThreads);
  Butterfly block;
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    // Registers hold anything at first: a scale of 253, above all that are stored, would make NaNs of zeros.
    memset(static_cast<void*>(lanes.data()), 253, kThreads * sizeof(Lane));
    for (int thread = kThreads - 1; thread >= 0; --thread) {
      moments_update(lanes[thread], task, entry_of(task.table, tile), tile, thread);
      block.tops[thread] = lanes[thread].tops;
    }
    find_largest<Lane::kLanes>(block);
    for (int thread = kThreads - 1; thread >= 0; --thread) {
      if (sizeof(C) == 1) lanes[thread].tops = block.tops[thread];
      moments_store(lanes[thread], task);
    }
  }
}

// 0, or 1 after an access that a GPU would have made out of bounds.
template <class Body>
int guarded(const Body& body) {
  try {
    body();
  } catch (const std::out_of_range&) {
    ranges.clear();
    return 1;
  }
  return 0;
}

}  // namespace

extern "C" {

void allow(const void* from, int64_t bytes) {
  ranges.push_back({reinterpret_cast<uintptr_t>(from), reinterpret_cast<uintptr_t>(from) + bytes});
}
void forget() { ranges.clear(); }

// Mistakes are compiled one by one, each with the half that it is in.
#ifndef ONLY_MOMENTS

int adam(void* param, void* rest, float* m, float* v, int dtype, const void** sources, int count, int source_dtype,
         float mean, const int64_t* spans, int64_t n, const float* rows) {
  return guarded([&] {
    const AdamTensors t{param, rest, m, v, static_cast<Dtype>(dtype)};
    const Sources s{sources, count, static_cast<Dtype>(source_dtype), mean};
    const auto* more = count > kMaxSources ? sources : nullptr;
    run_adam(t, s, more, spans, n, rows, [&](const AdamTask& task, int64_t tiles) {
      with_dtype(t.dtype, [&](auto p) {
        with_dtype(s.dtype, [&](auto g) {
          grid(tiles, [&](int64_t tile, int thread) { adam_tile<decltype(p), decltype(g)>(task, tile, thread); });
        });
      });
    });
  });
}

int reduce(void* out, int dtype, int accumulate, const void** sources, int count, int source_dtype, float mean,
           int64_t numel) {
  return guarded([&] {
    const Sources s{sources, count, static_cast<Dtype>(source_dtype), mean};
    const auto* more = count > kMaxSources ? sources : nullptr;
    run_reduce(out, static_cast<Dtype>(dtype), s, more, numel, [&](const ReduceTask& task, int64_t tiles) {
      with_dtype(s.dtype, [&](auto g) {
        using G = decltype(g);
        if (accumulate)
          return grid(tiles, [&](int64_t tile, int thread) { reduce_tile<float, G, true>(task, tile, thread); });
        with_dtype(static_cast<Dtype>(dtype), [&](auto o) {
          grid(tiles, [&](int64_t tile, int thread) { reduce_tile<decltype(o), G, false>(task, tile, thread); });
        });
      });
    });
  });
}

int square_sum(int64_t* sums, const void* src, int dtype, const int64_t* spans, int64_t n) {
  return guarded([&] {
    const Dtype d = static_cast<Dtype>(dtype);
    run_square_sum(sums, src, d, spans, n,
                   [&](const SquareTask& task, int64_t tiles) { square_blocks(task, d, tiles); });
  });
}

int exceeds(int64_t* flag, const void* src, int dtype, int64_t numel, float limit) {
  return guarded([&] {
    const Dtype d = static_cast<Dtype>(dtype);
    run_exceeds(flag, src, d, numel, limit, [&](const ExceedsTask& task, int64_t tiles) {
      with_dtype(d, [&](auto t) {
        grid(tiles, [&](int64_t tile, int thread) { exceeds_tile<decltype(t)>(task, tile, thread); });
      });
    });
  });
}

int pack(char* out, int dtype, const void** from, const int64_t* starts, const int64_t* stops, int64_t n, int64_t* flag,
         float limit) {
  return guarded([&] {
    const Dtype d = static_cast<Dtype>(dtype);
    std::vector<Part> parts;
    for (int64_t i = 0; i < n; ++i) parts.push_back({starts[i], stops[i], from[i]});
    run_pack(out, d, parts.data(), n, flag, limit, [&](const PackTask& task, int64_t tiles) {
      with_dtype(d, [&](auto t) {
        grid(tiles, [&](int64_t tile, int thread) { pack_tile<decltype(t)>(task, tile, thread); });
      });
    });
  });
}

#endif  // ONLY_MOMENTS

#ifndef ONLY_LANES
int moments(void* param, void* rest, void* m, void* v, uint8_t* scales, int dtype, int bytes, const void** sources,
            int count, int source_dtype, float mean, const int64_t* spans, int64_t n, const float* rows) {
  return guarded([&] {
    const MomentTensors t{param, rest, m, v, scales, static_cast<Dtype>(dtype), bytes == 1};
    const Sources s{sources, count, static_cast<Dtype>(source_dtype), mean};
    const auto* more = count > kMaxSources ? sources : nullptr;
    run_moments(t, s, more, spans, n, rows, [&](const MomentTask& task, int64_t tiles) {
      with_dtype(t.dtype, [&](auto p) {
        with_dtype(s.dtype, [&](auto g) {
          if (t.bytes) return moment_blocks<decltype(p), decltype(g), uint8_t>(task, tiles);
          moment_blocks<decltype(p), decltype(g), uint16_t>(task, tiles);
        });
      });
    });
  });
}
#endif  // ONLY_LANES

}  // extern "C"
