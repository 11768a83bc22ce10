"""What every phase of a training does: batches, the learning rate, one update, and keeping the books."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from rich.progress import Progress

_REPORT_EVERY = 100  # steps
_WARMUP_FRACTION = 0.03
_MAX_GRADIENT_NORM = 1.0


@dataclass
class TrainingLog:
    """What happened: mean losses over each stretch of 100 steps, and the seconds each phase took."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Step:
    """A step of a phase, whose `loss` the phase fills in."""

    index: int
    loss: float = math.nan


def reported_steps(phase: str, count: int, log: TrainingLog, progress: Progress) -> Iterator[Step]:
    """Counts steps and keeps the books: the progress bar, a mean loss per stretch, the phase's seconds."""
    started = time.monotonic()
    losses: list[float] = []
    means = log.losses.setdefault(phase, [])
    for index in progress.track(range(count), description=phase):
        step = Step(index)
        yield step
        losses.append(step.loss)
        log.seconds[phase] = time.monotonic() - started
        if len(losses) == _REPORT_EVERY or index == count - 1:
            means.append(sum(losses) / len(losses))
            losses.clear()
            progress.console.print(
                f"{phase} step {index + 1}: loss {means[-1]:.4f}, {log.seconds[phase]:.0f} s"
            )


def epochs(size: int, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches of indices, each picture once per epoch, in a new order every time."""
    while True:
        order = torch.randperm(size, generator=generator)
        yield from order.split(batch)


def warmup_and_cosine(steps: int) -> Callable[[int], float]:
    """The learning rate's factor at each step."""
    warmup = max(1, round(_WARMUP_FRACTION * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def update(
    loss: torch.Tensor,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """One step down the gradient of the loss, its norm limited."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
