// torch.library implementations for CUDA through the LibTorch stable ABI. Built without CUDA headers of torch and
// linked to none of its CUDA libraries, so that a CPU-only torch is enough to compile it. Loading touches no device.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../checks.h"
#include "launch.h"
#include "tables.h"

namespace {

using namespace zerolite;

// The stream that torch is working on. Its getter lives in a library that a CPU-only torch does not have, and that the
// linker could not name here; a process with CUDA tensors has loaded it.
void* current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Getter>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(getter != nullptr, "zerolite: this torch has no aoti_torch_get_current_cuda_stream; ",
                  "expected a CUDA build of torch 2.11 or later");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "zerolite: no current stream of device ", device);
  return stream;
}

// The device and stream of one call. Work is only ever enqueued.
struct Call {
  const char* op;
  int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;

  Call(const char* name, const Tensor& first, const char* what)
      : op(name), device((expect_cuda(first, name, what), first.get_device_index())), guard(device),
        stream(current_stream(device)) {}

  void ok(const char* problem) const {
    STD_TORCH_CHECK(problem == nullptr, "zerolite::", op, " on cuda:", device, ": ", problem,
                    ". Expected a GPU of compute capability 8.0 or later and a driver at least as new as the nvcc "
                    "that built zerolite; ZEROLITE_KERNELS=reference runs without these kernels");
  }
  void here(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, name, ": expected a tensor on cuda:", device,
                    ", as the first argument of ", op);
  }
  void here(const std::vector<Tensor>& all, const char* name) const {
    for (const Tensor& t : all) here(t, name);
  }

 private:
  static void expect_cuda(const Tensor& t, const char* op, const char* what) {
    STD_TORCH_CHECK(t.is_cuda(), what, ": expected a CUDA tensor, as other arguments of ", op);
  }
};

// The elements of a small table on the host. Callers make tables there; one on the device is read back, which waits for
// the stream, because bounds are checked before a kernel may touch memory.
template <class T>
struct HostTable {
  std::vector<T> copy;
  const T* data;

  HostTable(const Tensor& t, const Call& call) : data(static_cast<const T*>(t.const_data_ptr())) {
    if (t.is_cpu()) return;
    call.here(t, "spans and rows");
    copy.resize(t.numel());
    if (!copy.empty()) call.ok(copy_to_host(copy.data(), data, t.numel() * sizeof(T), call.stream));
    data = copy.data();
  }
};

// Source pointers in device memory where they are too many for kernel arguments.
struct DeviceSources {
  const Call& call;
  const void* const* pointers = nullptr;

  DeviceSources(const Sources& sources, const Call& c) : call(c) {
    if (sources.count > kMaxSources) call.ok(copy_pointers(sources.data, sources.count, &pointers, call.stream));
  }
  ~DeviceSources() {
    if (pointers != nullptr) free_pointers(pointers, call.stream);  // in stream order, after the kernels
  }
};

void check_here(const Call& call, Dtype dtype, const Tensor& rest, const Tensor& m, const Tensor& v) {
  if (dtype != Dtype::kFloat) call.here(rest, "rest");
  call.here(m, "m");
  call.here(v, "v");
}

// What an update reads beside what it writes.
struct Inputs {
  const Sources& sources;
  const void* const* more;
  const int64_t* spans;
  int64_t count;  // of spans
  const float* rows;
};

// Checks them, and calls run(Inputs).
template <class Run>
void with_inputs(const Call& call, int64_t numel, const std::vector<Tensor>& sources, const Tensor& spans,
                 const Tensor& rows, double mean, const Run& run) {
  call.here(sources, "sources");
  const SourceList list(sources, numel, mean);
  check_spans_shape(spans);
  const HostTable<int64_t> work(spans, call);
  const HostTable<float> hyper(rows, call);
  check_spans(work.data, spans.size(0), numel, rows.size(0));
  const DeviceSources more(list.view, call);
  run(Inputs{list.view, more.pointers, work.data, spans.size(0), hyper.data});
}

void reduce_adam_(Tensor param, Tensor rest, Tensor m, Tensor v, std::vector<Tensor> sources, Tensor spans, Tensor rows,
                  double mean) {
  const Call call("reduce_adam_", param, "param");
  const AdamTensors t = check_adam(param, rest, m, v, rows);
  check_here(call, t.dtype, rest, m, v);
  with_inputs(call, param.numel(), sources, spans, rows, mean, [&](const Inputs& in) {
    run_adam(t, in.sources, in.more, in.spans, in.count, in.rows, [&](const AdamTask& task, int64_t tiles) {
      call.ok(launch_adam(task, in.sources.dtype, tiles, call.stream));
    });
  });
}

