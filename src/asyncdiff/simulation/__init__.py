"""How long a schedule takes on a stated machine, and the timeline of a run, simulated or recorded. Pure."""

from asyncdiff.simulation.machine import Machine
from asyncdiff.simulation.simulation import simulate
from asyncdiff.simulation.timeline import COMPUTE, DRIVER, TRANSFER, WAIT, Span, Timeline, write_traces

__all__ = [
    "COMPUTE",
    "DRIVER",
    "TRANSFER",
    "WAIT",
    "Machine",
    "Span",
    "Timeline",
    "simulate",
    "write_traces",
]
