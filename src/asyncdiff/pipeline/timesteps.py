"""Looking ahead, for strides and the time shift: what the denoiser will be given at later steps of a round.

The timesteps to come are in `scheduler.timesteps`; the denoiser gets a function of them (t, t/1000, one
minus that, cast to bfloat16, ...) that each pipeline computes in its own way, and latents that some noise
schedulers scale by a factor of the step. Both are found out from the objects at hand, without tables keyed by
pipeline.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from asyncdiff.errors import ConfigurationError

Number: TypeAlias = torch.Tensor | float | int

TIMESTEP_NAMES = ("timestep", "timesteps", "timestep_ratio", "t")
"""What forwards of the denoisers of diffusers 0.42 call the timestep: 94 classes `timestep`, HiDream
`timesteps`, Stable Cascade `timestep_ratio`, Z-Image `t`."""

_ROUNDED = 2**-6
"""Relative difference that two roundings to bfloat16 may make, and nothing else does."""

OTHER_STEP_NAMES = (
    "timestep_r", "r_timestep", "target_timestep", "r", "sigma", "sigmas", "noise_level",
    "audio_timestep", "vision_timesteps", "sound_timesteps", "action_timesteps", "timestep_indices",
    "local_latents_time", "bb_ca_time",
)  # fmt: skip
"""Further inputs that change with the step (the timestep a flow map goes to, the one of the sound, ...)."""


def timestep_name(names: Iterable[str]) -> str | None:
    """Which of a denoiser's inputs is the timestep; None where none is (UVit2DModel)."""
    given = set(names)
    return next((name for name in TIMESTEP_NAMES if name in given), None)


def other_step_names(names: Iterable[str]) -> tuple[str, ...]:
    """The inputs besides the timestep that change with the step; given (not None), they forbid stride > 1."""
    return tuple(name for name in names if name in OTHER_STEP_NAMES)


@dataclass(frozen=True)
class _Form:
    """One way to make the argument: cast to `compute_dtype` (None: leave it), then apply `function`."""

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]
    compute_dtype: torch.dtype | None

    def apply(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        value = timestep if self.compute_dtype is None else timestep.to(self.compute_dtype)
        return self.function(value).to(dtype)


def _functions(num_train_timesteps: int, scales: Sequence[float]) -> dict[str, Callable[..., torch.Tensor]]:
    """What pipelines of diffusers 0.42 do to the timestep, commonest first.

    Left out on purpose: functions of sigma (Cosmos 2, Sana-Sprint). Those pipelines also scale the latents by
    factors of their own, which nobody could redo for another step of the round.
    """
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "t": lambda t: t,
        "t / 1000": lambda t: t / 1000,  # FLUX, Qwen-Image, Chroma, AuraFlow, ...
        "1 - t / 1000": lambda t: 1 - t / 1000,  # Lumina, Lumina 2, Ideogram
        "(1000 - t) / 1000": lambda t: (1000 - t) / 1000,  # Z-Image
        "t - 1": lambda t: t - 1,  # GLM-Image
    }
    if num_train_timesteps != 1000:
        functions["t / num_train_timesteps"] = lambda t: t / num_train_timesteps
        functions["1 - t / num_train_timesteps"] = lambda t: 1 - t / num_train_timesteps
    for scale in scales:  # Sana: transformer.config.timestep_scale
        functions[f"{scale} t"] = lambda t, scale=scale: t * scale
    return functions


