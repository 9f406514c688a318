// Requests for memory that is needed later: a part of kernels_cpu.cpp.
//
// An update has seven streams and computes in between. What processors fetch on their own follows few of them, and none past
// the end of a page; so loads wait. A request for each line, a kilobyte or four before it is needed, takes a tenth to a
// quarter off the passes over memory (Intel Xeon, two cores; AVX-512 and AVX2). Requests are spread over the pass: bursts of
// them hold up the loads.
#pragma once

#include "kernels.h"

namespace zerolite {
namespace {

constexpr int64_t kPiece = 64;    // elements between two requests
constexpr int64_t kAhead = 1024;  // elements from a request to its use
constexpr int kFew = 8;           // sources up to which requests for all of them pay

// Asks for the lines of the piece that begins kAhead elements after p. It may lie past the end: a request cannot fault.
template <class T>
ZL_FN void ahead(const T* p) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(p) + kAhead * sizeof(T);
  for (uintptr_t k = 0; k < kPiece * sizeof(T); k += 64) __builtin_prefetch(reinterpret_cast<const void*>(from + k));
}

// The same of all sources, whose elements are T: of so many that what is asked for stays in the cache.
template <class T>
ZL_FN void ahead_of(const Sources& s, int64_t at) {
  if (s.count > kFew) return;
  for (int k = 0; k < s.count; ++k) ahead(static_cast<const T*>(s.data[k]) + at);
}

}  // namespace
}  // namespace zerolite
