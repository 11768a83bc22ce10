"""The recording forward: fake tensors where possible, real inputs where values steer, at last weights without
memory, or real ones."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from asyncdiff.errors import UnsupportedDenoiserError
from asyncdiff.trace.inputs import Inputs
from asyncdiff.trace.recording import ModelTensor, Recording
from asyncdiff.trace.strides import with_real_strides
from asyncdiff.trace.tape import Tape
from asyncdiff.trace.torch_private import (
    FakeTensorMode,
    TorchDispatchMode,
    TorchFunctionMode,
    eager_flex_attention,
)
from asyncdiff.weights.quantised import dressed_like, is_dressed, named_parts, parts_of, recomposed

_HOST_READS = {
    torch.Tensor.tolist: "tolist",
    torch.Tensor.numpy: "numpy",
    torch.Tensor.__array__: "__array__",
}


def record(
    module: nn.Module,
    inputs: Inputs,
    *,
    device: torch.device | str,
    live: bool = False,
    modes: Sequence[str] = ("fake", "mixed", "hollow", "real"),
) -> Recording:
    """Runs the denoiser's forward once and records every operation and module call.

    `module` is a skeleton, all parameters and buffers on `meta`, which is consumed: they become fake tensors
    on `device`; or, with `live`, the denoiser in use, which is left as it was. First everything is fake; if
    the forward looks at values, only weights and latents are; if it looks at activations too, everything is
    real with `live`, else everything but the weights, which are hollow: one number each, expanded to their
    shape, so that they take no memory. `modes` says which of these to try.
    `UnsupportedDenoiserError` names the module and what it did if none of this works.
    """
    failures: list[str] = []
    for mode, attempt in _attempts(module, inputs, torch.device(device), live):
        if mode not in modes:
            continue
        tape_of_attempt: list[Tape] = []
        try:
            return attempt(tape_of_attempt)
        except Exception as error:  # whatever a forward raises on tensors without data
            if mode == "real":
                raise
            where = tape_of_attempt[0].innermost_failure if tape_of_attempt else None
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            failures.append(f"{mode}: {type(error).__name__} in {where or 'the denoiser'!r}: {reason}")
    raise UnsupportedDenoiserError(
        f"{type(module).__name__} could not be traced without its weights ({'; '.join(failures)}). "
        "Trace the loaded model instead if its forward looks at the values of weights."
    )


_Attempt = Callable[[list[Tape]], Recording]


def _attempts(
    module: nn.Module, inputs: Inputs, device: torch.device, live: bool
) -> Iterator[tuple[str, _Attempt]]:
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = functools.partial(_fake_like, mode=fake_mode, device=device)
    faked: nn.Module | None = None
    empty: list[_Replaced] = []
    if not any(is_dressed(tensor) for tensor in module.parameters()):  # which fake tensors cannot be
        if live:
            faked = _fake_copy(module, fake)
        else:
            faked, empty = module, _fill_skeleton(module, fake)
    if faked is not None:
        arguments = _fake_inputs(inputs, inputs.names, fake_mode, device)
        yield "fake", functools.partial(_record, faked, inputs, arguments, "fake", fake_mode)
        arguments = _real_inputs(inputs, device) | _fake_inputs(inputs, _latents(inputs), fake_mode, device)
        nothing = contextlib.nullcontext()
        yield "mixed", functools.partial(_record, faked, inputs, arguments, "mixed", nothing)
    arguments = _real_inputs(inputs, device)
    if live:
        yield "real", functools.partial(_record, module, inputs, arguments, "real", contextlib.nullcontext())
    else:
        for held, name, value in empty:
            held[name] = value
        _fill_skeleton(module, functools.partial(_hollow_like, device=device))
        nothing = contextlib.nullcontext()
        yield "hollow", functools.partial(_record, module, inputs, arguments, "hollow", nothing)


def _record(
    module: nn.Module,
    inputs: Inputs,
    arguments: dict[str, torch.Tensor],
    mode: str,
    fake_mode: contextlib.AbstractContextManager[Any],
    tape_out: list[Tape],
) -> Recording:
    tape = Tape(_model_tensors(module))
    tape_out.append(tape)
    for name, tensor in arguments.items():
        tape.note_input(name, tensor)
    kwargs = inputs.rebuild(arguments)
    with _state_restored(module):
        before = {(path, name): id(tensor) for path, name, tensor in _attribute_tensors(module)}
        _wrap_forwards(module, tape)
        with torch.no_grad(), eager_flex_attention(), fake_mode, _Operators(tape), _HostReads(tape):
            module.forward(**kwargs)
        kept = tuple(
            (path, name, value)
            for path, name, tensor in _attribute_tensors(module)
            if before.get((path, name)) != id(tensor) and (value := tape.knows(tensor)) is not None
        )
    return Recording(
        calls=tuple(tape.calls), ops=tuple(tape.ops),
        makers=tuple(tape.makers), storages=tuple(tape.storages), num_elements=tuple(tape.num_elements),
        input_of=tape.input_of, tensor_of=tape.tensor_of, tensors=tuple(tape.tensors),
        inputs=inputs.spec(), latents=_latents(inputs), mode=mode, kept=kept,
    )  # fmt: skip


class _Operators(TorchDispatchMode):
    """Notes every operator that reaches the dispatcher."""

    supports_higher_order_operators = True

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = with_real_strides(func, args, kwargs, func(*args, **kwargs))
        self._tape.note_op(func, args, kwargs, out)
        return out


class _HostReads(TorchFunctionMode):
    """Notes `.tolist()` and `.numpy()`, which the dispatcher never sees."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HOST_READS:
            self._tape.note_host_read(_HOST_READS[func], args[0])
        return func(*args, **(kwargs or {}))


