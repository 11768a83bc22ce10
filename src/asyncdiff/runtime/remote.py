"""The driver's side: rank 0 in this process, every other rank in a worker."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from asyncdiff.errors import ParallelizedError, WorkerError
from asyncdiff.graph.wiring import Wiring
from asyncdiff.protocol.messages import (
    AbortRun,
    CloseSession,
    Collect,
    InlineInput,
    InputItem,
    InstallSkeleton,
    JoinTransport,
    KeptInput,
    OpenSession,
    PrepareStage,
    ReceiveWeights,
    ReturnWeights,
    RoundMessage,
    TransferredInput,
    WorkerReport,
)
from asyncdiff.runtime.control import WorkerConnection
from asyncdiff.runtime.executor import RoundCall, process_report
from asyncdiff.runtime.interpreter import StageInterpreter
from asyncdiff.runtime.link import Parcel, Stream
from asyncdiff.runtime.session import STORE_TIMEOUT
from asyncdiff.runtime.transport import Transport, choose_backend, open_transport
from asyncdiff.schedule.ops import Op
from asyncdiff.stage import StageReplica, StageSpec
from asyncdiff.weights import (
    Skeleton,
    assign_tensors,
    find_checkpoint,
    free_tensors,
    load_skeleton,
    named_tensors,
    resident_bytes,
)
from asyncdiff.weights.ownership import tensor_spec
from asyncdiff.weights.source import checksum

_INLINE_BYTES = 1024
_SETTLE_S = 0.3
_session_numbers = itertools.count()


class Workers(Protocol):
    """Started worker processes: spawned ones of this handle, or the other ranks of torchrun."""

    connections: dict[int, WorkerConnection]
    is_local: bool

    def kill(self, rank: int) -> None: ...

    def close(self) -> None: ...


class RemoteExecutor:
    """Drives workers 1 to D-1 and is rank 0 itself. `devices[r]`, `threads[r]`: of rank r.

    `host`: the address under which other machines' workers reach the store of this process.
    """

    def __init__(
        self,
        workers: Workers,
        devices: list[str],
        threads: list[int | None],
        *,
        host: str = "127.0.0.1",
    ) -> None:
        self._workers = workers
        self._rank_stages: tuple[int, ...] = ()
        self._devices = devices
        self._device = torch.device(devices[0])
        self._session = next(_session_numbers)
        self._store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT, multi_tenant=False
        )
        self._prefixes = itertools.count()
        self._transport: Transport | None = None
        self._interpreter: StageInterpreter | None = None
        self._replica: StageReplica | None = None
        self._replica_module: nn.Module | None = None
        self._checksums: dict[str, int] = {}
        self._held: dict[int, set[str]] = {}
        self._needed: dict[int, dict[int, tuple[str, ...]]] = {}
        self._members: tuple[int, ...] = ()
        self._last_inputs: dict[tuple[int, int, Hashable], dict[str, tuple[torch.Tensor, int]]] = {}
        self._progress_s = time.monotonic()
        self._operation = ""
        self._broken: WorkerError | None = None
        self._closed = False
        self._open(threads, host)

    # -- setting up --------------------------------------------------------------------------------------------

    def _open(self, threads: list[int | None], host: str) -> None:
        for rank, connection in self._connections():
            connection.open_session(self._session)
            connection.send(
                OpenSession(
                    session=self._session,
                    rank=rank,
                    device=self._devices[rank],
                    threads=threads[rank],
                    store=(host, self._store.port),
                )
            )
        self._await_replies("opening its device")
        self._join(tuple(range(len(self._devices))))

    def _join(self, ranks: tuple[int, ...]) -> None:
        """Form the data transport among these ranks; the rank within it is the position in `ranks`."""
        backend = choose_backend([self._devices[rank] for rank in ranks])
        prefix = f"asyncdiff/{self._session}/{next(self._prefixes)}"
        message = JoinTransport(self._session, ranks, backend, prefix, self._workers.is_local)
        others = [rank for rank in ranks if rank != 0]
        for rank in others:
            self._workers.connections[rank].send(message)
        if self._transport is not None:
            self._transport.close()
        self._transport = open_transport(
            backend,
            dist.PrefixStore(prefix, self._store),
            0,
            len(ranks),
            self._devices[0],
            local=self._workers.is_local,
            watch=self._watch,
        )
        self._members = ranks
        self._await_replies("joining the transport", others)

    def install(
        self,
        module: nn.Module,
        skeleton: Skeleton,
        rank_stages: tuple[int, ...],
        held: Mapping[int, Collection[str]],
    ) -> None:
        """Ship each stage its own tensors from the live module, then free in this process what is not ours."""
        self._rank_stages = rank_stages
        self._send_all(InstallSkeleton(self._session, skeleton, rank_stages))
        self._await_replies("rebuilding the denoiser")
        self._ship(module, held)
        self._held[0] = set(held[0])
        own = {name: tensor for name, tensor in named_tensors(module) if name in self._held[0]}
        free_tensors(module, [name for name in skeleton.specs if name not in own])
        self._replica_module = load_skeleton(skeleton, own, self._device)
        self._replica = StageReplica(self._replica_module, device=self._device)
        assert self._transport is not None
        self._interpreter = StageInterpreter(0, self._rank_stages, self._replica, self._transport, self._device)

    def _ship(self, module: nn.Module, held: Mapping[int, Collection[str]]) -> None:
        tensors = dict(named_tensors(module))
        assert self._transport is not None
        for rank, connection in self._connections():
            wanted = set(held[self._rank_stages[rank]]) - self._held.get(rank, set())
            names = [name for name in tensors if name in wanted]
            connection.send(
                ReceiveWeights(self._session, tuple((name, tensor_spec(tensors[name])) for name in names))
            )
            for name in names:
                self._checksums.setdefault(name, checksum([tensors[name]]))
                self._transport.send(rank, Parcel(Stream.WEIGHTS, name), tensors[name], tensor_spec(tensors[name]))
            self._held[rank] = self._held.get(rank, set()) | wanted
        self._await_replies("receiving its weights")

    def prepare(self, key: int, specs: Mapping[int, StageSpec], wiring: Wiring) -> None:
        for rank, connection in self._connections():
            connection.send(PrepareStage(self._session, key, specs[self._rank_stages[rank]], wiring))
        replica, interpreter = self._replica, self._interpreter
        assert replica is not None and interpreter is not None
        replica.prepare(key, specs[0])
        interpreter.wire(key, wiring)
        self._needed[key] = {stage: tuple(spec.needed_inputs) for stage, spec in specs.items()}
        self._await_replies("preparing its stage")

    # -- rounds ------------------------------------------------------------------------------------------------

    def run_round(self, call: RoundCall) -> None:
        self._refuse_if_broken()
        interpreter = self._interpreter
        assert interpreter is not None
        for run in call.ended_runs:
            self._forget(run)
        self._note_progress(f"step {call.round.first_step}")
        with self._failing(call.run):
            for rank, connection in self._connections():
                if call.round.ops[rank]:
                    self._dispatch(rank, connection, call)
            interpreter.run_round(call.task(0))

    def prediction(self, run: int, channel: Hashable, step: int) -> list[torch.Tensor]:
        self._refuse_if_broken()
        assert self._interpreter is not None
        self._note_progress(f"the prediction of step {step}")
        with self._failing(run):
            return self._interpreter.prediction(run, channel, step)

    def _dispatch(self, rank: int, connection: WorkerConnection, call: RoundCall) -> None:
        """One control message, then the inputs that do not fit in it."""
        needed = self._needed[call.key][self._rank_stages[rank]]
        items = tuple(self._input_items(rank, call, needed))
        connection.send(
            RoundMessage(
                session=self._session,
                run=call.run,
                channel=call.channel,
                key=call.key,
                first_step=call.round.first_step,
                ops=call.round.ops[rank],
                inputs=items,
                floats=dict(call.floats),
                history_depth=call.history_depth,
                conditions=dict(call.conditions),
                timestep_name=call.timestep_name,
                latents_name=call.latents_name,
                ended_runs=call.ended_runs,
            )
        )
        assert self._transport is not None
        for item in items:
            if isinstance(item, TransferredInput):
                self._transport.send(rank, Parcel(Stream.INPUT, item.name), call.tensors[item.name], item.spec)

    def _input_items(self, rank: int, call: RoundCall, needed: Collection[str]) -> Iterator[InputItem]:
        """Constant inputs cross once a run: the same object, not written to since (a reference is held)."""
        last = self._last_inputs.setdefault((rank, call.run, call.channel), {})
        for name in needed:
            tensor = call.tensors[name]
            version = -1 if tensor.is_inference() else tensor._version
            if version >= 0 and name in last and last[name][0] is tensor and last[name][1] == version:
                yield KeptInput(name)
            elif tensor.device.type == "cpu" and (tensor.nbytes <= _INLINE_BYTES or self._device.type != "cpu"):
                yield InlineInput(name, tensor.detach().clone())
            else:
                yield TransferredInput(name, tensor_spec(tensor))
            last[name] = (tensor, version)

    def _forget(self, run: int) -> None:
        assert self._interpreter is not None
        self._interpreter.end_runs((run,))
        self._last_inputs = {key: last for key, last in self._last_inputs.items() if key[1] != run}

    # -- what goes wrong ---------------------------------------------------------------------------------------

    @contextmanager
    def _failing(self, run: int) -> Iterator[None]:
        """Whatever interrupts a round (a worker's failure, Ctrl-C), leave every rank ready for the next run."""
        try:
            yield
        except BaseException as error:
            cause = self._explain(error)
            self._abort(run, cause)
            if cause is error:
                raise
            raise cause from error

    def _explain(self, error: BaseException) -> BaseException:
        """A transfer that broke because a worker died says so; an exception of our own stage says where."""
        if isinstance(error, WorkerError) or not isinstance(error, Exception):
            return error
        deadline = time.monotonic() + _SETTLE_S
        while isinstance(error, RuntimeError) and time.monotonic() < deadline:
            for _, connection in self._connections():
                if connection.is_gone:
                    return connection.death(self._operation)
            time.sleep(0.02)
        assert self._interpreter is not None
        step, operation = self._interpreter.where
        return WorkerError(
            f"The driver (rank 0, stage 0) failed at step {step} in {operation}: {type(error).__name__}: {error}",
            rank=0,
            stage=0,
            step=step,
            operation=operation,
        )

    def _abort(self, run: int, error: BaseException) -> None:
        if isinstance(error, WorkerError) and error.rank != 0 and self._is_lost(error.rank):
            self._broken = error
        for rank, connection in self._connections():
            self._tell_aborted(rank, connection, run)
        if self._broken is None and self._interpreter is not None:
            self._interpreter.settle()
            self._forget(run)

    def _tell_aborted(self, rank: int, connection: WorkerConnection, run: int) -> None:
        if connection.is_gone:
            return
        try:
            connection.send(AbortRun(self._session, run))
        except WorkerError as gone:
            self._broken = self._broken or gone
        connection.clear_failure(self._session)

    def _is_lost(self, rank: int) -> bool:
        """Whether the worker is gone or, having stalled, has to be given up."""
        connection = self._workers.connections[rank]
        return connection.is_gone or connection.failed_run(self._session) is None

    def _watch(self) -> None:
        """Called while a transfer is waited for: raise if a worker failed, died or stalled.

        A death is reported before the failures it causes in other workers, which may be noticed first.
        """
        connections = [connection for _, connection in self._connections()]
        if any(connection.failed_run(self._session) is not None for connection in connections):
            time.sleep(_SETTLE_S)
        for connection in sorted(connections, key=lambda connection: not connection.is_gone):
            waited_s = time.monotonic() - self._progress_s
            connection.check(self._session, waited_s=waited_s, operation=self._operation)

    def _note_progress(self, operation: str) -> None:
        self._progress_s = time.monotonic()
        self._operation = operation

    def _note_losses(self) -> None:
        for _, connection in self._connections():
            if connection.is_gone and self._broken is None:
                self._broken = connection.death()

    def _refuse_if_broken(self) -> None:
        self._note_losses()
        if self._broken is not None:
            raise ParallelizedError(
                f"This denoiser cannot run: {self._broken} Call handle.remove(), then parallelize again."
            ) from self._broken

    # -- ending ------------------------------------------------------------------------------------------------

    def reports(self, run: int | None) -> list[WorkerReport]:
        self._refuse_if_broken()
        assert self._interpreter is not None and self._replica_module is not None
        self._send_all(Collect(self._session, run))
        own = process_report(self._interpreter.take_records(run), resident_bytes(self._replica_module))
        return [own, *self._await_replies("reporting").values()]

    def restore(self, module: nn.Module) -> list[str]:
        """Fetch freed tensors from the workers that live, else from the file; the names of those that are lost."""
        missing = {name for name, _ in named_tensors(module) if name not in self._held.get(0, ())}
        if not self._held.get(0):
            return []  # nothing has left this process yet
        self._note_losses()
        if self._broken is not None:
            self._regroup()
        for rank, connection in self._connections():
            if connection.is_gone or not missing:
                continue
            names = tuple(name for name in sorted(missing) if name in self._held.get(rank, ()))
            missing -= self._fetch(rank, connection, module, names)
        return self._read_from_file(module, missing)

    def _fetch(
        self, rank: int, connection: WorkerConnection, module: nn.Module, names: tuple[str, ...]
    ) -> set[str]:
        if not names:
            return set()
        transport, specs = self._transport, {name: tensor_spec(tensor) for name, tensor in named_tensors(module)}
        assert transport is not None
        position = self._members.index(rank)
        self._note_progress("fetching its weights")
        try:
            connection.send(ReturnWeights(self._session, names))
            pending = [
                (name, transport.receive(position, Parcel(Stream.WEIGHTS, name), specs[name])) for name in names
            ]
            assign_tensors(module, {name: leaf.wait() for name, leaf in pending})
            connection.reply(self._session, "returning its weights")
        except WorkerError as error:
            self._broken = error
            return set()
        return set(names)

    def _regroup(self) -> None:
        """After a loss: give up the stalled worker, and form a new transport among the survivors."""
        assert self._broken is not None
        lost = self._workers.connections.get(self._broken.rank)
        if lost is not None and not lost.is_gone:
            self._workers.kill(lost.rank)
            lost.close()
        survivors = tuple(rank for rank, connection in self._connections() if not connection.is_gone)
        for rank in survivors:
            self._workers.connections[rank].clear_failure(self._session)
        self._members = (0,)
        if survivors:
            self._join((0, *survivors))

    def _read_from_file(self, module: nn.Module, missing: set[str]) -> list[str]:
        checkpoint = find_checkpoint(module)
        specs = dict(named_tensors(module))
        found: dict[str, torch.Tensor] = {}
        for name in missing:
            tensor = checkpoint.read_like(name, specs[name], self._checksums[name]) if checkpoint else None
            if tensor is not None:
                found[name] = tensor.to(self._device)
        assign_tensors(module, found)
        return sorted(missing - set(found))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for _, connection in self._connections():
            with suppress(WorkerError):  # it ended first
                connection.send(CloseSession(self._session))
        if self._transport is not None:
            self._transport.close()
        self._workers.close()
        self._interpreter = self._replica = self._replica_module = self._transport = None

    # -- talking to all workers --------------------------------------------------------------------------------

    def _connections(self) -> list[tuple[int, WorkerConnection]]:
        return [(rank, self._workers.connections[rank]) for rank in range(1, len(self._devices))]

    def _send_all(self, message: object) -> None:
        for _, connection in self._connections():
            connection.send(message)

    def _await_replies(self, operation: str, ranks: Collection[int] | None = None) -> dict[int, WorkerReport]:
        return {
            rank: connection.reply(self._session, operation)
            for rank, connection in self._connections()
            if ranks is None or rank in ranks
        }
