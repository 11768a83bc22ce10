"""What a step costs beyond the compute of its slowest stage, by how much is exchanged.

A made-up denoiser of four equal blocks in two stages is divided by the real `parallelize`; only the size of
what crosses differs between the rows.

python -m asyncdiff.bench.exchange --json exchange.json
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncdiff.bench import command
from asyncdiff.errors import ConfigurationError
from asyncdiff.schedule.builder import KINDS

if TYPE_CHECKING:
    from asyncdiff.bench.architectures import DenoisingLoop
    from asyncdiff.bench.timed_run import TimedRun

FIRST_STEP = 3
"""The first of the steady state: after a step in order and two that fill buffers."""

DEFAULT_KIB = (1, 64, 4096)


@dataclass(frozen=True)
class Exchange:
    """One size of hidden states. `bytes_per_step`: sent by both devices, the prediction included.

    `overhead_ms`: of every steady step, from one step's end to the next, less the compute of the slower
    stage; `step_ms`: medians, as are `compute_ms`, `wait_ms` and `send_ms` per device.
    """

    kind: str
    state_bytes: int
    bytes_per_step: int
    step_ms: float
    compute_ms: tuple[float, ...]
    wait_ms: tuple[float, ...]
    send_ms: tuple[float, ...]
    overhead_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.overhead_ms)

    @property
    def p90_ms(self) -> float:
        """Nine of ten steps have less."""
        return statistics.quantiles(self.overhead_ms, n=10, method="inclusive")[-1]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"median_ms": self.median_ms, "p90_ms": self.p90_ms}

    def row(self) -> list[str]:
        """For the table."""
        return [
            f"{self.kind}, {self.state_bytes / 1024:.0f} KiB",
            f"{self.median_ms:.2f}",
            f"{self.p90_ms:.2f}",
            f"{self.step_ms:.2f}",
            _list(self.compute_ms),
            _list(self.wait_ms),
            _list(self.send_ms),
            f"{self.bytes_per_step / 1024:.1f}",
        ]


def measure_exchange(
    kind: str, state_bytes: int, *, devices: Sequence[str], block_ms: float, steps: int, runs: int
) -> Exchange:
    """`steps` steady steps in each of `runs` runs, after an untimed one."""
    from asyncdiff.bench.block_chain import PARTITIONS, block_chain_loop
    from asyncdiff.bench.steady import median_ms_per_step, steady_rounds
    from asyncdiff.pipeline import parallelize

    loop = block_chain_loop(state_bytes, block_ms, devices[0])
    total = FIRST_STEP + steps + 2  # the last two are not of the steady state
    rounds = []
    with parallelize(loop, list(devices), partition=PARTITIONS[kind]) as handle:
        loop(total)
        for _ in range(runs):
            run = _timed(loop, total)
            rounds += steady_rounds(handle.last_run, run, FIRST_STEP, 1)
    return Exchange(
        kind=kind,
        state_bytes=state_bytes,
        bytes_per_step=max(each.bytes_sent for each in rounds),
        step_ms=1e3 * statistics.median(each.seconds for each in rounds),
        compute_ms=median_ms_per_step(rounds, "compute_s", 1),
        wait_ms=median_ms_per_step(rounds, "wait_s", 1),
        send_ms=median_ms_per_step(rounds, "send_s", 1),
        overhead_ms=tuple(1e3 * each.overhead_s for each in rounds),
    )


def _timed(loop: DenoisingLoop, num_steps: int) -> TimedRun:
    from asyncdiff.bench.timed_run import StepEnds

    ends = StepEnds(loop.device)
    loop(num_steps, lambda step: ends.mark())
    return ends.finish()


def exchange(
    kib: Annotated[
        list[int] | None, typer.Option(help=f"Hidden states; by default {DEFAULT_KIB}.", metavar="KIB")
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(help="chain or nested; by default both.")] = None,
    devices: command.DevicesOption = "cpu,cpu",
    block_ms: Annotated[float, typer.Option(help="Compute of each of the four blocks.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Timed steps of a run.")] = 100,
    runs: Annotated[int, typer.Option(help="Times everything is measured.")] = 3,
    json_file: command.JsonOption = None,
) -> None:
    """Step time less the slowest stage's compute, by the size of what is exchanged."""
    for size in kib or ():
        command.check_at_least("--kib", size, 1)
    for name in kind or ():
        if name not in KINDS:
            raise ConfigurationError(f"--kind {name}: must be one of {', '.join(KINDS)}.")
    command.check_at_least("--steps", steps, 2)
    command.check_at_least("--runs", runs, 1)
    command.check_at_least("--block-ms", block_ms, 0.1)
    names = devices.split(",")
    if len(names) != 2:
        raise ConfigurationError(f"--devices {devices}: two devices exchange, but {len(names)} were given.")
    results = [
        measure_exchange(each, 1024 * size, devices=names, block_ms=block_ms, steps=steps, runs=runs)
        for each in kind or KINDS
        for size in kib or DEFAULT_KIB
    ]
    command.show_table(
        f"beyond the slower stage's compute, ms per step, {devices}",
        ["hidden states", "median", "p90", "step", "compute", "wait", "send", "KiB sent per step"],
        [result.row() for result in results],
    )
    measured = {
        "devices": names, "block_ms": block_ms, "steps": steps, "runs": runs,
        "results": [result.to_json() for result in results],
    }  # fmt: skip
    command.finish("exchange", measured, json_file)


def _list(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    command.run_command(exchange)
