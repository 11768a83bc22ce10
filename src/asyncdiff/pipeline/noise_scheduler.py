"""Listening to a noise scheduler: reversible wrappers around `set_timesteps` and `step` of one instance.

The wrappers are instance attributes that shadow the class's methods; no class is patched. `copy.copy`,
`copy.deepcopy` and `pickle` go through an instance-level `__getstate__` that leaves the wrappers out, so a
copy is a noise scheduler that nobody listens to (LTX-2 copies its own for the sound and steps the copy). That
the interpreter asks the instance for `__getstate__` is tested (CPython 3.11).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from asyncdiff.tracking import Extent, Tracker

_run_numbers = itertools.count()

_STEP_METHODS = ("step", "step_pred")
"""What advances a noise scheduler: `step`, or in predictor-corrector ones (ScoreSdeVe) `step_pred`."""

_SCALE_METHOD = "scale_model_input"

_KEPT_SCALED = 8
"""How many results of it are kept: of a step's denoiser calls and, before those, of its ControlNets'. A loop
that never steps this noise scheduler must not keep them all."""


def watch(scheduler: Any, tracker: Tracker, *, run_is_open: bool = False) -> None:
    """Report the runs and steps of `scheduler` to `tracker`; watching twice is watching once.

    `run_is_open`: the noise scheduler turned up at a denoiser call, so its timesteps are those of a run that
    has begun, and `tracker` is told so. Any number of trackers may watch one noise scheduler. `scheduler`
    is any object with the methods of diffusers' SchedulerMixin.
    """
    watching = _watching(scheduler)
    if watching is None:
        watching = _Watching(scheduler)
        watching.install()
    if tracker not in watching.trackers:
        watching.trackers.append(tracker)
        if run_is_open:
            watching.open_run(tracker)


def unwatch(scheduler: Any, tracker: Tracker) -> None:
    """Report no more to `tracker`; without trackers, `scheduler` is as it was. No error where nobody watches.

    The tracker forgets the run that this noise scheduler opened.
    """
    watching = _watching(scheduler)
    if watching is None or tracker not in watching.trackers:
        return
    watching.trackers.remove(tracker)
    tracker.close_run(source=id(scheduler))
    if not watching.trackers:
        watching.uninstall()


def is_watched(scheduler: Any, tracker: Tracker | None = None) -> bool:
    """Whether `tracker` (None: any) listens to `scheduler`."""
    watching = _watching(scheduler)
    return watching is not None and (tracker is None or tracker in watching.trackers)


def scaled_inputs_of(scheduler: Any) -> tuple[torch.Tensor, ...]:
    """What `scale_model_input` of a watched noise scheduler has returned since its last step."""
    watching = _watching(scheduler)
    return () if watching is None else tuple(watching.scaled)


def new_run_number() -> int:
    """A number that no other run of this process has."""
    return next(_run_numbers)


def run_number_of(scheduler: Any) -> int:
    """The number of the run that a watched noise scheduler opened last: the same for all who watch it."""
    watching = _watching(scheduler)
    assert watching is not None
    return watching.run


def new_tracker() -> Tracker:
    """A tracker that compares the timesteps of noise schedulers as `same_timestep` does."""
    return Tracker(same_timestep=same_timestep)


def timesteps_of(scheduler: Any) -> torch.Tensor | None:
    """The timesteps of the denoiser calls to come, in order, one per `step`; None where there are none."""
    timesteps = getattr(scheduler, "timesteps", None)
    return None if timesteps is None else torch.as_tensor(timesteps)


def num_timesteps_of(scheduler: Any) -> int | None:
    """len(scheduler.timesteps): steps of a full run; second-order ones (Heun) list every evaluation."""
    timesteps = getattr(scheduler, "timesteps", None)
    return None if timesteps is None else len(timesteps)


def begin_index_of(scheduler: Any, argument: object = None, step: int = 0) -> int:
    """Where in `scheduler.timesteps` the run begins.

    The begin index that the pipeline has set; else, for noise schedulers that have none (DDIM, PNDM), the
    place of the denoiser's timestep `argument` (a tensor or number) less the `step`s already closed; else 0.
    A view of the timesteps tells its place also where the value repeats (PNDM's slices).
    """
    begin_index = getattr(scheduler, "begin_index", None)
    if begin_index is not None:
        return int(begin_index)
    timesteps = timesteps_of(scheduler)
    match = _place_in_memory(timesteps, argument)
    if match is None:
        match = first_match(timesteps, argument)
    return 0 if match is None else max(match - step, 0)


def first_match(timesteps: torch.Tensor | None, argument: object) -> int | None:
    """The first index at which `timesteps` has the value of `argument`; None where that is unclear.

    Waits for the device that holds the argument. An argument that is no timestep (t/1000, a value rounded to
    bfloat16 that fits several timesteps) has no match.
    """
    if timesteps is None or not isinstance(argument, (torch.Tensor, int, float)):
        return None
    values = torch.as_tensor(argument).detach().flatten().to("cpu")
    if values.numel() == 0 or bool((values != values[0]).any()):
        return None
    # 1.0 may be 1000/1000 as well as the last timestep.
    if len(timesteps) == 0 or (values[0] <= 1 and timesteps[0] > 1):
        return None
    # A timestep that was cast (float32 to bfloat16) is looked for among the timesteps cast likewise.
    cast = timesteps.detach().to("cpu").to(values.dtype)
    (indices,) = torch.nonzero(cast == values[0], as_tuple=True)
    if len(indices) == 0 or not bool((timesteps[indices] == timesteps[indices[0]]).all()):
        return None
    return int(indices[0])


def _place_in_memory(timesteps: torch.Tensor | None, argument: object) -> int | None:
    """Which entry of `timesteps` the argument is a view of; None where it is a tensor of its own."""
    if timesteps is None or timesteps.ndim != 1 or not isinstance(argument, torch.Tensor):
        return None
    if argument.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    entry_bytes = timesteps.element_size() * timesteps.stride(0)
    return (argument.data_ptr() - timesteps.data_ptr()) // entry_bytes


def same_timestep(a: object, b: object) -> bool:
    """Whether two timesteps handed to `step` one after the other are the same entry of the timesteps.

    Two elements of one tensor are the same only at the same address: Heun and PNDM list equal values twice.
    So the value on the device, and with it a wait, is needed only for tensors that share no memory.
    """
    if a is b:
        return True
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return bool(a == b)
    if a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr():
        return a.data_ptr() == b.data_ptr()
    return a.shape == b.shape and bool(torch.all(a.to("cpu") == b.to("cpu")))


class _Watching:
    """What is installed on one noise scheduler: the wrappers, and the trackers that they report to."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.run = new_run_number()
        self.trackers: list[Tracker] = []
        self.wrappers: dict[str, Callable[..., Any]] = {}
        self.shadowed: dict[str, Any] = {}
        self.scaled: deque[torch.Tensor] = deque(maxlen=_KEPT_SCALED)
        self.depth = 0

    def install(self) -> None:
        names = [
            name for name in ("set_timesteps", _SCALE_METHOD, *_STEP_METHODS) if hasattr(self.scheduler, name)
        ]
        if "step" in names:
            names = [name for name in names if name != "step_pred"]
        attributes = self.scheduler.__dict__
        self.shadowed = {name: attributes[name] for name in (*names, "__getstate__") if name in attributes}
        self.wrappers = {name: _Wrapper(self, name) for name in names}
        self.wrappers["__getstate__"] = _StateWithoutWrappers(self)
        attributes.update(self.wrappers)

    def uninstall(self) -> None:
        """Take the wrappers out; one that somebody has wrapped in turn stays and reports to nobody."""
        attributes = self.scheduler.__dict__
        for name, wrapper in self.wrappers.items():
            if attributes.get(name) is not wrapper:
                continue
            if name in self.shadowed:
                attributes[name] = self.shadowed[name]
            else:
                del attributes[name]

    def open_run(self, tracker: Tracker) -> None:
        tracker.open_run(_extent_at_call(self.scheduler), source=id(self.scheduler))

    def report(self, name: str, timestep: object, result: object) -> None:
        if name == _SCALE_METHOD:
            if isinstance(result, torch.Tensor):
                self.scaled.append(result)
            return
        self.scaled.clear()
        if name == "set_timesteps":
            self.run = new_run_number()
        for tracker in self.trackers:
            if name == "set_timesteps":
                self.open_run(tracker)
            else:
                tracker.close_step(timestep, source=id(self.scheduler))


def _extent_at_call(scheduler: Any) -> Callable[[object, int], Extent]:
    held_weakly = weakref.ref(
        scheduler
    )  # the tracker keeps this function, and is kept where the scheduler is the key

    def extent(argument: object, step: int) -> Extent:
        scheduler = held_weakly()
        return Extent(num_timesteps_of(scheduler), begin_index_of(scheduler, argument, step))

    return extent


class _Wrapper:
    """One method of one noise scheduler; reports when it has returned, so not where it raises.

    Signature and docstring are the method's: pipelines ask whether `scheduler.step` has a parameter `eta`.
    """

    def __init__(self, watching: _Watching, name: str) -> None:
        functools.update_wrapper(self, getattr(watching.scheduler, name))
        self._watching = watching
        self._name = name
        # The second parameter of most; CogVideoXDPMScheduler has an earlier prediction there.
        names = list(inspect.signature(self).parameters)
        self._timestep_index = names.index("timestep") if "timestep" in names else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watching = self._watching
        watching.depth += 1
        try:
            result = self.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]
        finally:
            watching.depth -= 1
        if watching.depth == 0:
            watching.report(self._name, self._timestep(args, kwargs), result)
        return result

    def _timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        index = self._timestep_index
        return kwargs.get("timestep", args[index] if index is not None and index < len(args) else None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Wrapper:
        # MultiDiffusion deep copies scheduler.__dict__ and puts the copy back, in the same noise scheduler.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._watching.scheduler, self._name)


class _StateWithoutWrappers:
    """`__getstate__` of a watched noise scheduler: what it would be if nobody watched."""

    def __init__(self, watching: _Watching) -> None:
        self._watching = watching

    def __call__(self) -> Any:
        watching = self._watching
        state = type(watching.scheduler).__getstate__(watching.scheduler)  # type: ignore[call-arg]
        if not isinstance(state, dict):
            return state
        ours = {name for name, wrapper in watching.wrappers.items() if state.get(name) is wrapper}
        return {name: value for name, value in state.items() if name not in ours} | watching.shadowed

    def __deepcopy__(self, memo: dict[int, Any]) -> _StateWithoutWrappers:
        return self


def _watching(scheduler: Any) -> _Watching | None:
    state = getattr(scheduler, "__dict__", {}).get("__getstate__")
    return state._watching if isinstance(state, _StateWithoutWrappers) else None
