"""A pipeline from its configs alone: every network is there, with fake tensors for weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from asyncdiff.pipeline.denoiser import denoisers_of
from asyncdiff.trace.torch_private import FakeTensorMode


def load_without_weights(model: str, dtype: torch.dtype) -> Any:
    """The pipeline of a folder or hub id; of the hub only configs, tokenizers and the like are fetched.

    A call of it goes through tokenizers and noise scheduler as always, what the networks return has shapes
    and no values. Raises whatever loading raises: a network that diffusers and transformers do not build from
    a config (a quantised one, GGUF) needs its files.
    """
    import diffusers

    index = diffusers.DiffusionPipeline.load_config(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    networks: dict[str, nn.Module] = {}
    for name, entry in index.items():
        if not isinstance(entry, list | tuple) or len(entry) != 2 or entry[0] is None:
            continue
        kind = _class_of(*entry)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            networks[name] = _fake_weights(_from_config(kind, model, name, dtype), mode)
    pipe = diffusers.DiffusionPipeline.from_pretrained(model, **networks)
    for network in networks.values():
        if network not in denoisers_of(pipe).values():
            vars(network)["to"] = _converting(network, mode)
    return pipe


def _class_of(library: str, name: str) -> Any:
    """The class that an entry of `model_index.json` means; the library may be a folder of diffusers.

    Nothing is imported because a file says so: a module of the user's own must have been imported before, as
    diffusers wants it too.
    """
    import diffusers
    import transformers

    own = {"diffusers": diffusers, "transformers": transformers}
    return getattr(
        own.get(library) or getattr(diffusers.pipelines, library, sys.modules.get(library)), name, None
    )


def _from_config(kind: Any, model: str, subfolder: str, dtype: torch.dtype) -> nn.Module:
    with without_weights(dtype):
        if hasattr(kind, "load_config"):  # diffusers
            network: nn.Module = kind.from_config(kind.load_config(model, subfolder=subfolder))
        else:  # transformers
            network = kind(kind.config_class.from_pretrained(model, subfolder=subfolder))
    return network.eval()


@contextmanager
def without_weights(dtype: torch.dtype) -> Iterator[None]:
    """Networks made here have parameters of `dtype` on the meta device.

    Buffers are computed as always: what they hold may decide what a forward does.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def _fake_weights(network: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """On the CPU, where the pipeline takes itself to be; the same object where it was tied."""
    fakes: dict[nn.Parameter, nn.Parameter] = {}  # tensors hash by identity
    for owner in network.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                with mode:
                    fake = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
                owner._parameters[name] = fakes.setdefault(
                    parameter, nn.Parameter(fake, parameter.requires_grad)
                )
    return network


def _converting(network: nn.Module, mode: FakeTensorMode) -> Callable[..., nn.Module]:
    """In the place of `network.to` (pipelines upcast an autoencoder): torch refuses it to fake parameters."""

    def to(*args: Any, **kwargs: Any) -> nn.Module:
        _, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        return _fake_weights(network, mode, dtype)

    return to
