// The CPU kernels, the thread pool and the flags under a sanitizer; compiled and run by test_sanitizers.py.
//
//     sanitize kernels   every table and dtype over sizes around the vector width and odd starts, in exact allocations,
//                        and a range past 2^31 elements
//     sanitize threads   the pool from several callers, and the flag protocol of a gradient round
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "flags.h"
#include "kernels.h"
#include "moments_math.h"
#include "pool.h"

using namespace zerolite;

namespace {

const Dtype kDtypes[] = {Dtype::kFloat, Dtype::kBFloat16, Dtype::kHalf};
int width_of(Dtype d) { return d == Dtype::kFloat ? 4 : 2; }

// `n` elements of `width` bytes and not one more, filled with small values of no particular pattern.
struct Exact {
  char* data;
  size_t size;
  Exact(int64_t n, int width) : size(static_cast<size_t>(n * width)) {
    data = static_cast<char*>(malloc(size));
    for (size_t i = 0; i < size; ++i) data[i] = static_cast<char>(i * 37 % 61);
  }
  ~Exact() { free(data); }
};

AdamRow row() { return {0.7f, 0.01f, 0.99f, 0.1f, 0.999f, 0.001f, 1e-8f, 1e-3f}; }

void run_adam(const Kernels& table, Dtype dtype, Dtype from, int64_t start, int64_t stop) {
  Exact p(stop, width_of(dtype)), rest(stop, dtype == Dtype::kHalf ? 4 : 2), m(stop, 4), v(stop, 4);
  Exact a(stop, width_of(from)), b(stop, width_of(from)), c(stop, width_of(from));
  const void* sources[] = {a.data, b.data, c.data};
  const AdamTensors t{p.data, rest.data, reinterpret_cast<float*>(m.data), reinterpret_cast<float*>(v.data), dtype};
  for (int count = 1; count <= 3; ++count)
    table.reduce_adam(t, {sources, count, from, 1.0f / static_cast<float>(count)}, row(), start, stop);
}

void run_moments(const Kernels& table, Dtype dtype, bool bytes, int64_t start, int64_t stop) {
  const int width = bytes ? 1 : 2;
  Exact p(stop, width_of(dtype)), rest(stop, dtype == Dtype::kHalf ? 4 : 2), m(stop, width), v(stop, width);
  Exact scales((stop + kGroup - 1) / kGroup * 2, 1), g(stop, 2);
  const void* sources[] = {g.data, g.data, g.data};
  auto* codes = reinterpret_cast<uint8_t*>(scales.data);
  const MomentTensors t{p.data, rest.data, m.data, v.data, codes, dtype, bytes};
  for (int count = 1; count <= 3; ++count)
    for (int scale : {100, 240}) {  // 240: of moments that are not finite
      memset(codes, scale, (stop + kGroup - 1) / kGroup * 2);
      const Sources s{sources, count, Dtype::kBFloat16, 1.0f / static_cast<float>(count)};
      table.reduce_adam_moments(t, s, {row(), 3.0f}, start, stop);
    }
}

void run_rest(const Kernels& table, Dtype dtype, int64_t start, int64_t stop) {
  Exact a(stop, width_of(dtype)), b(stop, width_of(dtype)), wide(stop, 4), same(stop, width_of(dtype));
  const void* sources[] = {a.data, b.data};
  int64_t limbs[kLimbs] = {};
  for (int count = 1; count <= 2; ++count) {
    const Sources s{sources, count, dtype, 0.5f};
    table.reduce(wide.data, Dtype::kFloat, true, false, s, start, stop);
    table.reduce(same.data, dtype, false, false, s, start, stop);
    table.reduce(same.data, dtype, false, true, s, start, stop);
    table.square_sum(limbs, s, start, stop);
    for (bool past : {false, true}) table.reduce_squares(same.data, dtype, past, limbs, s, start, stop);
  }
  table.exceeds(a.data, dtype, 1e30f, start, stop);
  const int width = width_of(dtype);
  for (bool past : {false, true}) table.copy(same.data + start * width, a.data + start * width, dtype, 1e30f, stop - start, past);
}

// Address space for `bytes`, of which only the touched pages take memory.
char* sparse(int64_t bytes) {
  void* at = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) {
    perror("mmap");
    exit(3);
  }
  return static_cast<char*>(at);
}