class TimestepMap:
    """How the denoiser's timestep argument follows from the noise scheduler's timestep, learned from calls.

    Every form that reproduces all observed arguments bitwise is kept: t/1000 in bfloat16 and t/1000 in
    float32 cast to bfloat16 both give 1.0 for t = 1000, and differ later. A timestep for which the remaining
    forms disagree is not known (yet). Division by a constant is a multiplication on CUDA and a division on a
    CPU, so the forms are computed on the device of the noise scheduler's timestep, as the pipeline did.

    `scales`: factors that may be in the game, such as `denoiser.config.timestep_scale`.
    """

    def __init__(self, num_train_timesteps: int = 1000, scales: Sequence[float] = ()) -> None:
        self._functions = _functions(num_train_timesteps, scales)
        self._forms: list[_Form] | None = None
        self._example: tuple[object, object] | None = None

    @property
    def is_refuted(self) -> bool:
        """Whether an argument was observed that no remaining form reproduces."""
        return self._forms is not None and not self._forms

    @property
    def names(self) -> tuple[str, ...]:
        """The forms that reproduce every observed argument; empty before the first one."""
        return tuple(form.name for form in self._forms or ())

    def observe(self, scheduler_timestep: Number, argument: Number) -> None:
        """Note that the denoiser got `argument` (any shape) at `scheduler_timestep` (one element).

        Waits for the device that holds the argument. One whose elements differ (a timestep per token or
        frame) refutes every form.
        """
        timestep, values = _tensor(scheduler_timestep), _tensor(argument)
        if self._forms is None:
            self._forms = self._all_forms(timestep.dtype, values.dtype)
        self._forms = [form for form in self._forms if _is_all(values, form.apply(timestep, values.dtype))]
        if not self._forms and self._example is None:
            self._example = (scheduler_timestep, argument)

    def _all_forms(self, timestep_dtype: torch.dtype, argument_dtype: torch.dtype) -> list[_Form]:
        dtypes: list[torch.dtype | None] = [None]
        for dtype in (argument_dtype, torch.float32):
            if dtype not in (timestep_dtype, *dtypes):
                dtypes.append(dtype)
        # In bfloat16, 1000 - 1 is 1000: no single call would tell t - 1 from t. GLM-Image does not cast.
        names = [name for name in self._functions if name != "t - 1" or argument_dtype == timestep_dtype]
        return [_Form(name, self._functions[name], dtype) for name in names for dtype in dtypes]

    def argument_for(self, scheduler_timestep: Number, like: Number) -> Number | None:
        """The argument at `scheduler_timestep`, of the type, shape, strides, dtype and device of `like`.

        `like` is an argument of the same run. None where it is not known: nothing was observed, or forms
        remain that disagree about this timestep; run further steps in order and observe them. Raises
        ConfigurationError where `is_refuted`.
        """
        likely, is_sure = self.likely_argument_for(scheduler_timestep, like)
        return likely if is_sure else None

    def likely_argument_for(self, scheduler_timestep: Number, like: Number) -> tuple[Number | None, bool]:
        """The same, and whether it is known; where remaining forms disagree by how they round, what most
        pipelines would pass, which cast the timestep to the argument's dtype before anything else."""
        if self.is_refuted:
            raise ConfigurationError(self.refusal())
        timestep, values = _tensor(scheduler_timestep), _tensor(like)
        forms = sorted(self._forms or (), key=lambda form: form.compute_dtype != values.dtype)
        if not forms:
            return None, False
        first, *others = (form.apply(timestep, values.dtype) for form in forms)
        is_sure = all(torch.equal(first, other) for other in others)
        if not all(torch.allclose(first.double(), other.double(), _ROUNDED, 0.0) for other in others):
            return None, False
        if not isinstance(like, torch.Tensor):
            return type(like)(first.item()), is_sure
        # Pipelines pass a number expanded to the batch, without memory for more than one.
        span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        filled = torch.empty(span, dtype=like.dtype, device=like.device).copy_(first.reshape(()).expand(span))
        return filled.as_strided(like.shape, like.stride()), is_sure

    def refusal(self) -> str:
        """Why stride > 1 and look-ahead are refused: for a ConfigurationError."""
        timestep, argument = self._example or (None, None)
        return (
            f"stride > 1 needs the denoiser's timestep argument of later steps, but how this pipeline "
            f"computes it is not known: at the noise scheduler's timestep {_shown(timestep)} it passed "
            f"{_shown(argument)}, which is none of {', '.join(self._functions)}. Use stride=1."
        )


class TimestepMemory:
    """What the runs of one noise scheduler have taught about the timestep argument.

    Kept from run to run: an argument that fits several forms (0 is 0 in all of them) costs a step in order
    the first time only. A pipeline that computes it in another way than the last one did starts over.
    """

    def __init__(self, num_train_timesteps: int = 1000, scales: Sequence[float] = ()) -> None:
        self._settings = (num_train_timesteps, scales)
        self._is_of_this_run = False
        self.map = TimestepMap(*self._settings)

    def begin_run(self) -> None:
        """What was learned so far is of earlier runs."""
        self._is_of_this_run = False

    def observe(self, scheduler_timestep: Number, argument: Number) -> None:
        """Note a call; `ConfigurationError` where its argument is no known function of the timestep."""
        self.map.observe(scheduler_timestep, argument)
        if self.map.is_refuted and not self._is_of_this_run:
            self.map = TimestepMap(*self._settings)
            self.map.observe(scheduler_timestep, argument)
        self._is_of_this_run = True
        if self.map.is_refuted:
            raise ConfigurationError(self.map.refusal())


