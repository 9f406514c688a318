"""Layout and partition, by property: every element has exactly one owner, for any shapes and world."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, seeded
from torch import nn

from zerolite import parts
from zerolite.layout import ALIGN, TINY, Layout, Piece, Slot, aligned, cut, group
from zerolite.partition import find_units
from zerolite.placement import STAGES, make_plan, with_rows
from zerolite.placement import Widths as W

numels = st.lists(st.integers(0, 700), min_size=1, max_size=12)


def named(sizes):
    return [(f"p{k}", n) for k, n in enumerate(sizes)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1), st.integers(1, 9), st.sampled_from([2, 4]), st.integers(1, 200_000))
def test_parts_cover_a_shard_and_fit(shards, size, width, most):
    sizes = [(shard * ALIGN, width) for shard in shards]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART", most)
        room, regions = parts.part_room(size, sizes), parts.regions_of(size, sizes)
        assert parts.arena(size, sizes) == room * regions
    assert room <= max(most, size * ALIGN * 4) and 1 <= regions <= parts.REGIONS
    for shard, _ in sizes:
        for bytes_each in (width, 4):  # in compute dtype, and of local fp32 sums
            cuts = parts.parts_of(shard, size, bytes_each, room)
            assert cuts[0][0] == 0 and cuts[-1][1] == shard
            assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))
            assert all(start % ALIGN == 0 and (stop - start) * size * bytes_each <= room for start, stop in cuts)


@settings(max_examples=300, deadline=None)
@given(numels, st.integers(1, 9), st.integers(1, 2000))
def test_each_element_is_owned_once(sizes, world, limit):
    layouts = cut(named(sizes), world, limit)
    seen = {}
    for layout in layouts:
        for rank in range(world):
            start, stop = layout.span(rank)
            for piece in layout.pieces(start, stop):
                name = layout.slots[piece.slot].name
                assert piece.offset >= 0 and piece.offset + piece.stop - piece.start <= layout.shard
                for k, element in enumerate(range(piece.start, piece.stop)):
                    assert (name, element) not in seen
                    seen[name, element] = layout.slots[piece.slot].offset + element == start + piece.offset + k
    assert set(seen) == {(name, k) for name, n in named(sizes) for k in range(n)} and all(seen.values())


@settings(max_examples=300, deadline=None)
@given(numels, st.integers(1, 9), st.integers(1, 2000))
def test_buckets_keep_order_alignment_and_limit(sizes, world, limit):
    layouts = cut(named(sizes), world, limit)
    order = [name for name, _ in named(sizes)]
    found = [[order.index(slot.name) for slot in layout.slots] for layout in layouts]
    assert sorted(k for members in found for k in members) == list(range(len(sizes)))
    assert all(members == sorted(members) for members in found[1:]) and found[1:] == sorted(found[1:])
    joined = [k for k in found[0] if len(found) > 1 and k > found[1][0]]  # small rests of later buckets
    assert found[0] == sorted(found[0]) and all(aligned(sizes[k]) * TINY < limit for k in joined)
    for number, layout in enumerate(layouts):
        assert layout.numel % (ALIGN * world) == 0 and layout.shard * world == layout.numel
        assert all(slot.offset % ALIGN == 0 for slot in layout.slots)
        ends = [slot.offset + slot.numel for slot in layout.slots]
        assert all(a <= b.offset for a, b in zip(ends, layout.slots[1:], strict=False)) and ends[-1] <= layout.numel
        assert len(layout.slots) == 1 or ends[-1] <= limit or number == 0
        assert layout.numel - ends[-1] < ALIGN * (world + 1)


@settings(max_examples=200, deadline=None)
@given(numels, st.integers(1, 6), st.integers(1, 6), st.integers(1, 900), st.integers(1, 900))
def test_a_cut_falls_at_multiples_of_align_within_a_parameter(sizes, a, b, first, second):
    """So that no vector loop or group of quantised values can tell two layouts apart."""
    for world, limit in ((a, first), (b, second)):
        for layout in cut(named(sizes), world, limit):
            for rank in range(world):
                assert all(piece.start % ALIGN == 0 for piece in layout.pieces(*layout.span(rank)))


def test_the_drawing_in_the_docstring():
    (layout,) = cut([("first", 70), ("second", 10)], 2, 1000)
    assert layout == Layout((Slot("first", 0, 70), Slot("second", 128, 10)), 256, 2)
    assert list(layout.pieces(*layout.span(0))) == [Piece(0, 0, 70, 0)]
    assert list(layout.pieces(*layout.span(1))) == [Piece(1, 0, 10, 0)]
    assert aligned(0) == 0 and aligned(1) == ALIGN
    with pytest.raises(ValueError, match="world size"):
        cut([("p", 1)], 0, 10)


@settings(max_examples=100, deadline=None)
@given(numels, st.integers(1, 8), st.sampled_from(STAGES), st.integers(1, 2000))
def test_plan_bytes_follow_from_the_table(sizes, world, stage, limit):
    layouts = cut(named(sizes), world, limit)
    plan = with_rows(make_plan(stage, None, world), [(layout, W(2, 10), True) for layout in layouts])
    whole, shard = sum(layout.numel for layout in layouts), sum(layout.shard for layout in layouts)
    assert plan.bytes_at_rest == {
        "params": 2 * (shard if stage == 3 else whole),
        "grads": 2 * (shard if stage >= 2 else whole),
        "states": 10 * (shard if stage >= 1 else whole),
    }
    assert plan.numel == sum(sizes)


def test_plan_table_is_printed():
    plan = with_rows(make_plan(2, "states", 4), [(layout, W(2, 10), True) for layout in cut([("p", 1024)], 4, 10**6)])
    text = str(plan)
    assert "ZeRO stage 2, offload states, 4 rank(s)" in text and "sharded" in text and "host" in text and "2.500" in text


def unit_names(model, classes=None):
    return {unit.name: [name for name, _ in unit.params] for unit in find_units(model, classes)}


def test_units_are_the_children_of_outermost_lists():
    found = unit_names(seeded(Net))
    assert list(found) == ["root", "blocks.0", "blocks.1", "blocks.2"]
    assert found["root"] == ["scale", "embed.weight", "norm.weight", "norm.bias"]  # the tied head is the embedding
    nested = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU(), nn.ModuleList([nn.Linear(2, 2)]))
    assert list(unit_names(nested)) == ["0", "2"]


def test_units_of_given_classes_and_tied_parameters():
    model = seeded(Net)
    assert list(unit_names(model, [nn.LayerNorm])) == ["root", "blocks.0.norm", "blocks.1.norm", "blocks.2.norm", "norm"]
    model.blocks[2].up.weight = model.blocks[0].up.weight
    assert "blocks.0.up.weight" in unit_names(model)["root"]
    with pytest.raises(ValueError, match="no module of class Conv2d"):
        find_units(model, [nn.Conv2d])
    with pytest.raises(TypeError, match=r"expected a list of nn\.Module classes"):
        find_units(model, ["Block"])


def test_a_module_of_the_root_that_fills_a_bucket_is_a_unit_unless_it_is_tied():
    def leaves(model, limit, dtype=None):
        units = find_units(model, None, limit, dtype)
        assert units[0].module is None
        return [unit.name for unit in units if unit.leaf]

    untied = seeded(lambda: Net(tied=False))
    size = 31 * 13 * 4
    assert leaves(untied, size - 1) == ["embed", "head"] and leaves(untied, size) == []
    assert leaves(untied, size - 1, torch.bfloat16) == [] and leaves(untied, 100) == ["embed", "head"]
    assert leaves(seeded(Net), size - 1) == []
    assert not any(unit.leaf for unit in find_units(untied, [nn.LayerNorm], 100))  # what was asked for, alone
    untied.blocks[0].extra = untied.head.weight
    assert leaves(untied, size - 1) == ["embed"]
    model = nn.ModuleDict({"embed": nn.Embedding(9, 9), "layers": nn.ModuleList([nn.Linear(2, 2)])})
    assert [(unit.name, len(unit.params)) for unit in find_units(model, None, 100)] == [
        ("root", 0),
        ("embed", 1),
        ("layers.0", 2),
    ]


def test_a_small_rest_joins_the_first_bucket_which_goes_out_last():
    assert group([100, 1000, 2000, 10, 10], 1000) == [[0], [1], [2], [3, 4]]  # 128 of 1000 elements are not small
    assert group([2000, 3000, 10, 2000, 20, 5000], 2**14) == [[0, 1, 2, 3, 4, 5]]
    assert group([20000, 30000, 10, 20000, 20], 2**14) == [[0, 2, 4], [1], [3]]
    assert group([10, 20000, 10], 2**14) == [[0, 2], [1]] and group([], 5) == []
    first, *others = cut([("q", 20000), ("k", 20000), ("norm", 10)], 2, 2**14)
    assert [slot.name for slot in first.slots] == ["q", "norm"] and [slot.name for slot in others[0].slots] == ["k"]


def test_every_parameter_is_in_one_unit():
    for model in (seeded(Net), nn.Linear(3, 3), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))):
        found = [name for names in unit_names(model).values() for name in names]
        assert sorted(found) == sorted(name for name, _ in model.named_parameters())


def test_layouts_say_who_owns_what_for_any_rank():
    (layout,) = cut([("w", 1000)], 4, 10**6)
    ranges = [(p.start, p.stop) for rank in range(4) for p in layout.pieces(*layout.span(rank))]
    assert ranges == [(0, 256), (256, 512), (512, 768), (768, 1000)]
    assert torch.tensor([b - a for a, b in ranges]).sum() == 1000
