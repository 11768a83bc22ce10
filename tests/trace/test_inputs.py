"""One call's inputs: named, keyed, and rebuilt from the part that is needed."""

from __future__ import annotations

import pickle

import pytest
import torch

from asyncdiff.errors import UnsupportedDenoiserError
from asyncdiff.trace import flatten_inputs


def forward(self, sample, timestep, states=None, flag: bool = True, **extra):
    raise NotImplementedError


def nested():
    return {
        "states": [torch.ones(2), {"a": (torch.zeros(3), None)}],
        "scale": 0.5,
        "added": {"ids": torch.arange(3), "word": "x"},
    }


def flatten(*args, **kwargs):
    return flatten_inputs(forward, args, kwargs)


def test_everything_has_a_dotted_name():
    inputs = flatten(torch.ones(1, 2), torch.tensor(3), **nested())
    assert inputs.names == (
        "sample",
        "timestep",
        "states.0",
        "states.1.a.0",
        "states.1.a.1",
        "scale",
        "added.ids",
        "added.word",
    )
    assert inputs.latents == "sample"
    assert list(inputs.tensors()) == ["sample", "timestep", "states.0", "states.1.a.0", "added.ids"]
    assert inputs.floats() == {"scale": 0.5}


def test_a_list_of_latents_is_named_by_position():
    assert flatten([torch.ones(1), torch.ones(1)], 3).latents == "sample.0"


def test_the_first_tensor_is_the_latents_whatever_comes_before():
    assert flatten(None, torch.ones(1)).latents == "timestep"


def test_positional_and_keyword_calls_are_equal():
    sample, timestep = torch.ones(1, 2), torch.tensor(3)
    assert flatten(sample, timestep).key() == flatten(timestep=timestep, sample=sample).key()


def test_bound_forward_and_class_function_bind_alike():
    class Module:
        forward = forward

    bound = flatten_inputs(Module().forward, (torch.ones(1), 3), {})
    assert bound.names == flatten_inputs(Module.forward, (torch.ones(1), 3), {}).names


def test_a_call_that_does_not_fit_the_signature_is_a_type_error():
    with pytest.raises(TypeError):
        flatten(torch.ones(1))


def test_star_arguments_are_refused():
    with pytest.raises(UnsupportedDenoiserError, match="by position only"):
        flatten_inputs(lambda sample, *rest: None, (torch.ones(1), torch.ones(1)), {})


SAMPLE = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"sample": SAMPLE}, {"sample": SAMPLE + 1}),
        ({"scale": 0.5}, {"scale": 0.7}),
        ({"timestep": 999}, {"timestep": 1}),
    ],
)
def test_values_that_may_change_are_not_in_the_key(one, other):
    usual = {"sample": SAMPLE, "timestep": torch.tensor(1)}
    assert flatten(**(usual | one)).key() == flatten(**(usual | other)).key()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"sample": SAMPLE}, {"sample": torch.zeros(1, 3)}),
        ({"sample": SAMPLE}, {"sample": SAMPLE.half()}),
        ({"sample": SAMPLE}, {"sample": torch.zeros(3, 2).T}),
        ({"states": [SAMPLE]}, {"states": (SAMPLE,)}),
        ({"states": [SAMPLE]}, {"states": [SAMPLE, SAMPLE]}),
        ({"states": None}, {}),
        ({"flag": True}, {"flag": False}),
        ({"count": 1}, {"count": 2}),
        ({"count": 1}, {"count": 1.0}),
        ({"word": "a"}, {"word": "b"}),
        ({"timestep": torch.tensor(1)}, {"timestep": 1.0}),
    ],
)
def test_what_changes_the_forward_is_in_the_key(one, other):
    usual = {"sample": SAMPLE, "timestep": torch.tensor(1)}
    assert flatten(**(usual | one)).key() != flatten(**(usual | other)).key()


def test_the_key_is_hashable_with_unhashable_constants():
    assert hash(flatten(SAMPLE, 1, odd={1, 2}).key()) == hash(flatten(SAMPLE, 1, odd={1, 2}).key())


def test_containers_are_not_shared_with_the_caller():
    states = [torch.ones(2), torch.ones(2)]
    flatten(SAMPLE, 1, states=states).rebuild()["states"].pop()
    assert len(states) == 2


def test_another_process_rebuilds_the_call_from_what_is_needed():
    inputs = flatten(torch.ones(4, 2).T, torch.tensor(3), **nested())
    spec = pickle.loads(pickle.dumps(inputs.spec()))
    ids = torch.tensor([7, 8, 9])
    kwargs = spec.rebuild({"added.ids": ids}, {"scale": 0.25}, "cpu")
    assert kwargs["added"]["ids"] is ids
    assert kwargs["added"]["word"] == "x"
    assert kwargs["scale"] == 0.25
    assert kwargs["states"][1]["a"][1] is None
    sample = kwargs["sample"]
    assert (sample.shape, sample.stride(), sample.dtype) == ((2, 4), (1, 2), torch.float32)


def test_numbers_that_are_not_given_keep_the_recorded_value():
    assert flatten(SAMPLE, 3, scale=0.5).spec().rebuild({}, {}, "cpu")["scale"] == 0.5


def test_a_placeholder_for_an_expanded_tensor_keeps_its_strides():
    spec = flatten(torch.zeros(1, 3).expand(4, 3), 1).spec()
    assert spec.rebuild({}, {}, "cpu")["sample"].stride() == (0, 1)
