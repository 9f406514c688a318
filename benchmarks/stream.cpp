// The machine's ceiling for an update: reads and writes the same streams as the bf16 update (parameter, remainder, two
// moments, one bf16 gradient: 26 bytes an element) with one cheap operation each. Compiled by benchmarks/update.py.
#include <cstdint>
#include <thread>
#include <vector>

extern "C" void stream(uint16_t* hi, int16_t* lo, float* m, float* v, const uint16_t* g, int64_t n, int threads) {
  std::vector<std::thread> pool;
  const int64_t share = n / threads / 64 * 64;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([=] {
      const int64_t stop = t + 1 == threads ? n : (t + 1) * share;
      for (int64_t i = t * share; i < stop; ++i) {
        hi[i] ^= g[i];
        lo[i] ^= static_cast<int16_t>(g[i]);
        m[i] += 1.0f;
        v[i] += 1.0f;
      }
    });
  for (auto& thread : pool) thread.join();
}
