"""Which calls become blocks."""

from __future__ import annotations

import itertools

import pytest
from denoisers import BY_NAME, build
from splitting import Split, assert_bitwise, cut, inputs_of, whole

from asyncdiff.graph import BlockKey, Partition
from asyncdiff.trace import call_costs, find_blocks, record, reown
from asyncdiff.trace.opening import BALANCE, _fits, _fits_nested
from asyncdiff.weights import dump_skeleton, load_skeleton


@pytest.fixture(scope="module")
def sd21():
    module = build(BY_NAME["SD1.5"])
    kwargs = BY_NAME["SD1.5"].inputs(2, 16)
    return module, kwargs, record(module, inputs_of(module, kwargs), device="cpu", live=True)


def best_chain(costs, num_stages):
    """By trying all cuts."""
    cuts = itertools.combinations(range(1, len(costs)), num_stages - 1)
    return min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cut, len(costs)))) for cut in cuts)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_measured_times_decide_what_is_opened(sd21, num_stages):
    _, _, recording = sd21
    costs = call_costs(recording)
    # Everything but one up block is nearly free: only inside it can a balanced cut be.
    heavy = "up_blocks.2."
    seconds = dict.fromkeys(costs, 0.01)
    inner = [key for key, cost in costs.items() if key.path.startswith(heavy)]
    for key in inner:
        seconds[key] = 1.0
    for key in [
        key for key in reversed(costs) if any(inside.path.startswith(key.path + ".") for inside in inner)
    ]:
        seconds[key] = sum(seconds[k] for k, c in costs.items() if c.parent == key)
    graph = find_blocks(recording, num_stages, seconds=seconds)
    paths = [block.key.path for block in graph.blocks]
    assert any(path.startswith(heavy) for path in paths)
    assert "up_blocks.1" in paths  # not opened: no cut runs through it
    times = [block.seconds for block in graph.blocks]
    assert times == [seconds[block.key] for block in graph.blocks]
    assert best_chain(times, num_stages) <= BALANCE * sum(times) / num_stages


def test_fitting_agrees_with_trying_all_cuts():
    import random

    rng = random.Random(0)
    for _ in range(200):
        costs = [rng.random() for _ in range(rng.randint(3, 8))]
        for num_stages in (2, 3):
            best = best_chain(costs, num_stages)
            assert _fits(costs, num_stages, best * (1 + 1e-9))
            assert not _fits(costs, num_stages, best * (1 - 1e-9))


def test_nested_fitting_agrees_with_trying_all_cuts():
    import random

    rng = random.Random(1)
    for _ in range(200):
        costs = [rng.random() for _ in range(rng.randint(4, 8))]
        for num_stages in (2, 3):
            best = min(
                max(
                    sum(costs[: bounds[0]]) + sum(costs[bounds[-1] :]),
                    *(sum(costs[a:b]) for a, b in itertools.pairwise(bounds)),
                )
                for bounds in itertools.combinations(range(1, len(costs)), num_stages)
            )
            assert _fits_nested(costs, num_stages, best * (1 + 1e-9))
            assert not _fits_nested(costs, num_stages, best * (1 - 1e-9))


def test_listed_containers_are_blocks(sd21):
    module, kwargs, recording = sd21
    listed = ["conv_in", "down_blocks.0", "down_blocks.1", "down_blocks.2", "down_blocks.3", "mid_block",
    "up_blocks.0",
              "up_blocks.1", "up_blocks.2", "up_blocks.3", "conv_norm_out", "conv_out"]  # fmt: skip
    graph = find_blocks(recording, block_paths=listed)
    assert [block.key.path for block in graph.blocks] == listed
    split = Split(module, recording, graph, cut(graph, "chain", 3))
    assert_bitwise(split.run(inputs_of(module, kwargs)), whole(module, kwargs))


def test_listed_parts_open_what_holds_them(sd21):
    module, kwargs, recording = sd21
    graph = find_blocks(
        recording, block_paths=["down_blocks", "up_blocks.1.attentions.2.transformer_blocks.0"]
    )
    paths = [block.key.path for block in graph.blocks]
    assert "down_blocks.0" in paths
    assert "up_blocks.1.attentions.2.transformer_blocks.0" in paths
    assert "up_blocks.1.resnets.0" in paths
    assert "up_blocks.0" in paths
    split = Split(module, recording, graph, cut(graph, "chain", 3))
    assert_bitwise(split.run(inputs_of(module, kwargs)), whole(module, kwargs))


def test_owners_follow_the_module_path(sd21):
    _, _, recording = sd21
    coarse = find_blocks(recording, block_paths=["down_blocks.0"])
    fine = find_blocks(recording, block_paths=["up_blocks.3.resnets.0"])
    keys = [block.key for block in coarse.blocks]
    at = keys.index(BlockKey("up_blocks.1"))
    old = Partition("chain", (tuple(keys[:at]), tuple(keys[at:])))
    new = reown(old, fine)
    new.validate(fine)
    assert new.stage_of[BlockKey("up_blocks.0")] == 0
    assert new.stage_of[BlockKey("up_blocks.3.attentions.2")] == 1
    assert reown(new, coarse) == old


def test_a_block_without_owner_joins_the_one_before(sd21):
    _, _, recording = sd21
    graph = find_blocks(recording, 2)
    keys = [block.key for block in graph.blocks]
    old = Partition("chain", (tuple(keys[:3]), tuple(keys[5:])))  # two were not called in the old structure
    assert reown(old, graph).stages == (tuple(keys[:5]), tuple(keys[5:]))


def test_what_hangs_together_is_one_candidate():
    """HiDream's experts cannot be separated: values decide which of them are called. What is beside them
    can."""
    module = build(BY_NAME["HiDream"])
    inputs = inputs_of(module, BY_NAME["HiDream"].inputs(1, 16))
    recording = record(load_skeleton(dump_skeleton(module), {}), inputs, device="cpu")
    paths = {key.path for key in call_costs(recording)}
    block = "double_stream_blocks.0.block"
    assert {block, f"{block}.attn1", f"{block}.ff_i", f"{block}.ff_t"} <= paths
    assert not any(path.startswith(f"{block}.ff_i.") for path in paths)
    finest = find_blocks(recording, block_paths=sorted(paths - {block, "double_stream_blocks.0"}))
    assert f"{block}.ff_i" in {item.key.path for item in finest.blocks}
