"""torch's private API is as the trace expects it."""

from __future__ import annotations

import pickle
import warnings

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from asyncdiff.trace import torch_private
from asyncdiff.trace.torch_private import FakeTensorMode, storage_key, tree_flatten, tree_unflatten

VERSIONS = ("2.13",)  # run with these; a new one is added when this file passes with it


def test_version_is_one_that_was_run():
    installed = ".".join(torch.__version__.split(".")[:2])
    if installed not in VERSIONS:
        warnings.warn(f"asyncdiff.trace was not run with torch {installed}", stacklevel=1)


def test_structures_pickle_without_a_warning():
    tree = {"a": [1, (2, None)], "b": UNet2DConditionOutput(sample=torch.ones(1))}
    leaves, structure = tree_flatten(tree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = pickle.loads(pickle.dumps(structure))
    assert copied == structure
    rebuilt = tree_unflatten(leaves, copied)
    assert rebuilt["a"] == [1, (2, None)]
    assert type(rebuilt["b"]) is UNet2DConditionOutput


def test_views_share_a_storage_key_also_when_fake():
    with FakeTensorMode():
        fake = torch.empty(4)
        assert storage_key(fake) == storage_key(fake[:2])
        assert storage_key(fake) != storage_key(torch.empty(4))


def test_fused_attention_on_the_cpu_has_a_formula():
    query = torch.empty(1, 2, 3, 4)
    func = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert torch_private.flops_of(func, (query, query, query), {}, None) == 4 * 1 * 2 * 3 * 3 * 4
