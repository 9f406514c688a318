// CUDA kernels: one thread's work is in bodies.h, moments.h and square.h, and what is left here are grids and dtypes.
#include <cuda_runtime.h>

#include "launch.h"

namespace zerolite {
namespace {

template <class P, class G>
__global__ void __launch_bounds__(kThreads) adam_kernel(const __grid_constant__ AdamTask task) {
  adam_tile<P, G>(task, blockIdx.x, threadIdx.x);
}

// A thread as a part of its warp, in find_largest.
struct Shuffle {
  Tops& tops;
  __device__ __forceinline__ void meet(int by) {
    constexpr unsigned kAll = 0xffffffffu;
    tops = larger(tops, {__shfl_xor_sync(kAll, tops.m, by), __shfl_xor_sync(kAll, tops.v, by)});
  }
};

template <class P, class G, class C>
__global__ void __launch_bounds__(kThreads) moments_kernel(const __grid_constant__ MomentTask task) {
  MomentLane<P, G, C> lane;
  moments_update(lane, task, entry_of(task.table, blockIdx.x), blockIdx.x, threadIdx.x);
  if constexpr (sizeof(C) == 1) {
    Shuffle warp{lane.tops};
    find_largest<lane.kLanes>(warp);
  }
  moments_store(lane, task);
}

template <class O, class G, bool kAccumulate>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const __grid_constant__ ReduceTask task) {
  reduce_tile<O, G, kAccumulate>(task, blockIdx.x, threadIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kThreads) exceeds_kernel(const __grid_constant__ ExceedsTask task) {
  exceeds_tile<T>(task, blockIdx.x, threadIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackTask task) {
  pack_tile<T>(task, blockIdx.x, threadIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kThreads) square_kernel(const __grid_constant__ SquareTask task) {
  __shared__ SquareShared shared;
  square_clear(shared, threadIdx.x);
  __syncthreads();
  square_add<T>(task, shared, blockIdx.x, threadIdx.x);
  __syncthreads();
  square_gather(shared, threadIdx.x);
  __syncthreads();
  square_publish(task, shared, blockIdx.x, threadIdx.x);
}

__global__ void carry_kernel(const __grid_constant__ SquareTask task) { square_carry(task, threadIdx.x); }

const char* outcome(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Starts a kernel; 2^31 - 1 tiles of at least 1024 elements are more than any device holds.
template <class Task>
const char* start(void (*kernel)(Task), const Task& task, int64_t tiles, void* stream) {
  if (tiles == 0) return nullptr;
  if (tiles > 0x7fffffff) return "more tiles than a grid has blocks";
  kernel<<<static_cast<unsigned>(tiles), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(task);
  return outcome(cudaGetLastError());
}

template <class Body>
const char* with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat: return body(float{});
    case Dtype::kBFloat16: return body(bf16{});
    case Dtype::kHalf: return body(half{});
  }
  return "unknown dtype";
}

}  // namespace

const char* launch_adam(const AdamTask& task, Dtype sources, int64_t tiles, void* stream) {
  return with_dtype(task.t.dtype, [&](auto p) {
    return with_dtype(sources,
                      [&](auto g) { return start(adam_kernel<decltype(p), decltype(g)>, task, tiles, stream); });
  });
}

const char* launch_moments(const MomentTask& task, Dtype sources, int64_t tiles, void* stream) {
  return with_dtype(task.t.dtype, [&](auto p) {
    return with_dtype(sources, [&](auto g) {
      using P = decltype(p);
      using G = decltype(g);
      return task.t.bytes ? start(moments_kernel<P, G, uint8_t>, task, tiles, stream)
                          : start(moments_kernel<P, G, uint16_t>, task, tiles, stream);
    });
  });
}

const char* launch_reduce(const ReduceTask& task, Dtype out, Dtype sources, bool accumulate, int64_t tiles,
                          void* stream) {
  return with_dtype(sources, [&](auto g) {
    using G = decltype(g);
    if (accumulate) return start(reduce_kernel<float, G, true>, task, tiles, stream);
    return with_dtype(out, [&](auto o) { return start(reduce_kernel<decltype(o), G, false>, task, tiles, stream); });
  });
}

const char* launch_square_sum(const SquareTask& task, Dtype src, int64_t tiles, void* stream) {
  const char* problem = with_dtype(src, [&](auto t) { return start(square_kernel<decltype(t)>, task, tiles, stream); });
  return problem ? problem : start(carry_kernel, task, 1, stream);
}

const char* launch_exceeds(const ExceedsTask& task, Dtype src, int64_t tiles, void* stream) {
  return with_dtype(src, [&](auto t) { return start(exceeds_kernel<decltype(t)>, task, tiles, stream); });
}

const char* launch_pack(const PackTask& task, Dtype dtype, int64_t tiles, void* stream) {
  return with_dtype(dtype, [&](auto t) { return start(pack_kernel<decltype(t)>, task, tiles, stream); });
}

const char* copy_pointers(const void* const* from, int count, const void* const** to, void* stream) {
  void* room = nullptr;
  const size_t bytes = count * sizeof(void*);
  cudaError_t error = cudaMallocAsync(&room, bytes, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return outcome(error);
  // From pageable memory the call returns once `from` has been read, so the caller may drop it.
  error = cudaMemcpyAsync(room, from, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream));
  *to = static_cast<const void* const*>(room);
  return outcome(error);
}

const char* free_pointers(const void* const* pointers, void* stream) {
  return outcome(cudaFreeAsync(const_cast<void**>(pointers), static_cast<cudaStream_t>(stream)));
}

const char* copy_to_host(void* to, const void* from, int64_t bytes, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, s);
  return outcome(error == cudaSuccess ? cudaStreamSynchronize(s) : error);
}

}  // namespace zerolite
