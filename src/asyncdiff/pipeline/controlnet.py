"""A ControlNet on a device of its own (docs/controlnet.md).

It is called before the denoiser at every step, and most of the denoiser does not need what it returns. So the
call returns at once, with tensors that whoever needs their elements waits for; and where that is asked for,
the device goes on with the next step's, on latents that the driver continues.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline.analysis import Analysis
from asyncdiff.pipeline.denoiser import takes_step
from asyncdiff.pipeline.installation import Installation, Piece
from asyncdiff.pipeline.next_round import at_step
from asyncdiff.pipeline.run_state import Conditions, timestep_argument
from asyncdiff.pipeline.runs import PlacedCall
from asyncdiff.pipeline.timesteps import timestep_name
from asyncdiff.runtime.awaited import Delivery
from asyncdiff.runtime.lookahead import version_of
from asyncdiff.trace import Inputs
from asyncdiff.tracking import Channel

NAME = "controlnet"
# Wrong guesses of a run, each of which makes a step of the ControlNet be computed twice.
_MOST_WRONG_GUESSES = 3


def controlnet_of(pipe: Any, denoisers: Sequence[nn.Module]) -> nn.Module:
    """The pipeline's ControlNet, or the module that holds all of them; `ConfigurationError` where there is
    none that can be apart from the denoisers."""
    module = getattr(pipe, NAME, None)
    if not isinstance(module, nn.Module) or not takes_step(module):
        raise ConfigurationError(
            f"{type(pipe).__name__} has no ControlNet that is called beside the denoiser. Use "
            'controlnet="serial".'
        )
    theirs = {id(tensor) for denoiser in denoisers for tensor in denoiser.parameters()}
    if any(id(tensor) in theirs for tensor in module.parameters()):
        raise ConfigurationError(
            f"{type(module).__name__} shares weights with the denoiser, so it cannot have a device of its "
            'own. Use controlnet="serial".'
        )
    return module


@dataclass(frozen=True)
class _Guess:
    """What a step has been computed with before its call. `continued`: the names of those inputs that are
    expected to differ from the call's; `versions`: of the tensors."""

    step: int
    analysis: Analysis
    inputs: Inputs
    continued: frozenset[str]
    versions: dict[str, int]

    def came_true(self, step: int, piece: Piece) -> bool:
        """Whether the call is the one that was guessed, but for what is continued. Tensors that the pipeline
        makes anew are compared, for which a device is waited for."""
        if step != self.step or piece.state.analysis is not self.analysis:
            return False
        called = piece.inputs
        return all(
            name in self.continued or self._is_same(name, expected, leaf)
            for name, expected, leaf in zip(called.names, self.inputs.leaves, called.leaves, strict=True)
        )

    def _is_same(self, name: str, expected: Any, leaf: Any) -> bool:
        if not isinstance(expected, torch.Tensor):
            return bool(expected == leaf)
        if version_of(expected) != self.versions[name]:
            return False
        return leaf is expected or (leaf.dtype == expected.dtype and torch.equal(leaf, expected))


class ControlNetInstallation(Installation):
    """A ControlNet on a device of its own; its calls are placed, analysed and shipped as a denoiser's are.

    `works_ahead`: the device computes every step after warm-up before its call.
    """

    def __init__(self, *args: Any, works_ahead: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._works_ahead = works_ahead
        self._delivery: Delivery | None = None
        self._guesses: dict[tuple[int, Channel], _Guess] = {}
        self._wrong_guesses: Counter[int] = Counter()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:
            self._finish()  # the run of what the last call returned may be over
            return super().call(args, kwargs)

    def _bring_home(self) -> None:
        self._finish()
        super()._bring_home()

    def _finish(self) -> None:
        """Whoever still has what the last call returned gets it, or is told when they look at it."""
        delivery, self._delivery = self._delivery, None
        if delivery is not None:
            delivery.end()

    def _predict(self, call: PlacedCall, whole: Inputs, pieces: Sequence[Piece]) -> list[list[torch.Tensor]]:
        (piece,) = pieces
        key, step = (call.run, call.position.channel), call.position.step
        piece.state.note_inputs(call, piece.inputs)
        guess = self._guesses.pop(key, None)
        if guess is None or not guess.came_true(step, piece):
            self._wrong_guesses[call.run] += guess is not None
            self.groups.run_rounds(call.run, {piece.group: [self._round(call, whole, piece)]})
        if self._works_ahead and call.position.placed:
            self._work_ahead(call, piece)

        def wait() -> list[torch.Tensor]:
            return self.groups.predictions(call.run, [(piece.group, piece.channel)], step)[0]

        self._delivery = Delivery(wait, self._lock)
        return [self._delivery.tensors(piece.state.analysis.output.tensors, self.device)]

    def _work_ahead(self, call: PlacedCall, piece: Piece) -> None:
        """Begin with the next step, on the inputs as they will probably be."""
        state, step = piece.state, call.position.step + 1
        state.observe(call, piece.inputs)
        first = state.schedule.first_step + state.settings.warmup_steps + 1
        if not first <= step < state.schedule.num_steps:
            return
        if self._wrong_guesses[call.run] >= _MOST_WRONG_GUESSES:
            self._warn(
                "guesses",
                "the ControlNet's inputs change in ways that cannot be foreseen"
                f" ({_MOST_WRONG_GUESSES} times in this run), so it does not work ahead any more.",
            )
            return
        timestep = self._timestep(call, piece, step)
        if timestep is None:
            return
        continued = state.course.continued(state.place(step))
        name = timestep_name(piece.inputs.names)
        assert name is not None
        inputs = _replaced(piece.inputs, {**continued, name: timestep})
        later = at_step(call, step)
        round_ = self._round(later, inputs, replace(piece, inputs=inputs))
        self.groups.run_rounds(call.run, {piece.group: [round_]})
        known = continued.keys() | ({name} if state.is_sure else set())
        versions = {each: version_of(tensor) for each, tensor in inputs.tensors().items()}
        self._guesses[call.run, call.position.channel] = _Guess(
            step, state.analysis, inputs, frozenset(known), versions
        )

    def _timestep(self, call: PlacedCall, piece: Piece, step: int) -> Any:
        """The argument of a step to come; None where it is not known yet, or will never be."""
        state = piece.state
        if not state.is_sure:
            conditions = Conditions(state.settings, call, piece.inputs, piece.inputs)
            if timestep_argument(piece.inputs) is None or not conditions.can_foresee():
                self._warn(
                    "timesteps",
                    "the ControlNet's timesteps cannot be foreseen, so it does not work ahead: what it "
                    'returns is exact, as with controlnet="overlap".',
                )
                return None
            state.foreseen, state.is_sure = conditions.foreseen(state.schedule.num_steps)
        return state.foreseen.get(step)

    def _end_runs(self, ended: tuple[int, ...]) -> None:
        super()._end_runs(ended)
        self._guesses = {key: guess for key, guess in self._guesses.items() if key[0] not in ended}
        for run in ended:
            self._wrong_guesses.pop(run, None)


def _replaced(inputs: Inputs, leaves: dict[str, Any]) -> Inputs:
    values = zip(inputs.names, inputs.leaves, strict=True)
    return replace(inputs, leaves=tuple(leaves.get(name, leaf) for name, leaf in values))
