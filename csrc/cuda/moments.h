// Adam with moments in 8 or 16 bits: what a block of threads does. The expressions are those of csrc/moments_cpu.h.
//
// A group of kGroup elements shares two scales, which are known when its last element has been updated. Neighbouring
// lanes of one warp hold a group, and find its largest magnitudes by a butterfly, without shared memory:
//
//   16-bit tensors    8 lanes with 8 elements each    lane   0    1    2    3  ...   7
//   a 32-bit tensor  16 lanes with 4 elements each           maximum with lane ^ 4, lane ^ 2, lane ^ 1
//
// Reading and writing divide into whole and cut lanes, as elsewhere; all between is common to a warp, so that every
// lane reaches the butterfly. Lanes without elements hold zeros, which raise no maximum.
#pragma once

#include "bodies.h"

namespace zerolite {

struct MomentTask {
  MomentTensors t;
  SourceTable sources;
  Table<MomentRow, 48> table;
};
static_assert(sizeof(MomentTask) <= kParameterBytes);

// Elements of a lane: the widest tensor moves 16 bytes an access. Masters of fp16 parameters are fp32.
constexpr int moment_width(Dtype param, Dtype source) {
  return param == Dtype::kBFloat16 && source != Dtype::kFloat ? 8 : 4;
}
template <class T>
constexpr Dtype kDtypeOf = Dtype::kFloat;
template <>
inline constexpr Dtype kDtypeOf<bf16> = Dtype::kBFloat16;
template <>
inline constexpr Dtype kDtypeOf<half> = Dtype::kHalf;

// Largest magnitudes, as bits of binary32.
struct Tops {
  uint32_t m, v;
};
ZL_FN Tops larger(const Tops& a, const Tops& b) { return {a.m > b.m ? a.m : b.m, a.v > b.v ? a.v : b.v}; }

// Elements of one lane between reading and writing. C is uint8_t or uint16_t, the kind of stored moments.
template <class P, class G, class C>
struct MomentLane {
  static constexpr int W = moment_width(kDtypeOf<P>, kDtypeOf<G>);
  static constexpr int kLanes = kGroup / W;  // of a group
  static_assert(32 % kLanes == 0 && kThreads % 32 == 0, "a group lies in one warp");

  Cut at;
  bool whole;
  Stored<P, W> p;
  Pack<C, W> codes_m, codes_v;
  uint8_t scales[2];
  float m[W], v[W], g[1][W];
  uint32_t dice[W];
  Tops tops;

