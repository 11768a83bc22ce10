"""A split denoiser equals the unsplit one bitwise: real classes, NaN placeholders, weights of its own stage
only."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from denoisers import BY_NAME, CASES, Case, build, controlnet_inputs, unet_inputs, unet_small
from splitting import Split, assert_bitwise, cut, inputs_of, specs_of, whole

from asyncdiff.graph import BlockKey, Partition, crossing_atoms
from asyncdiff.stage import stage_spec
from asyncdiff.stage.spec import Own
from asyncdiff.trace import find_blocks, flatten_inputs, record, reown
from asyncdiff.weights import dump_skeleton, load_skeleton

SPLITS = (("chain", 2), ("chain", 3), ("nested", 2), ("nested", 3))


def recorded(module, kwargs):
    """Traced as a run would: without weights."""
    return record(load_skeleton(dump_skeleton(module), {}), inputs_of(module, kwargs), device="cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_split_is_bitwise_the_unsplit_denoiser(case):
    module = build(case)
    kwargs = case.inputs(2, 16)
    expected = whole(module, kwargs)
    recording = recorded(module, kwargs)
    assert recording.mode == case.mode
    for kind, num_stages in SPLITS:
        graph = find_blocks(recording, num_stages, kind=kind)
        # With three stages all leaves are waited for as late as can be.
        split = Split(module, recording, graph, cut(graph, kind, num_stages), fresh=num_stages == 3)
        assert_bitwise(split.run(inputs_of(module, kwargs)), expected)
    # Once more on the last one: a run leaves nothing behind, not even in the caller's containers.
    assert_bitwise(split.run(inputs_of(module, kwargs)), expected)


@pytest.mark.parametrize("name", ["SD2.1", "SD3", "HunyuanDiT"])
def test_four_stages_of_the_finest_blocks_are_bitwise_the_unsplit_denoiser(name):
    case = BY_NAME[name]
    module = build(case)
    kwargs = case.inputs(1, 16)
    recording = recorded(module, kwargs)
    coarse = find_blocks(recording, 4)
    finest = find_blocks(recording, block_paths=leaves(recording))
    assert len(finest.blocks) > len(coarse.blocks)
    for kind, fresh in itertools.product(("chain", "nested"), (False, True)):
        split = Split(module, recording, finest, cut(finest, kind, 4), fresh=fresh)
        assert_bitwise(split.run(inputs_of(module, kwargs)), whole(module, kwargs))


def test_skips_of_a_unet_are_waited_for_when_they_are_wanted():
    """Stage 1 of 2 runs most of its blocks before it wants what stage 0 made first."""
    case = BY_NAME["SD2.1"]
    module = build(case)
    recording = recorded(module, case.inputs(2, 16))
    graph = find_blocks(recording, 2)
    partition = cut(graph, "chain", 2)
    spec = specs_of(recording, graph, partition, fresh=True)[1]
    filled = [
        (path, str(fill.atom))
        for path, actions in spec.actions
        for action in actions
        if isinstance(action, Own)
        for fill in action.fills
    ]
    assert filled == [
        ("up_blocks.1.attentions.0", "down_blocks.0[0]"),
        ("up_blocks.1.upsamplers.0", "conv_in[0]"),
        ("up_blocks.1.upsamplers.0", "down_blocks.0[1]"),
    ]
    for block in graph.blocks:
        for atom, ended in zip(block.reads, block.glue_uses, strict=True):
            assert ended is None or graph.index[atom.block] < ended <= graph.index[block.key]


def leaves(recording):
    """The candidate calls that contain no other."""
    from asyncdiff.trace import call_costs

    costs = call_costs(recording)
    parents = {cost.parent for cost in costs.values()}
    return [key.path for key in costs if key not in parents]


@pytest.mark.parametrize("name", ["SD2.1", "SD3", "HunyuanDiT", "SD1.5+T2I-Adapter"])
def test_every_crossing_leaf_matters(name):
    case = BY_NAME[name]
    module = build(case)
    kwargs = case.inputs(2, 16)
    inputs = inputs_of(module, kwargs)
    expected = whole(module, kwargs)
    recording = recorded(module, kwargs)
    graph = find_blocks(recording, 3)
    partition = cut(graph, "chain", 3)
    split = Split(module, recording, graph, partition)
    atoms = {atom for atoms in crossing_atoms(graph, partition.segments(graph)).values() for atom in atoms}
    assert atoms
    for atom in sorted(atoms):
        assert not torch.equal(split.run(inputs, poison=atom)[0], expected[0]), atom


@pytest.mark.parametrize(
    ("name", "kind"),
    [("SD2.1", "chain"), ("SD2.1", "nested"), ("SDXL", "chain"), ("SD3", "nested"), ("Flux", "chain")],
)
def test_another_shape_runs_on_the_same_replicas(name, kind):
    case = BY_NAME[name]
    module = build(case)
    first, second = case.inputs(2, 16), case.inputs(1, 32)
    recording = recorded(module, first)
    graph = find_blocks(recording, 2, kind=kind)
    partition = cut(graph, kind, 2)
    split = Split(module, recording, graph, partition)
    again = prepare_again(split, module, graph, partition, second)
    for key, kwargs in (("key", first), (again, second), ("key", first)):
        assert_bitwise(split.run(inputs_of(module, kwargs), key), whole(module, kwargs))


def prepare_again(split, module, graph, partition, kwargs):
    """Another structure of inputs with the same ownership: no weight may have to move."""
    recording = recorded(module, kwargs)
    other = find_blocks(recording, block_paths=[block.key.path for block in graph.blocks])
    specs = specs_of(recording, other, reown(partition, other))
    for held, spec in zip(split.specs["key"], specs, strict=True):
        assert spec.used_tensors <= held.tensors
    split.prepare("again", specs)
    return "again"


@pytest.mark.parametrize("controlnet_first", [False, True])
def test_controlnet_comes_and_goes_on_the_same_replicas(controlnet_first):
    module = build(Case("", unet_small, unet_inputs))
    plain, controlled = unet_inputs(2, 16), controlnet_inputs(2, 16)
    first, second = (controlled, plain) if controlnet_first else (plain, controlled)
    recording = recorded(module, first)
    graph = find_blocks(recording, 3)
    partition = cut(graph, "chain", 3)
    split = Split(module, recording, graph, partition)
    again = prepare_again(split, module, graph, partition, second)
    for key, kwargs in (("key", first), (again, second), ("key", first)):
        assert_bitwise(split.run(inputs_of(module, kwargs), key), whole(module, kwargs))


def test_skip_layers_of_sd3_run_on_the_same_replicas():
    case = BY_NAME["SD3"]
    module = build(case)
    first = case.inputs(2, 16)
    second = first | {"skip_layers": [1, 2]}
    recording = recorded(module, first)
    graph = find_blocks(recording, 2)
    partition = cut(graph, "chain", 2)
    split = Split(module, recording, graph, partition)
    again = prepare_again(split, module, graph, partition, second)
    for key, kwargs in ((again, second), ("key", first)):
        assert_bitwise(split.run(inputs_of(module, kwargs), key), whole(module, kwargs))


def test_a_stage_whose_layers_are_all_skipped_idles():
    """Skip-layer guidance leaves out layers 2 and 3, which are all that the middle stage has."""
    case = BY_NAME["SD3"]
    module = build(case)
    first = case.inputs(2, 16)
    skipping = first | {"skip_layers": [2, 3]}
    recording = recorded(module, first)
    layers = [f"transformer_blocks.{i}" for i in range(6)]
    graph = find_blocks(recording, block_paths=layers)
    keys = [block.key for block in graph.blocks]
    at = keys.index(BlockKey("transformer_blocks.2"))
    partition = Partition("chain", (tuple(keys[:at]), tuple(keys[at : at + 2]), tuple(keys[at + 2 :])))
    again = recorded(module, skipping)
    other = find_blocks(again, block_paths=layers)
    specs = specs_of(again, other, reown(partition, other))
    assert (specs[1].reads, specs[1].emits) == ({1: ()}, ())
    assert crossing_atoms(other, reown(partition, other).segments(other)).keys() == {(0, 2)}


def test_latents_go_only_to_the_stages_that_read_them():
    case = BY_NAME["SD2.1"]
    module = build(case)
    recording = recorded(module, case.inputs(2, 16))
    graph = find_blocks(recording, 2)
    first, last = (stage_spec(recording, graph, cut(graph, "chain", 2), stage) for stage in range(2))
    assert first.needed_inputs == ("sample", "timestep", "encoder_hidden_states")
    assert last.needed_inputs == ("timestep", "encoder_hidden_states")


def test_stages_share_out_the_weights():
    case = BY_NAME["SD3"]
    module = build(case)
    recording = recorded(module, case.inputs(2, 16))
    graph = find_blocks(recording, 3)
    specs = specs_of(recording, graph, cut(graph, "chain", 3))
    everything = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    assert set().union(*(spec.tensors for spec in specs)) == everything
    blocks = {name for name in everything if name.startswith("transformer_blocks.")}
    for name in blocks:
        assert sum(name in spec.tensors for spec in specs) == 1, name


def test_spec_is_small():
    case = BY_NAME["SD1.5"]
    module = build(case)
    recording = recorded(module, case.inputs(2, 16))
    graph = find_blocks(recording, 3)
    for spec in specs_of(recording, graph, cut(graph, "chain", 3)):
        assert len(pickle.dumps(spec)) < 100_000


def test_output_is_rebuilt_as_the_denoiser_returns_it():
    case = BY_NAME["SD2.1"]
    module = build(case)
    kwargs = case.inputs(1, 16) | {"return_dict": True}
    recording = recorded(module, kwargs)
    graph = find_blocks(recording, 2)
    split = Split(module, recording, graph, cut(graph, "chain", 2))
    output = split.specs["key"][0].output.rebuild(split.run(inputs_of(module, kwargs)))
    with torch.no_grad():
        expected = module(**kwargs)
    assert type(output) is type(expected)
    assert torch.equal(output.sample, expected.sample)


def test_a_float_changes_without_a_new_analysis():
    case = BY_NAME["SD2.1"]
    module = build(case)
    kwargs = case.inputs(1, 16) | {"timestep": 400.0}
    other = kwargs | {"timestep": 17.5}
    recording = recorded(module, kwargs)
    graph = find_blocks(recording, 2)
    split = Split(module, recording, graph, cut(graph, "chain", 2))
    assert inputs_of(module, kwargs).key() == inputs_of(module, other).key()
    assert_bitwise(split.run(inputs_of(module, other)), whole(module, other))


def test_positional_arguments_get_their_names():
    case = BY_NAME["SD2.1"]
    module = build(case)
    kwargs = case.inputs(1, 16)
    positional = flatten_inputs(module.forward, (kwargs.pop("sample"), kwargs.pop("timestep")), kwargs)
    assert positional.names == ("sample", "timestep", "encoder_hidden_states", "return_dict")
