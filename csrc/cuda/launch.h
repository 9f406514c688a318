// Launches of csrc/cuda/kernels.cu. No torch here, so nvcc never sees its headers, and no CUDA, so g++ compiles
// callers. Each returns null, or what CUDA says went wrong.
#pragma once

#include "bodies.h"
#include "moments.h"
#include "square.h"

namespace zerolite {

const char* launch_adam(const AdamTask&, Dtype sources, int64_t tiles, void* stream);
const char* launch_moments(const MomentTask&, Dtype sources, int64_t tiles, void* stream);
const char* launch_reduce(const ReduceTask&, Dtype out, Dtype sources, bool accumulate, int64_t tiles, void* stream);
const char* launch_square_sum(const SquareTask&, Dtype src, int64_t tiles, void* stream);
const char* launch_exceeds(const ExceedsTask&, Dtype src, int64_t tiles, void* stream);
const char* launch_pack(const PackTask&, Dtype dtype, int64_t tiles, void* stream);

// Copies `count` pointers into device memory and gives it back, both in stream order.
const char* copy_pointers(const void* const* from, int count, const void* const** to, void* stream);
const char* free_pointers(const void* const* pointers, void* stream);
// Reads device memory; waits for the stream.
const char* copy_to_host(void* to, const void* from, int64_t bytes, void* stream);

}  // namespace zerolite
