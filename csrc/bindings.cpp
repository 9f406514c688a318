// torch.library implementations for CPU, bound through the LibTorch stable ABI: one build serves every
// torch from 2.11 on and every Python. Checks are in checks.h; schemas are in zerolite/kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "checks.h"
#include "flags.h"
#include "kernels.h"
#include "pool.h"

namespace {

using namespace zerolite;

// The rows of a tensor of spans.
struct Spans {
  const int64_t* data;
  int64_t count;
  int64_t elements = 0;

  Spans(const Tensor& t, int64_t numel, int64_t rows) {
    check_spans_shape(t);
    data = static_cast<const int64_t*>(t.const_data_ptr());
    count = t.size(0);
    check_spans(data, count, numel, rows);
    for (int64_t i = 0; i < count; ++i) elements += whole_groups(data[3 * i + 1] - data[3 * i]);
  }

  // Splits all elements evenly over threads and calls body(start, stop, row) for each piece; cuts lie at
  // multiples of kGroup from a row's start.
  template <class Body>
  void parallel(const Body& body) const {
    zerolite::parallel(threads_for(elements), [&](int part, int parts) {
      const int64_t share = (elements + parts - 1) / parts;
      const int64_t from = std::min(elements, part * whole_groups(share));
      const int64_t to = std::min(elements, (part + 1) * whole_groups(share));
      int64_t before = 0;
      for (int64_t i = 0; i < count && before < to; ++i) {
        const int64_t start = data[3 * i], n = data[3 * i + 1] - start;
        const int64_t lo = std::max<int64_t>(from - before, 0), hi = std::min(to - before, n);
        if (lo < hi) body(start + lo, start + hi, data[3 * i + 2]);
        before += whole_groups(n);
      }
    });
  }
};

void reduce_adam_(Tensor param, Tensor rest, Tensor m, Tensor v, std::vector<Tensor> sources, Tensor spans, Tensor rows,
                  double mean) {
  const AdamTensors t = check_adam(param, rest, m, v, rows);
  const SourceList list(sources, param.numel(), mean);
  const Spans work(spans, param.numel(), rows.size(0));
  const float* hyper = static_cast<const float*>(rows.const_data_ptr());
  work.parallel([&](int64_t start, int64_t stop, int64_t row) {
    AdamRow r;
    memcpy(&r, hyper + row * kAdamRow, sizeof r);
    kernels().reduce_adam(t, list.view, r, start, stop);
  });
}

void reduce_adam_moments_(Tensor param, Tensor rest, Tensor m, Tensor v, Tensor scales, std::vector<Tensor> sources,
                          Tensor spans, Tensor rows, double mean) {
  const MomentTensors t = check_moments(param, rest, m, v, scales, rows);
  const SourceList list(sources, param.numel(), mean);
  const Spans work(spans, param.numel(), rows.size(0));
  check_starts(work.data, work.count);
  const float* hyper = static_cast<const float*>(rows.const_data_ptr());
  work.parallel([&](int64_t start, int64_t stop, int64_t row) {
    MomentRow r;
    memcpy(&r, hyper + row * kMomentRow, sizeof r);
    kernels().reduce_adam_moments(t, list.view, r, start, stop);
  });
}

void split_range(int64_t numel, const std::function<void(int64_t, int64_t)>& body) {
  parallel(threads_for(numel), [&](int part, int parts) {
    const int64_t share = ((numel + parts - 1) / parts + 63) / 64 * 64;
    const int64_t from = std::min(numel, part * share), to = std::min(numel, (part + 1) * share);
    if (from < to) body(from, to);
  });
}

// Bytes from which on what is packed or averaged goes past the caches: its reader has other caches (another rank's core, a
// device) or comes when these hold something else, and a plain store would first fetch what is overwritten.
constexpr int64_t kUncached = 1 << 20;
bool goes_past(const Tensor& out) { return out.numel() * out.element_size() >= kUncached; }

void reduce_(Tensor out, std::vector<Tensor> sources, double mean, bool accumulate) {
  const int64_t numel = out.numel();
  const Dtype dtype = check_reduce(out, accumulate);
  const SourceList list(sources, numel, mean);
  void* to = out.mutable_data_ptr();
  const bool past = goes_past(out) && !accumulate;
  split_range(numel, [&](int64_t a, int64_t b) { kernels().reduce(to, dtype, accumulate, past, list.view, a, b); });
}

// sums[row] += part; threads may come in any order, since these are integers.
void add_limbs(Tensor& sums, int64_t row, const int64_t (&part)[kLimbs], std::mutex& mutex) {
  std::lock_guard<std::mutex> lock(mutex);
  int64_t* to = static_cast<int64_t*>(sums.mutable_data_ptr()) + row * kLimbs;
  int64_t carry = 0;
  for (int k = 0; k < kLimbs - 1; ++k) {
    const int64_t sum = to[k] + part[k] + carry;
    to[k] = sum & 0xffffffff;
    carry = sum >> 32;
  }
  to[kLimbs - 1] += part[kLimbs - 1];
}

void square_sum_(Tensor sums, std::vector<Tensor> sources, Tensor spans, double mean) {
  const int64_t numel = check_square_sum(sums, sources);
  const SourceList list(sources, numel, mean);
  const Spans work(spans, numel, sums.size(0));
  std::mutex mutex;
  work.parallel([&](int64_t start, int64_t stop, int64_t row) {
    int64_t part[kLimbs] = {};
    kernels().square_sum(part, list.view, start, stop);
    add_limbs(sums, row, part, mutex);
  });
}

void reduce_squares_(Tensor out, Tensor sums, std::vector<Tensor> sources, Tensor spans, double mean) {
  const int64_t numel = out.numel();
  const Dtype dtype = check_reduce(out, false);
  check_square_sum(sums, sources);
  const SourceList list(sources, numel, mean);
  const Spans work(spans, numel, sums.size(0));
  check_order(work.data, work.count);
  void* to = out.mutable_data_ptr();
  const bool past = goes_past(out);
  std::mutex mutex;
  split_range(numel, [&](int64_t from, int64_t stop) {
    const int64_t(*rows)[3] = reinterpret_cast<const int64_t(*)[3]>(work.data);
    auto next = std::upper_bound(rows, rows + work.count, from, [](int64_t x, const int64_t* row) { return x < row[1]; });
    for (int64_t at = from; at < stop;) {
      const bool inside = next != rows + work.count && (*next)[0] <= at;
      const int64_t until = next == rows + work.count ? stop : std::min(stop, (*next)[inside ? 1 : 0]);
      if (!inside) {
        kernels().reduce(to, dtype, false, past, list.view, at, until);
      } else {
        int64_t part[kLimbs] = {};
        kernels().reduce_squares(to, dtype, past, part, list.view, at, until);
        add_limbs(sums, (*next)[2], part, mutex);
        ++next;
      }
      at = until;
    }
  });
}

void exceeds_(Tensor flag, Tensor src, double limit) {
  const Dtype dtype = check_exceeds(flag, src);
  const void* from = src.const_data_ptr();
  std::atomic<bool> any = false;
  split_range(src.numel(), [&](int64_t a, int64_t b) {
    if (kernels().exceeds(from, dtype, static_cast<float>(limit), a, b)) any = true;
  });
  if (any) *static_cast<int64_t*>(flag.mutable_data_ptr()) = 1;
}

void pack_all(Tensor& out, const std::vector<Part>& parts, Tensor& flag, double limit) {
  const Dtype dtype = check_exceeds(flag, out);
  const int64_t width = out.element_size();
  const bool past = goes_past(out);
  char* to = static_cast<char*>(out.mutable_data_ptr());
  std::atomic<bool> any = false;
  split_range(out.numel(), [&](int64_t from, int64_t stop) {
    auto next = std::upper_bound(parts.begin(), parts.end(), from, [](int64_t x, const Part& p) { return x < p.stop; });
    for (; next != parts.end() && next->start < stop; ++next) {
      const int64_t lo = std::max(next->start, from), hi = std::min(next->stop, stop);
      char* here = to + lo * width;
      if (next->from == nullptr) {
        memset(here, 0, (hi - lo) * width);
      } else {
        const char* from = static_cast<const char*>(next->from) + (lo - next->start) * width;
        if (kernels().copy(here, from, dtype, static_cast<float>(limit), hi - lo, past)) any = true;
      }
    }
  });
  if (any) *static_cast<int64_t*>(flag.mutable_data_ptr()) = 1;
}

void pack_(Tensor out, std::vector<Tensor> grads, std::vector<int64_t> offsets, bool clear, Tensor flag, double limit) {
  pack_all(out, pack_parts(out, grads, offsets, clear), flag, limit);
}

void pack_at_(Tensor out, Tensor places, bool clear, Tensor flag, double limit, int64_t start, int64_t width,
              int64_t stride) {
  pack_all(out, pack_parts(out, places, clear, {start, width, stride}), flag, limit);
}

// Flags are int64 counters in memory that processes share.
int64_t* flag_at(Tensor& flags, int64_t place) {
  check(flags, ScalarType::Long, flags.numel(), "flags", "int64");
  STD_TORCH_CHECK(0 <= place && place < flags.numel(), "flags: place ", place, " of ", flags.numel());
  return static_cast<int64_t*>(flags.mutable_data_ptr()) + place;
}

void flag_store_(Tensor flags, int64_t place, int64_t value) { flag_store(flag_at(flags, place), value); }

bool flag_wait_(Tensor flags, std::vector<int64_t> places, int64_t value, double seconds) {
  std::vector<const int64_t*> at;
  for (int64_t place : places) at.push_back(flag_at(flags, place));
  return flag_wait(at.data(), at.size(), value, seconds);
}

bool use_isa_(std::string name) { return use_isa(name.c_str()); }
std::string isa_() { return kernels().name; }
int64_t threads_(int64_t count) {
  if (count > 0) set_threads(static_cast<int>(count));
  return get_threads();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zerolite, CPU, m) {
  m.impl("reduce_adam_", TORCH_BOX(&reduce_adam_));
  m.impl("reduce_adam_moments_", TORCH_BOX(&reduce_adam_moments_));
  m.impl("reduce_", TORCH_BOX(&reduce_));
  m.impl("square_sum_", TORCH_BOX(&square_sum_));
  m.impl("reduce_squares_", TORCH_BOX(&reduce_squares_));
  m.impl("exceeds_", TORCH_BOX(&exceeds_));
  m.impl("pack_", TORCH_BOX(&pack_));
  m.impl("pack_at_", TORCH_BOX(&pack_at_));
  m.impl("flag_store_", TORCH_BOX(&flag_store_));
  m.impl("flag_wait", TORCH_BOX(&flag_wait_));
}

STABLE_TORCH_LIBRARY_IMPL(zerolite, CompositeExplicitAutograd, m) {
  m.impl("use_isa", TORCH_BOX(&use_isa_));
  m.impl("isa", TORCH_BOX(&isa_));
  m.impl("threads", TORCH_BOX(&threads_));
}