def _wrap_forwards(module: nn.Module, tape: Tape) -> None:
    """Puts a recording `forward` on every module; `_state_restored` takes them off again."""
    elements = {
        f"{path}.{name}".lstrip(".")
        for path, owner in module.named_modules()
        if isinstance(owner, (nn.ModuleList, nn.ModuleDict))
        for name, _ in owner.named_children()
    }
    for path, child in module.named_modules():
        has_parameters = next(child.parameters(), None) is not None
        child.__dict__["forward"] = _recording_forward(
            child.forward, tape, path, in_list=path in elements, has_parameters=has_parameters
        )


def _recording_forward(
    forward: Callable[..., Any], tape: Tape, path: str, *, in_list: bool, has_parameters: bool
) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        index = tape.enter(path, (args, kwargs), in_list=in_list, has_parameters=has_parameters)
        try:
            out = forward(*args, **kwargs)
        except Exception:
            tape.fail(path)
            raise
        tape.leave(index, out)
        return out

    recorded.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return recorded


def _latents(inputs: Inputs) -> tuple[str, ...]:
    """Names of the tensors of the first tensor argument: one, or several where it is a list."""
    argument = inputs.latents.split(".")[0]
    return tuple(name for name in inputs.tensors() if name.split(".")[0] == argument)


def _model_tensors(module: nn.Module) -> list[tuple[torch.Tensor, ModelTensor]]:
    tensors: dict[int, torch.Tensor] = {}
    names: dict[int, list[str]] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                parts = dict(named_parts(f"{path}.{name}".lstrip("."), tensor))
                for part, inner in parts.items():
                    tensors[id(inner)] = inner
                    names.setdefault(id(inner), []).append(part)
                if tensors.setdefault(id(tensor), tensor) is tensor and id(tensor) not in names:
                    names[id(tensor)] = list(parts)  # composed of them
    return [
        (tensor, ModelTensor(tuple(names[key]), 0 if parts_of(tensor) else tensor.nbytes))
        for key, tensor in tensors.items()
    ]