void reduce_adam_moments_(Tensor param, Tensor rest, Tensor m, Tensor v, Tensor scales, std::vector<Tensor> sources,
                          Tensor spans, Tensor rows, double mean) {
  const Call call("reduce_adam_moments_", param, "param");
  const MomentTensors t = check_moments(param, rest, m, v, scales, rows);
  check_here(call, t.dtype, rest, m, v);
  if (t.bytes) call.here(scales, "scales");
  with_inputs(call, param.numel(), sources, spans, rows, mean, [&](const Inputs& in) {
    check_starts(in.spans, in.count);
    run_moments(t, in.sources, in.more, in.spans, in.count, in.rows, [&](const MomentTask& task, int64_t tiles) {
      call.ok(launch_moments(task, in.sources.dtype, tiles, call.stream));
    });
  });
}

void reduce_(Tensor out, std::vector<Tensor> sources, double mean, bool accumulate) {
  const Call call("reduce_", out, "out");
  const Dtype dtype = check_reduce(out, accumulate);
  call.here(sources, "sources");
  const SourceList list(sources, out.numel(), mean);
  const DeviceSources more(list.view, call);
  run_reduce(out.mutable_data_ptr(), dtype, list.view, more.pointers, out.numel(),
             [&](const ReduceTask& task, int64_t tiles) {
               call.ok(launch_reduce(task, dtype, list.view.dtype, accumulate, tiles, call.stream));
             });
}

// The average of several sources goes through memory: one pass over slices, beside the update's many.
void square_sum_(Tensor sums, std::vector<Tensor> sources, Tensor spans, double mean) {
  const Call call("square_sum_", sums, "sums");
  const int64_t numel = check_square_sum(sums, sources);
  call.here(sources, "sources");
  const Dtype dtype = SourceList(sources, numel, mean).view.dtype;
  check_spans_shape(spans);
  Tensor src = sources[0];
  if (sources.size() > 1 || mean != 1.0) {
    src = torch::stable::empty_like(sources[0]);
    reduce_(src, sources, mean, false);
  }
  const HostTable<int64_t> work(spans, call);
  check_spans(work.data, spans.size(0), src.numel(), sums.size(0));
  run_square_sum(static_cast<int64_t*>(sums.mutable_data_ptr()), src.const_data_ptr(), dtype, work.data, spans.size(0),
                 [&](const SquareTask& task, int64_t tiles) {
                   call.ok(launch_square_sum(task, dtype, tiles, call.stream));
                 });
}

void reduce_squares_(Tensor out, Tensor sums, std::vector<Tensor> sources, Tensor spans, double mean) {
  reduce_(out, sources, mean, false);
  square_sum_(sums, {out}, spans, 1.0);
}

void exceeds_(Tensor flag, Tensor src, double limit) {
  const Call call("exceeds_", flag, "flag");
  const Dtype dtype = check_exceeds(flag, src);
  call.here(src, "src");
  run_exceeds(static_cast<int64_t*>(flag.mutable_data_ptr()), src.const_data_ptr(), dtype, src.numel(),
              static_cast<float>(limit),
              [&](const ExceedsTask& task, int64_t tiles) {
                call.ok(launch_exceeds(task, dtype, tiles, call.stream));
              });
}

void pack_(Tensor out, std::vector<Tensor> grads, std::vector<int64_t> offsets, bool clear, Tensor flag, double limit) {
  const Call call("pack_", out, "out");
  const std::vector<Part> parts = pack_parts(out, grads, offsets, clear);
  const Dtype dtype = check_exceeds(flag, out);
  call.here(grads, "grads");
  call.here(flag, "flag");
  run_pack(static_cast<char*>(out.mutable_data_ptr()), dtype, parts.data(), static_cast<int64_t>(parts.size()),
           static_cast<int64_t*>(flag.mutable_data_ptr()), static_cast<float>(limit),
           [&](const PackTask& task, int64_t tiles) { call.ok(launch_pack(task, dtype, tiles, call.stream)); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zerolite, CUDA, m) {
  m.impl("reduce_adam_", TORCH_BOX(&reduce_adam_));
  m.impl("reduce_adam_moments_", TORCH_BOX(&reduce_adam_moments_));
  m.impl("reduce_", TORCH_BOX(&reduce_));
  m.impl("square_sum_", TORCH_BOX(&square_sum_));
  m.impl("reduce_squares_", TORCH_BOX(&reduce_squares_));
  m.impl("exceeds_", TORCH_BOX(&exceeds_));
  m.impl("pack_", TORCH_BOX(&pack_));
}