void run_far(const Kernels& table) {
  const int64_t start = (int64_t{1} << 31) + 64, stop = start + 3000;
  char *p = sparse(stop * 2), *rest = sparse(stop * 2), *m = sparse(stop * 4), *v = sparse(stop * 4), *g = sparse(stop * 2);
  const void* sources[] = {g, g};
  const Sources s{sources, 2, Dtype::kBFloat16, 0.5f};
  table.reduce_adam({p, rest, reinterpret_cast<float*>(m), reinterpret_cast<float*>(v), Dtype::kBFloat16}, s, row(), start, stop);
  table.reduce(p, Dtype::kBFloat16, false, true, s, start, stop);
  int64_t limbs[kLimbs] = {};
  table.square_sum(limbs, s, start, stop);
  table.exceeds(g, Dtype::kBFloat16, 1.0f, start, stop);
  table.copy(p, g, Dtype::kBFloat16, 1.0f, stop, true);
  auto* scales = reinterpret_cast<uint8_t*>(sparse(stop / kGroup * 2 + 4));
  table.reduce_adam_moments({p, rest, m, v, scales, Dtype::kBFloat16, true}, s, {row(), 3.0f}, start, stop);
  munmap(p, stop * 2), munmap(rest, stop * 2), munmap(m, stop * 4), munmap(v, stop * 4), munmap(g, stop * 2);
}

int run_kernels() {
  int tables = 0;
  for (const char* name : {"baseline", "avx2", "avx512", "avx512vbmi"}) {
    if (!use_isa(name)) continue;
    ++tables;
    const Kernels& table = kernels();
    for (int64_t n : {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 1023, 1024, 1025, 2051})
      for (int64_t start : {0, 1, 5, 64}) {
        for (Dtype dtype : kDtypes) {
          for (Dtype from : kDtypes) run_adam(table, dtype, from, start, start + n);
          run_rest(table, dtype, start, start + n);
          if (start % kGroup == 0)
            for (bool bytes : {false, true}) run_moments(table, dtype, bytes, start, start + n);
        }
      }
    run_far(table);
  }
  printf("%d tables\n", tables);
  return 0;
}

void run_pool() {
  set_threads(4);
  std::vector<std::thread> callers;
  std::vector<int64_t> sums(3, 0);
  for (int c = 0; c < 3; ++c)
    callers.emplace_back([c, &sums] {
      for (int round = 0; round < 200; ++round) {
        int64_t parts_of[8] = {};
        parallel(4, [&](int part, int parts) { parts_of[part] = part + parts; });
        for (int64_t x : parts_of) sums[c] += x;
      }
    });
  for (auto& caller : callers) caller.join();
  for (int64_t sum : sums)
    if (sum != 200 * (4 * 4 + 6)) exit(4);
}

// Two regions in turn, as lanes of transient rounds: pack, post, wait for all, read, mark as read.
void run_flags() {
  constexpr int kRanks = 3, kRounds = 400, kSlot = 256;
  std::vector<int64_t> slots(2 * kRanks * kSlot), posted(kRanks * 8), read(kRanks * 8);
  std::vector<int64_t*> post, done;
  for (int r = 0; r < kRanks; ++r) post.push_back(&posted[r * 8]), done.push_back(&read[r * 8]);
  std::vector<std::thread> ranks;
  for (int r = 0; r < kRanks; ++r)
    ranks.emplace_back([&, r] {
      for (int64_t round = 1; round <= kRounds; ++round) {
        int64_t* region = &slots[(round % 2) * kRanks * kSlot];
        if (!flag_wait(done.data(), kRanks, round - 2, 60.0)) exit(5);
        for (int i = 0; i < kSlot; ++i) region[r * kSlot + i] = round + i;
        flag_store(post[r], round);
        if (!flag_wait(post.data(), kRanks, round, 60.0)) exit(5);
        for (int other = 0; other < kRanks; ++other)
          for (int i = 0; i < kSlot; ++i)
            if (region[other * kSlot + i] != round + i) exit(6);
        flag_store(done[r], round);
      }
    });
  for (auto& rank : ranks) rank.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && strcmp(argv[1], "kernels") == 0) return run_kernels();
  run_pool();
  run_flags();
  puts("pool and flags");
  return 0;
}
