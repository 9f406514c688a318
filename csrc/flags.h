// Counters in shared memory: one writer each, any number of waiting processes.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>

namespace zerolite {

inline void flag_store(int64_t* flag, int64_t value) {
  std::atomic_ref<int64_t>(*flag).store(value, std::memory_order_release);
}

inline bool flags_reached(const int64_t* const* flags, size_t count, int64_t value) {
  for (size_t i = 0; i < count; ++i)
    if (std::atomic_ref<int64_t>(*const_cast<int64_t*>(flags[i])).load(std::memory_order_acquire) < value) return false;
  return true;
}

// Spins for some microseconds, then sleeps in growing steps up to 0.2 ms, so that ranks that outnumber the cores
// leave them to those who still compute.
inline bool flag_wait(const int64_t* const* flags, size_t count, int64_t value, double seconds) {
  using clock = std::chrono::steady_clock;
  for (int i = 0; i < 256; ++i)
    if (flags_reached(flags, count, value)) return true;
  const auto deadline = clock::now() + std::chrono::duration<double>(seconds);
  long pause = 2000;  // ns
  while (!flags_reached(flags, count, value)) {
    if (clock::now() >= deadline) return false;
    const timespec wait{0, pause};
    nanosleep(&wait, nullptr);
    if (pause < 200000) pause += pause / 2;
  }
  return true;
}

}  // namespace zerolite