  ZL_METHOD bool first_of_group() const { return at.at % kGroup == 0 && at.hi > 0; }
};

template <class P, class G, class C, class Where>
ZL_FN void read_lane(MomentLane<P, G, C>& lane, const MomentTask& task, const Where& at) {
  load(lane.p, task.t, at);
  load(lane.codes_m, static_cast<const C*>(task.t.m), at);
  load(lane.codes_v, static_cast<const C*>(task.t.v), at);
  if (sizeof(C) == 1) {
    const uint8_t* scales = task.t.scales + at.at / kGroup * 2;
    ZL_TOUCH(scales, 2, 1);
    lane.scales[0] = scales[0];
    lane.scales[1] = scales[1];
  }
  const Where one[1] = {at};
  average<G>(lane.g, task.sources, one);
}

template <class P, class G, class C>
ZL_FN void decode(MomentLane<P, G, C>& lane) {
  const float unit_m = from_units<MomentCode>(lane.scales[0]), unit_v = from_units<SquareCode>(lane.scales[1]);
  ZL_UNROLL
  for (int i = 0; i < lane.W; ++i) {
    const uint32_t m = lane.codes_m.x[i], v = lane.codes_v.x[i];
    lane.m[i] = sizeof(C) == 1 ? decode_moment(m, unit_m) : as_float(m << 16);
    lane.v[i] = sizeof(C) == 1 ? decode_square(v, unit_v) : as_float(v << 16);
  }
}

// Reads, decodes and updates a thread's elements.
template <class P, class G, class C>
ZL_FN void moments_update(MomentLane<P, G, C>& lane, const MomentTask& task, const Entry<MomentRow>& e, int64_t tile,
                          int thread) {
  lane.at = group_of<lane.W, 1>(e, tile, thread, 0);
  lane.whole = e.phase == 0 && lane.at.hi == lane.W;  // spans start with a group, so lo is 0
  lane.p = {};
  lane.codes_m = lane.codes_v = {};
  lane.scales[0] = lane.scales[1] = 0;
  ZL_UNROLL
  for (int i = 0; i < lane.W; ++i) lane.g[0][i] = 0;
  if (lane.whole)
    read_lane(lane, task, Whole{lane.at.at});
  else if (lane.at.hi > 0)
    read_lane(lane, task, lane.at);
  decode(lane);
  const uint32_t salt = salt_of(e.with.step);
  lane.tops = {0, 0};
  ZL_UNROLL
  for (int i = 0; i < lane.W; ++i) {
    const float g = lane.g[0][i];
    float p = master(lane.p, i);
    adam(g, p, lane.m[i], lane.v[i], e.with.adam, Root{});
    keep(lane.p, i, p);
    lane.m[i] = plain(lane.m[i]);
    lane.v[i] = as_bits(lane.v[i]) < kLargest ? lane.v[i] : as_float(kLargest);
    lane.dice[i] = dice_of(plain(p), plain(g), salt);
    lane.tops = larger(lane.tops, {as_bits(lane.m[i]) & 0x7fffffffu, as_bits(lane.v[i])});
  }
}

// After this every lane of a group holds the group's largest. `block.meet(by)` takes what the lane `by` away has in.
template <int kLanes, class Block>
ZL_FN void find_largest(Block& block) {
  ZL_UNROLL
  for (int by = kLanes / 2; by > 0; by /= 2) block.meet(by);
}

template <class P, class G, class C, class Where>
ZL_FN void write_lane(const MomentLane<P, G, C>& lane, const MomentTask& task, const Where& at) {
  store(task.t, lane.p, at);
  store(static_cast<C*>(task.t.m), lane.codes_m, at);
  store(static_cast<C*>(task.t.v), lane.codes_v, at);
}

// Encodes by the scales that lane.tops asks for, and writes.
template <class P, class G, class C>
ZL_FN void moments_store(MomentLane<P, G, C>& lane, const MomentTask& task) {
  lane.scales[0] = scale_of<MomentCode>(lane.tops.m);
  lane.scales[1] = scale_of<SquareCode>(lane.tops.v);
  const float in_m = to_units<MomentCode>(lane.scales[0]), in_v = to_units<SquareCode>(lane.scales[1]);
  constexpr uint32_t kNanCode = kNan >> kDropped & 0x7fu;  // products of a NaN are again the GPU's own
  ZL_UNROLL
  for (int i = 0; i < lane.W; ++i) {
    const float m = lane.m[i], v = lane.v[i];
    const uint32_t dice = lane.dice[i];
    const uint32_t code = m == m ? encode_moment(m, in_m, dice) : kNanCode;
    lane.codes_m.x[i] = static_cast<C>(sizeof(C) == 1 ? code : moment_bf16(m, dice));
    lane.codes_v.x[i] = static_cast<C>(sizeof(C) == 1 ? encode_square(v, in_v, dice) : square_bf16(v, dice));
  }
  if (sizeof(C) == 1 && lane.first_of_group()) {
    uint8_t* scales = task.t.scales + lane.at.at / kGroup * 2;
    ZL_TOUCH(scales, 2, 1);
    scales[0] = lane.scales[0];
    scales[1] = lane.scales[1];
  }
  if (lane.whole)
    write_lane(lane, task, Whole{lane.at.at});
  else
    write_lane(lane, task, lane.at);
}

}  // namespace zerolite
