// The machine's ceilings, compiled and called by benchmarks/native.py: what memory gives to the plainest loops.
//   update     reads and writes the streams of the bf16 update (parameter, remainder, two moments, one bf16 gradient:
//              26 bytes an element) with one cheap operation each
//   read_sum   reads;  copy_words  reads and writes;  flops  multiplies and adds in registers
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {
template <class F>
void parts(int64_t n, int threads, F body) {
  std::vector<std::thread> pool;
  const int64_t share = n / threads / 64 * 64;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([=] { body(t, t * share, t + 1 == threads ? n : (t + 1) * share); });
  for (auto& thread : pool) thread.join();
}
}  // namespace

extern "C" void update(uint16_t* hi, int16_t* lo, float* m, float* v, const uint16_t* g, int64_t n, int threads) {
  parts(n, threads, [=](int, int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; ++i) {
      hi[i] ^= g[i];
      lo[i] ^= static_cast<int16_t>(g[i]);
      m[i] += 1.0f;
      v[i] += 1.0f;
    }
  });
}

extern "C" void read_sum(const uint32_t* x, uint32_t* sums, int64_t n, int threads) {
  parts(n, threads, [=](int t, int64_t start, int64_t stop) {
    uint32_t sum = 0;
    for (int64_t i = start; i < stop; ++i) sum += x[i];
    sums[t] = sum;
  });
}

extern "C" void copy_words(const uint32_t* x, uint32_t* y, int64_t n, int threads) {
  parts(n, threads, [=](int, int64_t start, int64_t stop) { std::memcpy(y + start, x + start, 4 * (stop - start)); });
}

// `n` rounds of 2 * LANES floating-point operations in each thread.
extern "C" int64_t flops(float* out, int64_t n, int threads) {
  constexpr int LANES = 256;
  parts(threads * 64, threads, [=](int t, int64_t, int64_t) {
    float x[LANES];
    for (int k = 0; k < LANES; ++k) x[k] = 1.0f + k * 1e-3f;
    for (int64_t i = 0; i < n; ++i)
      for (int k = 0; k < LANES; ++k) x[k] = x[k] * 0.999999f + 1e-6f;
    float sum = 0;
    for (int k = 0; k < LANES; ++k) sum += x[k];
    out[t] = sum;
  });
  return 2 * LANES * n * threads;
}
