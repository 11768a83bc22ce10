"""The driver's side: rank 0 in this process, every other rank in a worker."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from asyncdiff.errors import ParallelizedError, WorkerError
from asyncdiff.graph.wiring import Wiring
from asyncdiff.protocol.messages import (
    AbortRun,
    CloseSession,
    Collect,
    InstallSkeleton,
    JoinTransport,
    OpenSession,
    PrepareStage,
    ReceiveWeights,
    ReturnWeights,
    RoundMessage,
    WorkerReport,
)
from asyncdiff.runtime.allocator import return_freed_memory
from asyncdiff.runtime.awaited import arrived
from asyncdiff.runtime.control import Doing, WorkerConnection, WorkerLostError
from asyncdiff.runtime.executor import RoundCall, process_report, refuse_aborted
from asyncdiff.runtime.interpreter import StageInterpreter
from asyncdiff.runtime.interrupts import interrupts_deferred
from asyncdiff.runtime.link import Parcel, Stream
from asyncdiff.runtime.lookahead import Announcement, announce
from asyncdiff.runtime.round_sender import RoundSender
from asyncdiff.runtime.session import STORE_TIMEOUT
from asyncdiff.runtime.transport import Transport, choose_backend, open_transport
from asyncdiff.stage import AS_THEY_ARE, BlockExecution, StageReplica, StageSpec
from asyncdiff.weights import (
    Skeleton,
    Unloaded,
    assign_tensors,
    find_checkpoint,
    free_tensors,
    load_skeleton,
    named_tensors,
    read_unloaded,
    resident_bytes,
    undressed,
)
from asyncdiff.weights.ownership import tensor_spec
from asyncdiff.weights.source import checksum

_SETTLE_S = 0.3
# Wrong guesses of a run, each of which makes a round of some workers be run twice.
_MOST_UNFORESEEN = 3
_session_numbers = itertools.count()


@dataclass
class WorkerUsers:
    """Who uses the same workers: the denoisers of a pipeline, and all handles of a torchrun job.

    `lock`: held while one of them asks for anything, because they take turns: calls that reached the workers
    in different orders would wait for each other for ever, and one may have to end what another has left
    undone. `executors`: those that are not closed.
    """

    lock: threading.RLock = field(default_factory=threading.RLock)
    executors: list[RemoteExecutor] = field(default_factory=list)


class Workers(Protocol):
    """Started worker processes: spawned ones of this handle, or the other ranks of torchrun."""

    connections: dict[int, WorkerConnection]
    is_local: bool
    users: WorkerUsers

    def kill(self, rank: int) -> None: ...

    def close(self) -> None: ...


class RemoteExecutor:
    """Drives a group of workers and is its rank 0. `devices[r]`, `threads[r]`: of rank r in the group.

    `members`: the workers' numbers among all that were started, those of ranks 1, 2 ...; None: 1, 2 ...
    `host`: the address under which other machines' workers reach the store here. `preload`: modules
    that the denoiser will need, which workers import until it comes (diffusers takes seconds). `unloaded`:
    weights that every process reads from the file itself, its own only.
    """

    def __init__(
        self,
        workers: Workers,
        devices: list[str],
        threads: list[int | None],
        *,
        members: Sequence[int] | None = None,
        host: str = "127.0.0.1",
        preload: tuple[str, ...] = (),
        unloaded: Unloaded | None = None,
        execution: BlockExecution = AS_THEY_ARE,
    ) -> None:
        self._workers = workers
        self._numbers = (0, *(range(1, len(devices)) if members is None else members))
        self._execution = execution
        self._unloaded = unloaded
        self._rank_stages: tuple[int | None, ...] = ()
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
        self._sender = RoundSender(self._session, self._device, self._failing)
        self._announcement: Announcement | None = None
        self._unforeseen: Counter[int] = Counter()  # how often a run did not go on as announced
        self._runs: set[int] = set()
        self._aborted: set[int] = set()
        self._ended: tuple[int, ...] = ()
        self._progress_s = time.monotonic()
        self._doing = Doing("starting")
        self._lost: dict[int, WorkerLostError] = {}
        self._broken: Exception | None = None
        self._closed = False
        with workers.users.lock:
            workers.users.executors.append(self)
            try:
                self._open(threads, host, preload)
            except BaseException:
                self.close()
                raise

    # -- setting up --

    def _open(self, threads: list[int | None], host: str, preload: tuple[str, ...]) -> None:
        self._end_announced_by_others()
        numbers = {}
        for rank, connection in self._connections():
            connection.open_session(self._session)
            opening = OpenSession(
                session=self._session,
                rank=rank,
                device=self._devices[rank],
                threads=threads[rank],
                store=(host, self._store.port),
                preload=preload,
            )
            numbers[rank] = connection.request(self._session, opening)
        self._await_replies(numbers, "waiting for it to open its device")
        self._join(tuple(range(len(self._devices))))

    def _join(self, ranks: tuple[int, ...]) -> None:
        """Form the data transport among these ranks; the rank within it is the position in `ranks`."""
        places = [(self._host_of(rank), self._devices[rank]) for rank in ranks]
        backend = choose_backend(places, local=self._workers.is_local)
        prefix = f"asyncdiff/{self._session}/{next(self._prefixes)}"
        message = JoinTransport(self._session, ranks, backend, prefix, self._workers.is_local)
        numbers = self._request({rank: message for rank in ranks if rank != 0})
        if self._transport is not None:
            self._transport.close()
        self._note_progress("joining it in a transport")
        self._transport = open_transport(
            backend,
            dist.PrefixStore(prefix, self._store),
            0,
            len(ranks),
            self._devices[0],
            local=self._workers.is_local,
            watch=self._watch,
        )
        self._sender.transport = self._transport
        self._members = ranks
        self._await_replies(numbers, "joining it in a transport")

    def _host_of(self, rank: int) -> str:
        return "" if rank == 0 or self._workers.is_local else self._connection(rank).host

    def install(
        self,
        module: nn.Module,
        skeleton: Skeleton,
        rank_stages: tuple[int | None, ...],
        held: Mapping[int, Collection[str]],
    ) -> None:
        """Ship each stage its own tensors from the live module, then free in this process what is not ours.

        Not interruptible, and if it fails the weights stay or are fetched back by `restore`, but nothing
        runs.
        """
        try:
            with interrupts_deferred():
                self._install(module, skeleton, rank_stages, held)
                return_freed_memory()  # of what was shipped
        except Exception as error:
            self._note_loss(error)
            self._broken = error
            raise

    def _install(
        self,
        module: nn.Module,
        skeleton: Skeleton,
        rank_stages: tuple[int | None, ...],
        held: Mapping[int, Collection[str]],
    ) -> None:
        self._end_all_announced()  # before anything is forgotten that it needs
        self._needed.clear()
        self._sender.forget_all()
        self._rank_stages = rank_stages
        for rank, connection in self._connections():
            connection.set_stage(self._session, self._stage_of(rank))
        message = InstallSkeleton(
            self._session,
            skeleton,
            rank_stages,
            keeps_weights=bool(self._held),
            execution=self._execution,
        )
        numbers = self._request({rank: message for rank, _ in self._connections()})
        self._await_replies(numbers, "waiting for it to rebuild the denoiser")
        self._ship(module, held)
        if rank_stages[0] is not None:
            self._keep_own(module, skeleton, held[rank_stages[0]])
        assert self._transport is not None
        self._interpreter = StageInterpreter(
            0, self._rank_stages, self._replica, self._transport, self._device
        )

    def let_go(self, module: nn.Module) -> None:
        with interrupts_deferred():
            self._held[0] = set()
            free_tensors(module, [name for name, _ in named_tensors(module)])

    def _keep_own(self, module: nn.Module, skeleton: Skeleton, names: Collection[str]) -> None:
        """Of the live module only the tensors of this process's stage, which is made from them."""
        self._held[0] = set(names)
        self._read_unloaded(module, self._held[0])
        own = {name: tensor for name, tensor in named_tensors(module) if name in self._held[0]}
        free_tensors(module, [name for name in skeleton.specs if name not in own])
        self._replica_module = load_skeleton(skeleton, own, self._device)
        self._replica = StageReplica(self._replica_module, device=self._device, execution=self._execution)

    def _ship(self, module: nn.Module, held: Mapping[int, Collection[str]]) -> None:
        tensors = {name: undressed(tensor) for name, tensor in named_tensors(module)}
        assert self._transport is not None
        numbers = {}
        self._note_progress("shipping its weights")
        for rank, connection in self._connections():
            wanted = set(held[self._stage_of(rank)]) - self._held.get(rank, set())
            from_file = wanted & self._unloaded.names if self._unloaded else set()
            names = [name for name in tensors if name in wanted - from_file]
            specs = tuple((name, tensor_spec(tensors[name])) for name in names)
            read = {name: tensor_spec(tensors[name]) for name in sorted(from_file)}
            checkpoint = self._unloaded.checkpoint if self._unloaded else None
            numbers[rank] = connection.request(
                self._session, ReceiveWeights(self._session, specs, checkpoint, read)
            )
            for name in names:
                self._checksums.setdefault(name, checksum([tensors[name]]))
                self._transport.send(
                    rank, Parcel(Stream.WEIGHTS, name), tensors[name], tensor_spec(tensors[name])
                )
            self._held[rank] = self._held.get(rank, set()) | wanted
        self._await_replies(numbers, "shipping its weights")

    def _read_unloaded(self, module: nn.Module, names: Collection[str]) -> set[str]:
        """Read those of the names that have never been in memory; which they are."""
        return set() if self._unloaded is None else read_unloaded(module, self._unloaded, self._device, names)

    def prepare(
        self, key: int, specs: Mapping[int, StageSpec], wiring: Wiring, discarded: tuple[int, ...] = ()
    ) -> None:
        self._refuse_if_broken()
        interpreter = self._interpreter
        assert interpreter is not None
        numbers = self._request(
            {
                rank: PrepareStage(self._session, key, specs[self._stage_of(rank)], wiring, discarded)
                for rank, _ in self._connections()
            }
        )
        if self._replica is not None:
            self._replica.prepare(key, specs[self._stage_of(0)])
        interpreter.wire(key, wiring)
        self._needed[key] = {stage: tuple(spec.needed_inputs) for stage, spec in specs.items()}
        for old in discarded:
            interpreter.discard(old)
            self._needed.pop(old, None)
        self._await_replies(numbers, "waiting for it to prepare its stage")

    # -- rounds --

    def run_round(self, call: RoundCall) -> None:
        """Workers that can are told of the round after this one too (see `_announce`)."""
        step = call.round.first_step
        self._refuse_if_broken(step)
        refuse_aborted(call.info.run, self._aborted)
        interpreter = self._interpreter
        assert interpreter is not None
        self._note_progress("waiting for what its own stage reads", step)
        with self._failing(call.info.run):
            self._end_announced_by_others()
            if self._rank_stages[0] is not None:
                # Not while the own stage computes: it may be waiting for a worker that waits for them.
                self._await_inputs(call)
            with interrupts_deferred():  # once one worker has its part of a round, all must have theirs
                told = self._told_already(call)
                self._begin(call.info.run)
                for rank, connection in self._connections():
                    if call.round.ops[rank] and rank not in told:
                        self._send_round(rank, connection, call)
                self._ended = ()
                task = call.task(0)
                interpreter.post(task)
                following = None if call.following is None else call.following()
                if following is not None:
                    self._announce(following)
            interpreter.compute(task)

    def end_runs(self, runs: tuple[int, ...]) -> None:
        """The workers hear of it with the next round, but a failure in what is left of them is of no
        interest from now on."""
        with interrupts_deferred():
            if self._announcement is not None and self._announcement.call.info.run in runs:
                with suppress(WorkerLostError, RuntimeError):  # whoever asks it for something next is told
                    self._end_announced()
            self._ended += runs
            self._aborted.difference_update(runs)
            for run in runs:
                self._forget(run)

    def foretell(self, call: RoundCall) -> None:
        run = call.info.run
        self._refuse_if_broken(call.round.first_step)
        with self._failing(run), interrupts_deferred():
            self._end_all_announced()
            if run not in self._aborted:
                self._begin(run)
                self._announce(call, may_wait=True)

    def abandon(self, run: int) -> None:
        with interrupts_deferred():
            if run in self._runs:
                self._abort(run)

    def prediction(self, run: int, channel: Hashable, step: int) -> list[torch.Tensor]:
        self._refuse_if_broken(step)
        assert self._interpreter is not None
        with self._failing(run):
            self._sender.send_late()
            self._note_progress("waiting for the prediction", step)
            return self._interpreter.prediction(run, channel, step)

    def _begin(self, run: int) -> None:
        if run not in self._runs:
            self._runs.add(run)
            for _, connection in self._connections():
                connection.begin_run(self._session, run)

    def _forget(self, run: int) -> None:
        """The run is over, as far as this process is concerned."""
        if run not in self._runs:
            return
        self._runs.discard(run)
        self._unforeseen.pop(run, None)
        for _, connection in self._connections():
            connection.end_run(self._session, run)
        assert self._interpreter is not None
        self._interpreter.end_runs((run,))
        self._sender.forget(run)

    def _send_round(self, rank: int, connection: WorkerConnection, call: RoundCall) -> None:
        self._sender.send(rank, connection, call, self._needed_by(rank, call), self._ended)

    def _needed_by(self, rank: int, call: RoundCall) -> tuple[str, ...]:
        return self._needed[call.info.key][self._stage_of(rank)]

    def _await_inputs(self, call: RoundCall) -> None:
        """Wait for those inputs of the workers that are still being computed."""
        for rank, _ in self._connections():
            if call.round.ops[rank]:
                for name in self._needed_by(rank, call):
                    arrived(call.tensors[name])

    # -- the round after this one --

    def _announce(self, call: RoundCall, *, may_wait: bool = False) -> None:
        """Tell the workers that can of the next round: they do their part of it while the noise scheduler is
        at work here. `may_wait` as in `Announcement`."""
        if self._unforeseen[call.info.run] >= _MOST_UNFORESEEN:
            return
        announcement = announce(call, self._needed[call.info.key], self._rank_stages, may_wait=may_wait)
        if announcement is not None and (may_wait or self._needs_no_transfer(announcement)):
            self._announcement = announcement
            for rank, connection in self._connections():
                if rank in self._announcement.ranks:
                    self._send_round(rank, connection, call)

    def _needs_no_transfer(self, announcement: Announcement) -> bool:
        """What is transferred now would come before the states of the round that this process is about to
        compute, where a transport has one order for everything. An input that has changed since the last
        round of a half of guidance that is left out would have to be."""
        call = announcement.call
        return all(
            self._sender.needs_no_transfer(rank, call, self._needed_by(rank, call))
            for rank in announcement.ranks
        )

    def _told_already(self, call: RoundCall) -> frozenset[int]:
        """The ranks that the round has been announced to. If something else was announced, it is over."""
        announcement = self._announcement
        if announcement is None:
            return frozenset()
        if announcement.came_true(call):
            self._announcement = None
            return announcement.ranks
        self._unforeseen[announcement.call.info.run] += 1
        self._end_announced()
        return frozenset()

    def _end_announced(self) -> None:
        """What was announced does not happen, or in another way: all take part in its transfers, for those
        that were told may have computed it."""
        announcement, self._announcement = self._announcement, None
        if announcement is None or self._interpreter is None:
            return
        call = announcement.call
        for rank, connection in self._connections():
            if call.round.ops[rank] and rank not in announcement.ranks and not connection.is_gone:
                connection.send(
                    RoundMessage(self._session, call.info, call.round.packed[rank], inputs=(), is_void=True)
                )
        self._interpreter.skip_round(call.task(0), self._lost)

    def _end_all_announced(self) -> None:
        """Workers that went ahead may be waiting for this process, and hear of nothing else until then."""
        self._end_announced()
        self._end_announced_by_others()

    def _end_announced_by_others(self) -> None:
        for executor in self._others():
            with suppress(WorkerLostError, RuntimeError):  # its user is told when it asks for something
                executor._end_announced()

    def _others(self) -> list[RemoteExecutor]:
        """Those that have workers in common with this one."""
        own = set(self._numbers[1:])
        return [
            executor
            for executor in self._workers.users.executors
            if executor is not self and not own.isdisjoint(executor._numbers)
        ]

    # -- what goes wrong --

    def _failing(self, run: int) -> _Failing:
        """Whatever interrupts a round (a failure, Ctrl-C), leave every rank ready for the next run."""
        return _Failing(self, run)

    def _fail(self, run: int, error: BaseException) -> None:
        with interrupts_deferred():
            cause = self._explain(error)
            self._note_loss(cause)
            self._abort(run)
        if cause is not error:
            raise cause from error

    def _explain(self, error: BaseException) -> BaseException:
        """A transfer that broke because a worker died says so; an exception of our own stage says where."""
        if isinstance(error, WorkerLostError) and error.step is None:
            return self._workers.connections[error.rank].lost(self._session, self._doing)
        if isinstance(error, WorkerError) or not isinstance(error, Exception):
            return error
        deadline = time.monotonic() + _SETTLE_S
        while isinstance(error, RuntimeError) and time.monotonic() < deadline:
            for _, connection in self._connections():
                if connection.is_gone:
                    return connection.lost(self._session, self._doing)
            time.sleep(0.02)
        assert self._interpreter is not None
        step, operation = self._interpreter.where
        of_stage = "" if self._rank_stages[0] is None else f", stage {self._rank_stages[0]}"
        return WorkerError(
            f"The driver (rank 0{of_stage}) failed at step {step} in {operation}: "
            f"{type(error).__name__}: {error}",
            rank=0,
            stage=self._rank_stages[0],
            step=step,
            operation=operation,
        )

    def _abort(self, run: int) -> None:
        """Tell the workers to compute nothing more for the run, and fill what this rank owes them."""
        for _, connection in self._connections():
            if not connection.is_gone:
                try:
                    connection.send(AbortRun(self._session, run, transport_is_lost=self._broken is not None))
                except WorkerLostError as error:
                    self._note_loss(error)
        self._sender.fill_late(self._lost)
        assert self._interpreter is not None
        self._interpreter.settle(self._lost)
        with suppress(WorkerLostError, RuntimeError):  # a transport that broke is given up as a whole
            self._end_announced()
        self._forget(run)
        self._aborted.add(run)

    def _watch(self) -> None:
        """Called while a transfer is waited for: raise if a worker failed, died or stalled.

        A death is reported before the failures it causes in other workers, which may be noticed first.
        """
        self._release_workers()
        connections = [connection for rank, connection in self._connections() if rank not in self._lost]
        if any(connection.failure(self._session) is not None for connection in connections):
            time.sleep(_SETTLE_S)
        for connection in sorted(connections, key=lambda connection: not connection.is_gone):
            waited_s = time.monotonic() - self._progress_s
            connection.check(self._session, waited_s=waited_s, doing=self._doing)

    def _release_workers(self) -> None:
        """A worker that failed in what was left of another user's rounds, when nobody waited for them any
        more, waits for their run to be aborted, and what is asked of it now waits behind that."""
        for executor in self._others():
            executor._abort_failed_run()

    def _abort_failed_run(self) -> None:
        for _, connection in self._connections():
            failure = connection.failure(self._session)
            if failure is not None and failure.run is not None:
                with interrupts_deferred():
                    self._abort(failure.run)

    def _note_progress(self, operation: str, step: int | None = None) -> None:
        self._progress_s = time.monotonic()
        self._doing = Doing(operation, step)

    def _note_loss(self, error: BaseException) -> None:
        if isinstance(error, WorkerLostError) and error.rank in self._numbers:
            self._lost.setdefault(self._numbers.index(error.rank), error)
            self._broken = self._broken or error

    def _refuse_if_broken(self, step: int | None = None) -> None:
        """A worker that died while nothing was asked of it is named first; after that, the way out is."""
        if self._broken is not None:
            raise ParallelizedError(
                f"This denoiser cannot run any more. Call handle.remove(), then parallelize again. What "
                f"happened: {self._broken}"
            ) from self._broken
        for _, connection in self._connections():
            if connection.is_gone:
                error = connection.lost(self._session, Doing("idle", step))
                self._note_loss(error)
                raise error

    # -- ending --

    def reports(self, run: int | None) -> list[WorkerReport]:
        self._refuse_if_broken()
        assert self._interpreter is not None
        numbers = self._request({rank: Collect(self._session, run) for rank, _ in self._connections()})
        weight_bytes = 0 if self._replica_module is None else resident_bytes(self._replica_module)
        own = process_report(self._interpreter.take_records(run), weight_bytes)
        answers = self._await_replies(numbers, "waiting for its report")
        if self._workers.is_local:  # one clock for all processes of a host
            return [own, *answers.values()]
        return [
            own,
            *(_at_our_clock(report, self._connection(rank)) for rank, report in answers.items()),
        ]

    def restore(self, module: nn.Module) -> list[str]:
        """Fetch freed tensors from the workers that live, else from the file; the names of those that are
        lost. If none is, `install` may be called again.
        """
        if 0 not in self._held:  # nothing has left this process yet
            self._read_unloaded(module, [name for name, _ in named_tensors(module)])
            self._unloaded = None
            return []
        missing = {name for name, _ in named_tensors(module) if name not in self._held[0]}
        with interrupts_deferred():  # a second call could not fetch what the first one left behind
            self._end_all_runs()
            missing = self._fetch_from_all(module, missing)
            lost = self._read_from_file(module, missing)
            if not lost:
                self._held.clear()
                self._checksums.clear()
                self._unloaded = None
            return lost

    def rescue(self, module: nn.Module, names: Collection[str]) -> list[str]:
        with interrupts_deferred():
            self._end_all_runs()
            return sorted(self._fetch_from_all(module, set(names)))

    def release(self) -> None:
        with interrupts_deferred():
            self._end_all_runs()
            self._held.clear()
            self._checksums.clear()
            self._unloaded = None

    def _end_all_runs(self) -> None:
        """A worker that fails in what is left of them still holds its weights."""
        with suppress(WorkerLostError, RuntimeError):
            self._end_announced()
        self._end_announced_by_others()
        for run in tuple(self._runs):
            self._forget(run)

    def _fetch_from_all(self, module: nn.Module, missing: set[str]) -> set[str]:
        """Those of the names that no worker had."""
        for rank, connection in self._connections():
            if missing:
                missing = missing - self._fetch(
                    rank, connection, module, missing & self._held.get(rank, set())
                )
        return missing

    def _fetch(
        self, rank: int, connection: WorkerConnection, module: nn.Module, names: Collection[str]
    ) -> set[str]:
        """Receive the named tensors from a worker into the module; none from one that is lost on the way."""
        try:
            self._regroup()
            if rank in self._lost or not names:
                return set()
            self._note_progress("fetching its weights")
            specs = {name: tensor_spec(tensor) for name, tensor in named_tensors(module) if name in names}
            number = connection.request(self._session, ReturnWeights(self._session, tuple(specs)))
            assert self._transport is not None
            position = self._members.index(rank)
            pending = [
                (name, self._transport.receive(position, Parcel(Stream.WEIGHTS, name), spec))
                for name, spec in specs.items()
            ]
            assign_tensors(module, {name: leaf.wait() for name, leaf in pending})
            self._await_replies({rank: number}, "fetching its weights")
        except (WorkerError, RuntimeError) as error:  # RuntimeError: a transfer that broke
            self._note_loss(self._explain(error))
            return set()
        return set(specs)

    def _regroup(self) -> None:
        """After a loss: give up the lost workers for good, and form a new transport among the others."""
        for _, connection in self._connections():
            if connection.is_gone:
                self._note_loss(connection.lost(self._session, Doing("fetching its weights")))
        if self._lost.keys().isdisjoint(self._members):
            return
        for rank in self._lost:
            if rank in self._members and not self._connection(rank).is_gone:
                self._workers.kill(self._numbers[rank])
                self._connection(rank).close()
        survivors = tuple(rank for rank, _ in self._connections() if rank not in self._lost)
        self._members = (0,)
        if survivors:
            self._join((0, *survivors))

    def _read_from_file(self, module: nn.Module, missing: set[str]) -> list[str]:
        missing = missing - self._read_unloaded(module, missing)
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
        """End the session; the workers stay."""
        if self._closed:
            return
        self._closed = True
        with interrupts_deferred(), self._workers.users.lock:
            self._workers.users.executors.remove(self)
            with suppress(WorkerLostError, RuntimeError):
                self._end_announced()
            for _, connection in self._connections():
                with suppress(WorkerError):  # it ended first
                    connection.send(CloseSession(self._session))
                connection.close_session(self._session)
            if self._transport is not None:
                self._transport.close()
        self._interpreter = self._replica = self._replica_module = self._transport = None
        self._sender.transport = None
        self._sender.forget_all()

    # -- talking to all workers --

    def _connections(self) -> list[tuple[int, WorkerConnection]]:
        return [
            (rank, self._connection(rank))
            for rank, number in enumerate(self._numbers)
            if number in self._workers.connections
        ]

    def _connection(self, rank: int) -> WorkerConnection:
        return self._workers.connections[self._numbers[rank]]

    def _stage_of(self, rank: int) -> int:
        stage = self._rank_stages[rank]
        assert stage is not None, "only the driver may hold no stage"
        return stage

    def _request(self, messages: Mapping[int, object]) -> dict[int, int]:
        """Send each rank its message; the numbers of the requests."""
        self._end_all_announced()
        return {
            rank: self._connection(rank).request(self._session, message) for rank, message in messages.items()
        }

    def _await_replies(self, numbers: Mapping[int, int], operation: str) -> dict[int, Any]:
        """The answers to the requests, by rank."""
        return {
            rank: self._connection(rank).reply(
                self._session, number, Doing(operation), meanwhile=self._release_workers
            )
            for rank, number in numbers.items()
        }


class _Failing:
    """No function with `yield`: that takes three times as long, at every step."""

    def __init__(self, executor: RemoteExecutor, run: int) -> None:
        self._executor = executor
        self._run = run

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._executor._fail(self._run, error)


def _at_our_clock(report: WorkerReport, connection: WorkerConnection) -> WorkerReport:
    """The report of another host's worker with its times on the clock of this process."""
    offset_s = connection.clock_offset_s
    return replace(
        report,
        rounds=tuple(
            replace(
                record,
                spans=tuple(
                    (name, kind, start - offset_s, end - offset_s) for name, kind, start, end in record.spans
                ),
            )
            for record in report.rounds
        ),
    )
