// A small pool of threads that splits one range of work. Its size follows the cores that a rank may
// use, not OMP_NUM_THREADS, which torchrun sets to 1.
#pragma once

#include <cstdint>
#include <functional>

namespace zerolite {

// Calls body(part, parts) for part in [0, parts) on up to `threads` threads and waits for all. The
// caller takes part. Callers may be several threads; their calls run one after another.
void parallel(int threads, const std::function<void(int, int)>& body);

// Threads that `parallel` should use for `elements`: small work is not worth a wake-up.
int threads_for(int64_t elements);
void set_threads(int threads);
int get_threads();

}  // namespace zerolite
