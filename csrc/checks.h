// Checks of arguments that the CPU and the CUDA bindings share, with one wording.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels.h"

namespace zerolite {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kHalf;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
  return Dtype::kFloat;
}

inline void check(const Tensor& t, ScalarType dtype, int64_t numel, const char* name, const char* expected) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected dtype ", expected);
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == numel, name, ": expected a contiguous tensor of ", numel,
                  " elements, got ", t.numel());
}

inline void check_spans_shape(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 2 && t.size(1) == 3 && t.is_contiguous(),
                  "spans: expected a contiguous int64 tensor of shape (n, 3)");
}

// Rows (start, stop, index) with 0 <= start <= stop <= numel and 0 <= index < rows. Returns the elements in all.
inline int64_t check_spans(const int64_t* data, int64_t count, int64_t numel, int64_t rows) {
  int64_t elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = data[3 * i], stop = data[3 * i + 1], row = data[3 * i + 2];
    STD_TORCH_CHECK(0 <= start && start <= stop && stop <= numel, "spans: row ", i, " is [", start, ", ", stop,
                    "), outside a tensor of ", numel, " elements");
    STD_TORCH_CHECK(0 <= row && row < rows, "spans: row ", i, " names index ", row, " of ", rows);
    elements += stop - start;
  }
  return elements;
}

// The pointers of the tensors to sum, and the view of them that kernels take.
struct SourceList {
  std::vector<const void*> data;
  Sources view;

  SourceList(const std::vector<Tensor>& sources, int64_t numel, double mean) {
    STD_TORCH_CHECK(!sources.empty(), "sources: expected at least one tensor");
    const ScalarType dtype = sources[0].scalar_type();
    for (const Tensor& s : sources) {
      check(s, dtype, numel, "sources", "equal for all sources");
      data.push_back(s.const_data_ptr());
    }
    view = {data.data(), static_cast<int>(data.size()), dtype_of(sources[0], "sources"), static_cast<float>(mean)};
  }
};

// Elements that groups of stored moments hold for n elements.
inline int64_t whole_groups(int64_t n) { return (n + kGroup - 1) / kGroup * kGroup; }

inline void check_starts(const int64_t* data, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(data[3 * i] % kGroup == 0, "spans: row ", i, " starts at ", data[3 * i],
                    ", expected a multiple of 64");
}

inline void check_order(const int64_t* data, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    STD_TORCH_CHECK(data[3 * i - 2] <= data[3 * i], "spans: row ", i, " starts at ", data[3 * i],
                    ", expected ", data[3 * i - 2], " or more, where the row before ends");
}

inline void check_rest(const Tensor& rest, Dtype dtype, int64_t numel) {
  if (dtype == Dtype::kBFloat16) check(rest, ScalarType::Short, numel, "rest", "int16 (remainder of bfloat16)");
  if (dtype == Dtype::kHalf) check(rest, ScalarType::Float, numel, "rest", "float32 (master of float16)");
}

inline AdamTensors check_adam(Tensor& param, Tensor& rest, Tensor& m, Tensor& v, const Tensor& rows) {
  const int64_t numel = param.numel();
  const Dtype dtype = dtype_of(param, "param");
  check(param, param.scalar_type(), numel, "param", "");
  check(m, ScalarType::Float, numel, "m", "float32");
  check(v, ScalarType::Float, numel, "v", "float32");
  check_rest(rest, dtype, numel);
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Float && rows.dim() == 2 && rows.size(1) == kAdamRow &&
                      rows.is_contiguous(),
                  "rows: expected a contiguous float32 tensor of shape (n, 8)");
  return {param.mutable_data_ptr(), rest.mutable_data_ptr(), static_cast<float*>(m.mutable_data_ptr()),
          static_cast<float*>(v.mutable_data_ptr()), dtype};
}

// `m` and `v` are bytes with `scales`, or bfloat16; rows have one more column, the number of the update.
inline MomentTensors check_moments(Tensor& param, Tensor& rest, Tensor& m, Tensor& v, Tensor& scales,
                                   const Tensor& rows) {
  const int64_t numel = param.numel();
  const Dtype dtype = dtype_of(param, "param");
  const bool bytes = m.scalar_type() == ScalarType::Byte;
  check(param, param.scalar_type(), numel, "param", "");
  check(m, bytes ? ScalarType::Byte : ScalarType::BFloat16, numel, "m", "uint8 or bfloat16");
  check(v, m.scalar_type(), numel, "v", "of m");
  if (bytes) check(scales, ScalarType::Byte, whole_groups(numel) / kGroup * 2, "scales", "uint8");
  check_rest(rest, dtype, numel);
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Float && rows.dim() == 2 && rows.size(1) == kMomentRow &&
                      rows.is_contiguous(),
                  "rows: expected a contiguous float32 tensor of shape (n, 9)");
  return {param.mutable_data_ptr(), rest.mutable_data_ptr(), m.mutable_data_ptr(), v.mutable_data_ptr(),
          bytes ? static_cast<uint8_t*>(scales.mutable_data_ptr()) : nullptr, dtype, bytes};
}

inline Dtype check_reduce(const Tensor& out, bool accumulate) {
  const Dtype dtype = dtype_of(out, "out");
  check(out, out.scalar_type(), out.numel(), "out", "");
  STD_TORCH_CHECK(!accumulate || dtype == Dtype::kFloat, "out: expected float32 to accumulate into");
  return dtype;
}

