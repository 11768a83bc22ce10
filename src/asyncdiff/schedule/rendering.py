"""A schedule as a grid of text: one row per rank, one column per round."""

from __future__ import annotations

from asyncdiff.schedule.ops import Compute, Read
from asyncdiff.schedule.rounds import Round, Schedule

IDLE = "-"


def render(schedule: Schedule, *, max_rounds: int | None = None) -> str:
    """The computations of every rank in every round (the first `max_rounds` of them).

    `C1(x3, H0(2); t3)>3` is segment 1 reading the denoiser inputs of step 3 and the state of segment 0 of
    step 2, conditioned on the timestep of step 3, and it is the prediction for step 3. `H0(2~1)` is the line
    through the versions of steps 2 and 1, `x3~5` the latents up to step 3 continued to step 5 (forecasts).
    """
    rounds = schedule.rounds[:max_rounds]
    rows = [["", *map(_heading, rounds)]]
    for rank in range(schedule.num_ranks):
        rows.append([_row_name(schedule, rank), *(_cell(schedule, round_, rank) for round_ in rounds)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-+-".join("-" * width for width in widths))
    if len(rounds) < len(schedule.rounds):
        lines.append(f"... and {len(schedule.rounds) - len(rounds)} more rounds")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _heading(round_: Round) -> str:
    if len(round_.steps) > 1:
        return f"steps {round_.steps[0]}-{round_.steps[-1]}"
    return f"step {round_.steps[0]}{' in order' * round_.in_order}"


def _row_name(schedule: Schedule, rank: int) -> str:
    if schedule.stage_of_rank(rank) is None:
        return f"rank {rank} driver"
    copy = f" copy {schedule.copy_of_rank(rank)}" if schedule.copy_of_rank(rank) else ""
    return f"rank {rank} stage {schedule.stage_of_rank(rank)}{copy}"


def _cell(schedule: Schedule, round_: Round, rank: int) -> str:
    computes = [op for op in round_.ops[rank] if isinstance(op, Compute)]
    return ", ".join(_text(op, schedule.num_segments - 1) for op in computes) or IDLE


def _text(op: Compute, last_segment: int) -> str:
    latents = f"x{op.input_step}" + f"~{op.latents_step}" * (op.latents_step != op.input_step)
    reads = ", ".join([latents, *map(_read_text, op.reads)])
    prediction = f">{op.step}" if op.segment == last_segment else ""
    return f"C{op.segment}({reads}; t{op.condition_step}){prediction}"


def _read_text(read: Read) -> str:
    return f"H{read.segment}({'~'.join(str(term.value.step) for term in read.terms)})"
