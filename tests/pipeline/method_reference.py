"""A second implementation of docs/method.md, by other means than the package: no schedule, no stubs, no
messages.

Every evaluation runs the whole denoiser, in which the blocks of other stages return what the formulas say
they are (a version that was written down, or the line through two). Slow and simple.

Letters: N stages, S stride, w warm-up steps, T steps; b the first step of a round, q a step of it; E and Z
the blocks of the outer stage of a nested split before and after the inner ones.

Steps are places in the noise scheduler's timesteps: those of second-order ones are evaluations.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from asyncdiff.planner import Plan


class Reference:
    """The forward of `denoiser` as N + S - 1 devices would give it. `stages[k]`: names of the blocks of stage
    k; `begin`: where in the noise scheduler's timesteps the run begins; `num_scaled`: how many of the input's
    channels (None: all) the noise scheduler scales, in dim `channel_dim`; `fresh`: (block, leaf, reading
    stage) of what is read in time; `damped`: the line's slope is multiplied by what the last changes tell;
    `leads`: for how many rounds ahead each stage works on latents that are continued (None: they are not)."""

    def __init__(
        self, denoiser: nn.Module, noise_scheduler: Any, stages: list[list[str]], *, nested: bool = False,
        S: int = 1, w: int = 1, time_shift: bool = False, forecast: bool = True, begin: int = 0,
        num_scaled: int | None = None, channel_dim: int = 1, fresh: Collection[tuple[str, int, int]] = (),
        damped: bool = False, leads: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.denoiser = denoiser
        self.forward = type(denoiser).forward.__get__(denoiser)
        self.noise_scheduler = noise_scheduler
        self.stages, self.nested = stages, nested
        self.S, self.w, self.time_shift, self.forecast = S, w, time_shift, forecast
        self.begin, self.num_scaled, self.channel_dim = begin, num_scaled, channel_dim
        self.fresh, self.damped, self.leads = set(fresh), damped, leads
        self.course = Course()
        self.changes: dict[tuple[str, int], dict[tuple[int, int], torch.Tensor]] = {}
        self.c_in: list[float] = []
        self.names = [name for names in stages for name in names]
        self.latents_name = next(iter(inspect.signature(self.forward).parameters))
        self.step = 0
        self.states: dict[str, list[tuple[int, Any]]] = {name: [] for name in self.names}
        self.predictions: dict[int, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(self.forward).bind(*args, **kwargs).arguments
        conditions = call | call.pop("ignored", {})
        sample, timestep = conditions.pop(self.latents_name), conditions.pop("timestep")
        s, self.step = self.step, self.step + 1
        self.timestep_shape = timestep.shape
        if s == 0:
            self.c_in = input_scales(self.noise_scheduler, self.begin)
        self.course.follow(float(self.noise_scheduler.timesteps[self.begin + s]), sample)
        if s < self.w:
            produced, prediction = self.evaluate(self.names, sample, timestep, conditions, self.nothing)
            self.keep(dict.fromkeys(produced, s), produced)
            return prediction
        if s not in self.predictions:
            self.run_round(s, sample, conditions)
        return self.predictions.pop(s)

    def run_round(self, b: int, sample: torch.Tensor, conditions: dict[str, Any]) -> None:
        """Section 3 (chain) and section 6 (nested): all reads are of earlier rounds, but those of E and of
        what is read in time. The stages run one after the other, so that the latter is there."""
        steps = range(b, min(b + self.S, len(self.noise_scheduler.timesteps) - self.begin))
        last = b if self.forecast else steps[-1]
        leads = self.leads or [0] * len(self.stages)
        made_for = {
            name: b + self.S * lead for names, lead in zip(self.stages, leads, strict=True) for name in names
        }
        produced: dict[str, Any] = {}

        def run(own: list[str], segment: int, q: int) -> tuple[dict[str, Any], Any]:
            def foreign(name: str) -> Any:
                if name in E:
                    return E[name]
                return self.read_in_time(name, segment, made_for[name], q, produced)

            return self.evaluate(own, self.latents(sample, b, q), self.timestep(q), conditions, foreign)

        E: dict[str, Any] = {}
        if self.nested:  # of the copy that has the timestep of the inner stages
            E, _ = self.evaluate(
                self.stages[0], self.scaled(sample, b, last), self.timestep(last), conditions,
                lambda name: self.read(name, last),
            )  # fmt: skip
        end = len(self.noise_scheduler.timesteps) - self.begin
        for stage in range(1, len(self.stages)) if self.nested else range(len(self.stages) - 1):
            target = last + self.S * leads[stage]
            if target < end:  # nobody would read what is made for another
                produced |= run(self.stages[stage], stage, target)[0]
        predicting, segment = (0, len(self.stages)) if self.nested else (-1, len(self.stages) - 1)
        for q in steps:
            self.predictions[q] = copy.deepcopy(run(self.stages[predicting], segment, q)[1])
        self.keep(made_for, produced | E)

    def evaluate(
        self,
        own: list[str],
        sample: torch.Tensor,
        timestep: Any,
        conditions: dict[str, Any],
        foreign: Callable[[str], Any],
    ) -> tuple[dict[str, Any], Any]:
        """One forward with the blocks `own`; what they produced, and the denoiser's output."""
        produced: dict[str, Any] = {}

        def standing_in(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if name not in own:
                    return foreign(name)
                produced[name] = forward(*args, **kwargs)
                return produced[name]

            return run

        modules = {name: self.denoiser.get_submodule(name) for name in self.names}
        for name, module in modules.items():
            vars(module)["forward"] = standing_in(name, module.forward)
        try:
            timesteps = torch.as_tensor(timestep).expand(self.timestep_shape)
            return produced, self.forward(**{self.latents_name: sample, "timestep": timesteps}, **conditions)
        finally:
            for module in modules.values():
                del vars(module)["forward"]

    def nothing(self, name: str) -> Any:
        raise AssertionError(f"{name} is foreign in a step that runs in order")

    def keep(self, labels: dict[str, int], produced: dict[str, Any]) -> None:
        for name, value in produced.items():
            self.states[name] = [(labels[name], copy.deepcopy(value)), *self.states[name][:6]]

    def read(self, name: str, s: int) -> Any:
        """Section 5. A block that nothing was ever read of may be without a state."""
        (a, newest), *older = self.states[name]
        if not self.forecast or not older:
            return newest
        b, oldest = older[0]
        if self.leads is not None:
            return self.nearest(name, self.states[name], s)
        now, structure = tree_flatten(newest)
        then = tree_leaves(oldest)
        return tree_unflatten(
            [
                self.line((name, i), new, old, a, b, s)
                for i, (new, old) in enumerate(zip(now, then, strict=True))
            ],
            structure,
        )

    def nearest(self, name: str, versions: list[tuple[int, Any]], s: int) -> Any:
        """What was made for step s, or the line through the versions for the two steps nearest to it."""
        versions = sorted(versions, key=lambda version: (abs(version[0] - s), -version[0]))
        if len(versions) == 1 or versions[0][0] == s:
            return versions[0][1]
        (b, oldest), (a, newest) = sorted(versions[:2], key=lambda version: version[0])
        now, structure = tree_flatten(newest)
        lines = (
            self.line((name, i), new, old, a, b, s)
            for i, (new, old) in enumerate(zip(now, tree_leaves(oldest), strict=True))
        )
        return tree_unflatten(list(lines), structure)

    def line(self, leaf: tuple[str, int], newest: Any, oldest: Any, a: int, b: int, s: int) -> Any:
        """H(a) + alpha r (H(a) - H(b)), in the kernel that rounds once."""
        if not is_forecast(newest):
            return newest
        r = (s - a) / (a - b)
        if self.damped:
            r *= self.alpha(self.changes.setdefault(leaf, {}), newest.double() - oldest.double(), a, b)
        return torch.lerp(newest, oldest, -r)

    def alpha(
        self, changes: dict[tuple[int, int], torch.Tensor], change: torch.Tensor, a: int, b: int
    ) -> float:
        """Least squares of the changes seen so far on what the lines had promised, each older one counting
        half."""
        changes[a, b] = change
        along = whole = 0.0
        for (later, middle), (_, early) in zip(list(changes)[1:], changes, strict=False):
            promised = changes[middle, early] * (later - middle) / (middle - early)
            along = along / 2 + float((changes[later, middle] * promised).sum())
            whole = whole / 2 + float((promised * promised).sum())
        return min(1.0, max(0.0, along / whole)) if whole else 1.0

    def read_in_time(self, name: str, stage: int, b: int, s: int, produced: dict[str, Any]) -> Any:
        """Section 6: those leaves that are read in time are continued from the round's own version, which is
        for step b. There is no late version of what is only there in time; a leaf that no one reads may be
        anything."""
        in_time = [leaf for each, leaf, reader in self.fresh if (each, reader) == (name, stage)]
        if not in_time:
            return self.read(name, s)
        (a, newest), *_ = self.states[name]
        late, structure = tree_flatten(self.read(name, s))
        if self.leads is not None:
            versions = [(b, produced[name])] if name in produced else []
            now = tree_leaves(self.nearest(name, [*versions, *self.states[name]], s))
            return tree_unflatten(
                [now[leaf] if leaf in in_time else each for leaf, each in enumerate(late)], structure
            )
        now, before = tree_leaves(produced[name]), tree_leaves(newest)
        for leaf in in_time:
            late[leaf] = now[leaf]
            if self.forecast and s > b:
                late[leaf] = self.line((name, -1 - leaf), now[leaf], before[leaf], b, a, s)
        return tree_unflatten(late, structure)

    def latents(self, sample: torch.Tensor, b: int, q: int) -> torch.Tensor:
        """What stands for the latents of step q in a round that begins with step b."""
        if self.leads is None:
            return self.scaled(sample, b, q)
        if q == b:
            return sample
        t = float(self.noise_scheduler.timesteps[self.begin + q])
        return self.course.continued(t).to(sample.dtype)

    def timestep(self, q: int) -> torch.Tensor:
        """Section 4."""
        return self.noise_scheduler.timesteps[self.begin + (q - 1 if self.time_shift else q)]

    def scaled(self, sample: torch.Tensor, b: int, q: int) -> torch.Tensor:
        """Section 3, noise schedulers that scale the input by a factor of the step."""
        if self.c_in[q] == self.c_in[b]:
            return sample
        n = sample.shape[self.channel_dim] if self.num_scaled is None else self.num_scaled
        latents, others = sample.split([n, sample.shape[self.channel_dim] - n], self.channel_dim)
        return torch.cat([latents * (self.c_in[q] / self.c_in[b]), others], self.channel_dim)


class Course:
    """Section 5: what something was at its last three points, and what it will be."""

    def __init__(self, unknown: float = 1.0) -> None:
        self.unknown = unknown  # alpha before anything is known of it
        self.points: list[tuple[float, torch.Tensor]] = []  # newest last
        self.seen: list[tuple[Any, ...]] = []  # of each point: its weight, the change, the line, the bend

    def follow(self, t: float, latents: torch.Tensor) -> None:
        """Section 5: how much of the line, and of the parabola's bend away from it, has come true, by least
        squares; each older point counts half. A second evaluation at the same t replaces the first."""
        latents = latents.double()
        others = [point for point in self.points if point[0] != t]
        if len(others) == len(self.points) >= 2:
            newest, line, bend = self.parts(t)
            self.seen = [(weight / 2, *each) for weight, *each in self.seen]
            self.seen.append((1.0, latents - newest, line, bend))
        self.points = [*others, (t, latents)][-3:]

    def parts(self, t: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The newest point, the way from there to t on the line, and from there to the parabola."""
        newest, line = self.points[-1][1], polynomial(self.points[-2:], t)
        return newest, line - newest, polynomial(self.points, t) - line

    def continued(self, t: float) -> torch.Tensor:
        def share(pairs: list[tuple[float, torch.Tensor, torch.Tensor]], unknown: float) -> float:
            along = sum(w * float((wanted * way).sum()) for w, wanted, way in pairs)
            whole = sum(w * float((way * way).sum()) for w, _, way in pairs)
            return min(1.0, max(0.0, along / whole)) if whole else unknown

        if len(self.points) == 1:
            return self.points[0][1]
        gamma = share([(w, change - line, bend) for w, change, line, bend in self.seen], 0.0)
        alpha = share([(w, change, line + gamma * bend) for w, change, line, bend in self.seen], self.unknown)
        newest, line, bend = self.parts(t)
        return newest + alpha * (line + gamma * bend)


class Refreshed:
    """Section 7: the forward of a batch of two halves, of which the second is evaluated at every step, the
    first in the `w` steps of warm-up and in every `k`-th from there; in between it is the second and what the
    two have differed by, continued. `both`: a forward of the whole batch, or one for each half."""

    def __init__(self, both: Sequence[Callable[..., Any]], k: int, w: int = 1) -> None:
        self.both, self.k, self.w, self.step = both, k, w, 0
        self.difference = Course(unknown=0.0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        s, self.step = self.step, self.step + 1
        first, second = ([half(each, i) for each in args] for i in range(2))
        named_first, named_second = ({name: half(each, i) for name, each in kwargs.items()} for i in range(2))
        if len(self.both) == 2:  # whose states go on from step to step
            (one,), (other,) = self.both[0](*first, **named_first), self.both[1](*second, **named_second)
        elif s < self.w or (s - self.w + 1) % self.k == 0:
            one, other = self.both[0](*args, **kwargs)[0].chunk(2)
        else:
            (other,) = self.both[0](*second, **named_second)
        if s < self.w or (s - self.w + 1) % self.k == 0:
            self.difference.follow(float(s), one.double() - other.double())
        else:
            one = (other.double() + self.difference.continued(float(s))).to(other.dtype)
        return (torch.cat([one, other]),)


def half(value: Any, index: int) -> Any:
    """Of what has a batch."""
    if isinstance(value, dict):
        return {name: half(each, index) for name, each in value.items()}
    has_batch = isinstance(value, torch.Tensor) and value.ndim > 0
    return value.chunk(2)[index] if has_batch else value


def polynomial(points: list[tuple[float, torch.Tensor]], t: float) -> torch.Tensor:
    """Through the points, at t; Neville's way."""
    values, places = [each for _, each in points], [place for place, _ in points]
    for width in range(1, len(points)):
        values = [
            ((t - places[i + width]) * values[i] - (t - places[i]) * values[i + 1])
            / (places[i] - places[i + width])
            for i in range(len(values) - 1)
        ]
    return values[0]


def read_in_time(plan: Plan) -> list[tuple[str, int, int]]:
    """`fresh` of the reference, from a plan."""
    assert all(atom.call == 0 for atom, _ in plan.fresh_atoms)
    return [(atom.path, atom.leaf, reader) for atom, reader in plan.fresh_atoms]


def input_scales(noise_scheduler: Any, begin: int) -> list[float]:
    """By what the loop of a pipeline multiplies its latents, step by step: found by walking a copy of the
    noise scheduler through all its steps."""
    walker, factors = copy.deepcopy(noise_scheduler), []
    if not hasattr(walker, "scale_model_input"):
        return [1.0] * (len(walker.timesteps) - begin)
    with torch.random.fork_rng():
        latents = torch.zeros(1, 4, 2, 2)
        for t in walker.timesteps[begin:]:
            factors.append(float(walker.scale_model_input(torch.ones(1, dtype=torch.float64), t)))
            latents = walker.step(torch.zeros_like(latents), t, latents, return_dict=False)[0]
    return factors


def is_forecast(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
