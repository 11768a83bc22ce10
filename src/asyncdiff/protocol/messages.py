"""Control messages between the driver and its workers.

Pure: tensors, specs and skeletons are opaque here (`Any`). Every message to a worker names its session: under
torchrun one worker process serves all the handles of the driver.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WorkerHello:
    """Worker -> driver, first message: who connected. `device`: where it has been placed, if it has."""

    rank: int
    pid: int
    host: str
    device: str = ""


@dataclass(frozen=True)
class Ping:
    """Driver -> worker: are you alive? Answered by a thread of its own, also while a stage computes."""

    number: int


@dataclass(frozen=True)
class Pong:
    """Worker -> driver. `clock_s`: the worker's `time.perf_counter()`."""

    number: int
    clock_s: float


@dataclass(frozen=True)
class Farewell:
    """Driver -> worker: the driver ends, so does the worker."""


@dataclass(frozen=True)
class OpenSession:
    """Hold one stage of a denoiser on `device` with `threads` intra-op threads (None: torch's default).

    `store`: host and port of the store to meet at. `preload`: modules to import in the meantime.
    """

    session: int
    rank: int
    device: str
    threads: int | None
    store: tuple[str, int]
    preload: tuple[str, ...] = ()


@dataclass(frozen=True)
class JoinTransport:
    """Leave the data transport, if any, for a new one among `ranks`; `local`: all on one host."""

    session: int
    ranks: tuple[int, ...]
    backend: str
    prefix: str
    local: bool


@dataclass(frozen=True)
class InstallSkeleton:
    """Rebuild the denoiser. `rank_stages[r]`: the stage of rank r (the driver may have none).
    `keeps_weights`: tensors already held are kept by name; else the driver has taken them back.
    `execution`: how stages run their blocks."""

    session: int
    skeleton: Any
    rank_stages: tuple[int | None, ...]
    keeps_weights: bool
    execution: Any


@dataclass(frozen=True)
class ReceiveWeights:
    """The named tensors follow on the data transport, in this order: (name, spec).

    `from_file`: name -> spec of those that the worker reads itself from `checkpoint`.
    """

    session: int
    tensors: tuple[tuple[str, Any], ...]
    checkpoint: Any = None
    from_file: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReturnWeights:
    """Send the named tensors back on the data transport, in this order."""

    session: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class PrepareStage:
    """Install the stubs for one input structure; `discarded`: those that will not be needed any more."""

    session: int
    key: int
    spec: Any
    wiring: Any
    discarded: tuple[int, ...] = ()


@dataclass(frozen=True)
class InlineInput:
    """A small input in the message: its elements in row-major order (pickled tensors take 0.2 ms)."""

    name: str
    spec: Any
    data: bytes


@dataclass(frozen=True)
class TransferredInput:
    """An input that follows on the data transport; `is_late`: after all others, and the stage begins without
    it."""

    name: str
    spec: Any
    is_late: bool = False


@dataclass(frozen=True)
class KeptInput:
    """An input that has not changed since it was last sent in this run and channel."""

    name: str


InputItem = InlineInput | TransferredInput | KeptInput


@dataclass(frozen=True)
class LatentsScale:
    """Multiply the latents by `factor`: they are the first `length` entries of the denoiser's input along
    `dim`, and what a pipeline has concatenated to them (a mask, a picture) stays as it is."""

    factor: float
    dim: int
    length: int


@dataclass(frozen=True)
class Condition:
    """What replaces the call's own timestep and scale of the latents (None: as in the call) for another
    `condition_step`. `timestep`: a number or a tensor; on its way to a worker perhaps an `InlineInput`."""

    timestep: Any
    latents_scale: LatentsScale | None = None


@dataclass(frozen=True)
class RoundInfo:
    """What all ranks are told of a round.

    `key`: the input structure. `floats`: inputs that are numbers. `history_depth`: how many versions of a
    foreign value later rounds may read. `conditions`: by condition step, what replaces the call's own
    timestep and scale of the latents. `gauged`: the forecast whose relative error is to be told with every
    prediction, None if it is not wanted.
    """

    run: int
    channel: Hashable
    key: int
    first_step: int
    floats: dict[str, float]
    history_depth: int = 2
    conditions: dict[int, Condition] = field(default_factory=dict)
    timestep_name: str | None = None
    latents_name: str | None = None
    gauged: str | None = None


@dataclass(frozen=True)
class RoundMessage:
    """Run this rank's operations of one round. `ops`: of `Round.packed`. `ended_runs`: runs whose states may
    be forgotten. `is_void`: only take part in the transfers; the round does not happen, or happens again."""

    session: int
    info: RoundInfo
    ops: bytes
    inputs: tuple[InputItem, ...]
    ended_runs: tuple[int, ...] = ()
    is_void: bool = False


@dataclass(frozen=True)
class AbortRun:
    """Compute nothing more for this run; fill what its rounds still owe other ranks, so that nobody waits.

    `transport_is_lost`: another worker is gone, so give up waiting for tensors until a new transport is
    joined.
    """

    session: int
    run: int
    transport_is_lost: bool = False


@dataclass(frozen=True)
class Collect:
    """Report what was recorded of a run, and how much memory is held."""

    session: int
    run: int | None


@dataclass(frozen=True)
class CloseSession:
    """Give up the stage and leave the transport."""

    session: int


@dataclass(frozen=True)
class Reply:
    """Worker -> driver: the last request of this session is done; `payload` is its answer."""

    session: int
    payload: Any = None


@dataclass(frozen=True)
class Failure:
    """Worker -> driver: an operation raised. In a round of `run` the worker then waits for `AbortRun`."""

    session: int
    message: str
    details: str
    operation: str
    stage: int | None = None
    step: int | None = None
    run: int | None = None


@dataclass(frozen=True)
class RoundRecord:
    """What one worker did in one round. Times in seconds of its own `time.perf_counter()`.

    `spans`: (name, category, start, end), category "compute", "wait" or "send".
    """

    run: int
    channel: Hashable
    first_step: int
    compute_s: float
    wait_s: float
    bytes_sent: int
    spans: tuple[tuple[str, str, float, float], ...]

    def is_of_same_round(self, other: RoundRecord) -> bool:
        """Whether both tell of one round, which was run twice."""
        return (self.run, self.channel, self.first_step) == (other.run, other.channel, other.first_step)


@dataclass(frozen=True)
class WorkerReport:
    """Answer to `Collect`. `weight_bytes`: what the stage's tensors hold; `resident_bytes`: the process's
    RSS; `device_peak_bytes`: the most that the process has held on CUDA devices, 0 without one.
    """

    rounds: tuple[RoundRecord, ...]
    weight_bytes: int
    resident_bytes: int
    cpu_s: float
    device_peak_bytes: int = 0
