// Exact sums of squares by one block of threads. Integers add in any order to the same bits.
//
// Bins in shared memory alone would be slow: neighbours share exponents, and their atomic additions would wait for each
// other. So each thread keeps a window in registers, 128 bits of the fixed-point total that begin at a limb boundary
// near its first value, and only squares outside the window go to the block's bins:
//
//   limb       k+3      k+2      k+1       k
//          |--------|--------|--------|--------|      window of 128 bits
//            room     first value's square lies       added at 0 to 72 bits above limb k
//
// 48 bits of a square, 72 bits of shift and 8 bits for the 256 squares of a thread fill the window exactly.
// The steps below are divided by barriers of the block; tests/emulate.cpp runs them one after another.
#pragma once

#include "lanes.h"

namespace zerolite {

constexpr int kSquareChunk = 1 << 16;  // elements of a block: a bin holds 2^16 squares of 48 bits
constexpr int kWindowShift = 72;
constexpr int kSumLimbs = kLimbs - 1;
constexpr int kParts = kThreads / 32;
static_assert(kSquareChunk / kThreads == 256 && 48 + kWindowShift + 8 == 128);

struct Row {
  int64_t index;
  int64_t carries;  // 1 for one span of each row in a launch, which brings the row back to 32 bits a limb
};
struct SquareTask {
  const void* src;
  int64_t* sums;
  Table<Row, 80> table;
};
static_assert(sizeof(SquareTask) <= kParameterBytes);

struct SquareShared {
  uint64_t bins[256];  // by exponent: squares outside their thread's window; [255] counts non-finite values
  uint64_t limbs[kLimbs];
  uint64_t partial[kParts][kLimbs];
  uint32_t words[4][kThreads];  // windows
  int lowest[kThreads];         // their first limb
};

ZL_FN void add_to(uint64_t* total, uint64_t value) {
  ZL_TOUCH(total, 8, 8);
#if defined(__CUDA_ARCH__)
  atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(value));
#else
  *total += value;
#endif
}

struct Window {
  uint64_t low = 0, high = 0;
  int lowest = -1;  // limb of bit 0; none yet
};

// False where the square does not fit the window.
ZL_FN bool add_square(Window& w, uint64_t square, int shift) {
  if (w.lowest < 0) w.lowest = shift < 24 ? 0 : (shift - 24) / 32;
  const int by = shift - 32 * w.lowest;
  if (by < 0 || by > kWindowShift) return false;
  const uint64_t low = by < 64 ? square << by : 0;
  const uint64_t high = by < 64 ? (square >> 1) >> (63 - by) : square << (by - 64);
  w.low += low;
  w.high += high + (w.low < low);
  return true;
}

ZL_FN void square_clear(SquareShared& shared, int thread) {
  shared.bins[thread] = 0;
  if (thread < kLimbs) shared.limbs[thread] = 0;
}

template <class T, class Where, int U>
ZL_FN void square_groups(const T* src, SquareShared& shared, Window& window, const Where (&at)[U]) {
  constexpr int W = kWidth<T>;
  Pack<T, W> x[U];
  ZL_UNROLL
  for (int u = 0; u < U; ++u) load(x[u], src, at[u]);  // elements outside the span read as 0
  ZL_UNROLL
  for (int u = 0; u < U; ++u)
    ZL_UNROLL
    for (int i = 0; i < W; ++i) {
      const uint32_t bits = as_bits(widen(x[u].x[i]));
      const uint64_t square = square_of(bits);
      const int bin = square_bin(bits);
      if (bin == 255)
        add_to(&shared.bins[255], 1);
      else if (square != 0 && !add_square(window, square, square_shift(bin)))
        add_to(&shared.bins[bin], square);
    }
}

template <class T>
ZL_FN void square_add(const SquareTask& task, SquareShared& shared, int64_t tile, int thread) {
  constexpr int U = 4, kSteps = kSquareChunk / (kThreads * kWidth<T> * U);
  const Entry<Row>& e = entry_of(task.table, tile);
  const T* src = static_cast<const T*>(task.src);
  Window window;
  for (int step = 0; step < kSteps; ++step)
    visit<kWidth<T>, U>(e, e.first + (tile - e.first) * kSteps + step, thread,
                        [&](const auto& at) { square_groups(src, shared, window, at); });
  shared.words[0][thread] = static_cast<uint32_t>(window.low);
  shared.words[1][thread] = static_cast<uint32_t>(window.low >> 32);
  shared.words[2][thread] = static_cast<uint32_t>(window.high);
  shared.words[3][thread] = static_cast<uint32_t>(window.high >> 32);
  shared.lowest[thread] = window.lowest < 0 ? 0 : window.lowest;
}

// Adds a thread's bin to the limbs: 64 bits, shifted, are up to three words of 32 bits.
ZL_FN void spread_bin(SquareShared& shared, int bin) {
  const uint64_t value = shared.bins[bin];
  if (value == 0) return;
  const int shift = square_shift(bin), by = shift % 32;
  uint64_t* to = &shared.limbs[shift / 32];
  const uint64_t low = (value & 0xffffffffu) << by, high = (value >> 32) << by;
  add_to(to, low & 0xffffffffu);
  add_to(to + 1, (low >> 32) + (high & 0xffffffffu));
  add_to(to + 2, high >> 32);
}

// Limb by limb, each part of 32 threads sums the windows of its own.
ZL_FN void square_gather(SquareShared& shared, int thread) {
  if (thread < 255) spread_bin(shared, thread);
  const int limb = thread % 32, part = thread / 32;
  if (limb >= kSumLimbs) return;
  uint64_t sum = 0;
  for (int i = part * 32; i < part * 32 + 32; ++i) {
    const int word = limb - shared.lowest[i];
    if (0 <= word && word < 4) sum += shared.words[word][i];
  }
  shared.partial[part][limb] = sum;
}

ZL_FN void square_publish(const SquareTask& task, const SquareShared& shared, int64_t tile, int thread) {
  if (thread >= kLimbs) return;
  uint64_t sum = thread == kLimbs - 1 ? shared.bins[255] : shared.limbs[thread];
  for (int part = 0; part < kParts && thread < kSumLimbs; ++part) sum += shared.partial[part][thread];
  const Entry<Row>& e = entry_of(task.table, tile);
  if (sum != 0) add_to(reinterpret_cast<uint64_t*>(task.sums + e.with.index * kLimbs + thread), sum);
}

// Brings a row back to limbs of 32 bits, as the CPU kernel leaves it.
ZL_FN void square_carry(const SquareTask& task, int thread) {
  if (thread >= task.table.count || task.table.entries[thread].with.carries == 0) return;
  int64_t* row = task.sums + task.table.entries[thread].with.index * kLimbs;
  ZL_TOUCH(row, 8 * kLimbs, 8);
  int64_t carry = 0;
  for (int k = 0; k < kSumLimbs; ++k) {
    const int64_t sum = row[k] + carry;
    row[k] = sum & 0xffffffff;
    carry = sum >> 32;
  }
}

}  // namespace zerolite