def _attribute_tensors(module: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Tensors held by plain attributes of modules, also one container deep (caches)."""
    for path, owner in module.named_modules():
        for name, held in (*vars(owner).items(), *owner._buffers.items()):
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            items = held.values() if isinstance(held, dict) else held
            for tensor in items if isinstance(held, (dict, list, tuple)) else (held,):
                if isinstance(tensor, torch.Tensor):
                    yield path, name, tensor


@contextlib.contextmanager
def _state_restored(module: nn.Module) -> Iterator[None]:
    """Puts back every attribute of every module, and what plain lists and dicts among them held."""
    modules = list(module.modules())
    attributes = [dict(vars(owner)) for owner in modules]
    contents = [
        (held, copy.copy(held))
        for saved in attributes
        for held in saved.values()
        if type(held) in (dict, list)
    ]
    try:
        yield
    finally:
        for owner, saved in zip(modules, attributes, strict=True):
            vars(owner).clear()
            vars(owner).update(saved)
        for held, saved_content in contents:
            held.clear()
            (held.extend if isinstance(held, list) else held.update)(saved_content)


def _fake_like(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> torch.Tensor:
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    # `matmul` folds or not by what asks for gradients: without it other kernels are chosen than in the real
    # forward.
    return (
        nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    )


def _hollow_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Small, so that activations stay finite; integers are zero, which is an index of anything."""
    number = torch.tensor(0.01 if tensor.is_floating_point() else 0, dtype=tensor.dtype, device=device)
    if is_dressed(tensor):  # one real row, which quantised weights look at as another dtype
        return dressed_like(number.repeat(tensor.shape[-1:]).expand(tensor.shape), tensor)
    hollow = number.expand(tensor.shape)
    return nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow


_Replaced = tuple[dict[str, Any], str, Any]
"""A dictionary, the key at which it was changed, and what was there before."""


def _fill_skeleton(module: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> list[_Replaced]:
    """Replaces every meta tensor of the skeleton by what `make` gives for it; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    originals: list[torch.Tensor] = []  # keeps ids from being used again
    replaced: list[_Replaced] = []

    def fill(held: Any) -> Any:
        if isinstance(held, torch.Tensor) and _is_empty(held):
            originals.append(held)
            if id(held) not in made:
                made[id(held)] = fill_parts(held) if parts_of(held) else make(held)
            return made[id(held)]
        if type(held) in (list, tuple):
            return type(held)(fill(item) for item in held)
        if type(held) is dict:
            return {key: fill(item) for key, item in held.items()}
        return held

    def fill_parts(held: torch.Tensor) -> torch.Tensor:
        return recomposed(held, {name: fill(part) for name, part in parts_of(held).items()})

    def fill_in(held: dict[str, Any], names: Iterable[str]) -> None:
        for name in names:
            replaced.append((held, name, held[name]))
            held[name] = fill(held[name])

    for owner in module.modules():
        fill_in(owner._parameters, owner._parameters)
        fill_in(owner._buffers, owner._buffers)
        others = [name for name in vars(owner) if not name.endswith("_hooks")]
        fill_in(vars(owner), [name for name in others if name not in ("_parameters", "_buffers", "_modules")])
    return replaced


def _is_empty(tensor: torch.Tensor) -> bool:
    return any(part.device.type == "meta" for part in parts_of(tensor).values() or (tensor,))


def _fake_copy(module: nn.Module, fake: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module | None:
    """A copy of the live module with fake weights; None if it cannot be copied without running the original.

    A replaced `forward` (diffusers' and accelerate's hooks) is a closure over the original module, which a
    copy would silently go on running with the original's weights.
    """
    if any("forward" in vars(owner) for owner in module.modules()):
        return None
    held = [tensor for tensor, _ in _model_tensors(module)]
    memo: dict[int, Any] = {id(tensor): fake(tensor) for tensor in held}
    try:
        return copy.deepcopy(module, memo)
    except Exception:  # noqa: BLE001  # locks, handles, non-leaf tensors: anything that does not copy; the real trace remains
        return None


def _fake_inputs(
    inputs: Inputs, names: tuple[str, ...], mode: FakeTensorMode, device: torch.device
) -> dict[str, torch.Tensor]:
    tensors = inputs.tensors()
    latents_device = tensors[inputs.latents].device
    return {
        name: _fake_like(tensor, mode, device if tensor.device == latents_device else tensor.device)
        for name, tensor in tensors.items()
        if name in names
    }


def _real_inputs(inputs: Inputs, device: torch.device) -> dict[str, torch.Tensor]:
    """Copies: a forward that writes into its inputs leaves the caller's alone."""
    tensors = inputs.tensors()
    latents_device = tensors[inputs.latents].device
    return {
        name: tensor.detach().clone().to(device if tensor.device == latents_device else tensor.device)
        for name, tensor in tensors.items()
    }