def input_scale(scheduler: Any, index: int) -> float | None:
    """The factor by which `scheduler.scale_model_input` multiplies latents at `timesteps[index]`.

    1.0 for noise schedulers that do not scale; c_in(sigma) = 1/sqrt(sigma^2 + 1) for Euler and relatives.
    None where there is no such position. `scheduler` itself is not changed.

    An evaluation conditioned on step q of a round that begins at b is given the latents of b times
    input_scale(q) / input_scale(b).
    """
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not 0 <= index < len(timesteps):
        return None
    # Sigmas are on the CPU (diffusers puts them there); a table of factors would be where the timesteps are.
    device = "cpu" if hasattr(scheduler, "sigmas") else torch.as_tensor(timesteps).device
    ones = torch.ones(1, dtype=torch.float64, device=device)
    return float(_at(scheduler, index).scale_model_input(ones, timesteps[index]))


def scaled_part(model_input: torch.Tensor, scaled: Iterable[torch.Tensor]) -> tuple[int, int] | None:
    """The (dim, length) of the latents in the denoiser's input: its first `length` entries along `dim`.

    `scaled`: what the noise scheduler's `scale_model_input` has returned at this step. Pipelines concatenate
    masks and pictures to it, as channels, in dim 1 or (Stable Video Diffusion) 2. None where the input does
    not begin with any of it, so that nobody could tell what a factor would multiply.
    """
    for latents in scaled:
        if latents is model_input:
            return 0, model_input.shape[0]
        if latents.ndim != model_input.ndim:
            continue
        sizes = enumerate(zip(latents.shape, model_input.shape, strict=True))
        differing = [(dim, length) for dim, (length, whole) in sizes if length != whole]
        dim, length = differing[0] if differing else (0, model_input.shape[0])
        # Several halves made of one (dim 0) would have latents further on as well.
        if len(differing) > 1 or length > model_input.shape[dim] or (differing and dim == 0):
            continue
        if torch.equal(model_input.narrow(dim, 0, length), latents.to(model_input)):
            return dim, length
    return None


def _at(scheduler: Any, index: int) -> Any:
    """A shallow copy of the noise scheduler that stands at `index`.

    Shallow is enough, because `scale_model_input` only sets attributes, and needed, because multi-step
    solvers hold predictions of several steps, which a deep copy would copy.
    """
    at_index = copy.copy(scheduler)
    if not hasattr(at_index, "_step_index"):
        return at_index
    at_index._step_index = index
    # Second-order noise schedulers list every timestep but the first twice, so odd positions are the
    # evaluations between two steps. KDPM2 and DPMSolverSDE use another sigma there, and know it by having
    # kept a sample.
    is_between = getattr(scheduler, "order", 1) == 2 and index % 2 == 1
    if hasattr(scheduler, "mid_point_sigma") and is_between:
        at_index.mid_point_sigma = _midpoint(scheduler.sigmas[index - 1], scheduler.sigmas[index])
    if hasattr(scheduler, "sigmas_interpol") or hasattr(scheduler, "mid_point_sigma"):
        at_index.sample = torch.ones(1) if is_between else None
    return at_index


def _midpoint(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    """The geometric mean, rounded as DPMSolverSDEScheduler.step does, which keeps no table of them."""
    t, t_next = sigma.log().neg(), sigma_next.log().neg()
    return (t + (t_next - t) * 0.5).neg().exp()


def _tensor(value: Number) -> torch.Tensor:
    """A number as a tensor without loss: Python floats are double."""
    return torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def _is_all(values: torch.Tensor, expected: torch.Tensor) -> bool:
    return values.numel() > 0 and bool((values == expected.to(values.device).reshape(())).all())


def _shown(value: object) -> str:
    if isinstance(value, torch.Tensor):
        distinct = torch.unique(value.detach().float().cpu())
        return f"{[round(v, 6) for v in distinct[:4].tolist()]} ({value.dtype}, shape {tuple(value.shape)})"
    return str(value)