// Returns the elements of each source.
inline int64_t check_square_sum(const Tensor& sums, const std::vector<Tensor>& sources) {
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Long && sums.dim() == 2 && sums.size(1) == kLimbs &&
                      sums.is_contiguous(),
                  "sums: expected a contiguous int64 tensor of shape (n, 20)");
  return sources.empty() ? 0 : sources[0].numel();
}

inline Dtype check_exceeds(const Tensor& flag, const Tensor& src) {
  check(flag, ScalarType::Long, 1, "flag", "int64");
  const Dtype dtype = dtype_of(src, "src");
  check(src, src.scalar_type(), src.numel(), "src", "");
  return dtype;
}

// What `pack_` writes, in the order of `out`; with `clear`, gaps between gradients are parts too.
inline std::vector<Part> in_order(std::vector<Part> parts, int64_t numel, bool clear) {
  const auto before = [](const Part& a, const Part& b) { return a.start < b.start; };
  if (!std::is_sorted(parts.begin(), parts.end(), before)) std::sort(parts.begin(), parts.end(), before);
  parts.push_back({numel, numel, nullptr});
  std::vector<Part> all;
  all.reserve(2 * parts.size());
  int64_t at = 0;
  for (const Part& part : parts) {
    STD_TORCH_CHECK(at <= part.start, "grads: two of them overlap at element ", part.start, " of out");
    if (clear && at < part.start) all.push_back({at, part.start, nullptr});
    if (part.start < part.stop) all.push_back(part);
    at = part.stop;
  }
  return all;
}

inline std::vector<Part> pack_parts(const Tensor& out, const std::vector<Tensor>& grads,
                                    const std::vector<int64_t>& offsets, bool clear) {
  STD_TORCH_CHECK(grads.size() == offsets.size(), "offsets: expected ", grads.size(), ", got ", offsets.size());
  check(out, out.scalar_type(), out.numel(), "out", "");
  std::vector<Part> parts;
  for (size_t i = 0; i < grads.size(); ++i) {
    STD_TORCH_CHECK(grads[i].scalar_type() == out.scalar_type() && grads[i].is_contiguous(),
                    "grads: expected contiguous tensors of the dtype of out");
    STD_TORCH_CHECK(0 <= offsets[i] && offsets[i] <= out.numel() - grads[i].numel(), "grads: item ", i,
                    " ends outside out");
    if (grads[i].numel() > 0) parts.push_back({offsets[i], offsets[i] + grads[i].numel(), grads[i].const_data_ptr()});
  }
  return in_order(std::move(parts), out.numel(), clear);
}

// Of every `stride` elements of a longer tensor, `width` from `start` on, one after the other.
struct Stripe {
  int64_t start, width, stride;
};

// Parts of the longer tensor, in order, where they lie in the stripe (`Window` of zerolite/kernels/ops.py).
inline std::vector<Part> inside(const std::vector<Part>& parts, const Stripe& stripe, int64_t rows, int64_t bytes) {
  std::vector<Part> found;
  auto next = parts.begin();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row * stripe.stride + stripe.start, move = row * stripe.width - first;
    next = std::upper_bound(next, parts.end(), first, [](int64_t x, const Part& p) { return x < p.stop; });
    for (auto part = next; part != parts.end() && part->start < first + stripe.width; ++part) {
      const int64_t lo = std::max(part->start, first), hi = std::min(part->stop, first + stripe.width);
      const char* from = static_cast<const char*>(part->from);
      found.push_back({lo + move, hi + move, from == nullptr ? nullptr : from + (lo - part->start) * bytes});
    }
  }
  return found;
}

// The same for gradients by address: int64 (3, n) of offsets in the longer tensor, elements and addresses.
inline std::vector<Part> pack_parts(const Tensor& out, const Tensor& places, bool clear, const Stripe& stripe) {
  check(out, out.scalar_type(), out.numel(), "out", "");
  STD_TORCH_CHECK(places.scalar_type() == ScalarType::Long && places.dim() == 2 && places.size(0) == 3 &&
                      places.is_contiguous(),
                  "places: expected a contiguous int64 tensor of shape (3, n)");
  const int64_t rows = stripe.width > 0 ? out.numel() / stripe.width : 0;
  STD_TORCH_CHECK(0 <= stripe.start && stripe.start + stripe.width <= stripe.stride &&
                      rows * stripe.width == out.numel(),
                  "window: expected ", stripe.width, " elements from ", stripe.start, " on within ", stripe.stride,
                  ", as often as out has them");
  const int64_t* row = static_cast<const int64_t*>(places.const_data_ptr());
  const int64_t count = places.size(1), numel = rows * stripe.stride;
  std::vector<Part> parts;
  parts.reserve(count + 1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = row[i], elements = row[count + i];
    STD_TORCH_CHECK(0 <= start && 0 <= elements && start <= numel - elements, "grads: item ", i, " ends outside out");
    if (elements > 0) parts.push_back({start, start + elements, reinterpret_cast<const void*>(row[2 * count + i])});
  }
  parts = in_order(std::move(parts), numel, clear);
  return stripe.width == stripe.stride ? parts : inside(parts, stripe, rows, out.element_size());
}

}  // namespace zerolite
