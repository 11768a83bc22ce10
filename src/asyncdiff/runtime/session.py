"""A worker's side of one handle: it holds one stage and carries out the rounds the driver sends."""

from __future__ import annotations

import importlib
import threading
import traceback
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from asyncdiff.graph import TensorSpec
from asyncdiff.protocol.messages import (
    Collect,
    Condition,
    Failure,
    InlineInput,
    InstallSkeleton,
    JoinTransport,
    OpenSession,
    PrepareStage,
    ReceiveWeights,
    Reply,
    ReturnWeights,
    RoundMessage,
    TransferredInput,
)
from asyncdiff.runtime.allocator import keep_freed_memory, return_freed_memory
from asyncdiff.runtime.awaited import Delivery
from asyncdiff.runtime.executor import process_report
from asyncdiff.runtime.interpreter import RoundTask, StageInterpreter
from asyncdiff.runtime.link import Parcel, Pending, Stream
from asyncdiff.runtime.transport import Transport, open_transport
from asyncdiff.schedule.rounds import unpacked
from asyncdiff.stage import StageReplica
from asyncdiff.trace.tensors import no_gradients
from asyncdiff.weights import (
    Skeleton,
    assign_tensors,
    load_skeleton,
    named_tensors,
    resident_bytes,
    undressed,
)
from asyncdiff.weights.ownership import tensor_of, tensor_spec

STORE_TIMEOUT = timedelta(seconds=60)


class WorkerSession:
    """`report` sends a message to the driver."""

    def __init__(self, opening: OpenSession, report: Callable[[object], None]) -> None:
        self._opening = opening
        self._report = report
        self._device = torch.device(opening.device)
        self._store: dist.Store | None = None
        self._transport: Transport | None = None
        self._module: torch.nn.Module | None = None
        self._interpreter: StageInterpreter | None = None
        self._replica: StageReplica | None = None
        self._inputs: dict[tuple[int, Hashable], dict[str, torch.Tensor]] = {}
        self._aborted: set[int] = set()
        self._abort_noted = threading.Condition()
        self._transport_is_lost = False
        self._preloading = threading.Thread(target=_preload, args=(opening.preload,), daemon=True)
        self._handlers: dict[type, Callable[[Any], Any]] = {
            JoinTransport: self._join,
            InstallSkeleton: self._install,
            ReceiveWeights: self._receive_weights,
            ReturnWeights: self._return_weights,
            PrepareStage: self._prepare,
            Collect: self._collect,
        }

    def open(self) -> None:
        """Take the device, so that a wrong one is reported before anything else happens."""
        if self._opening.threads is not None:
            torch.set_num_threads(self._opening.threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        else:
            keep_freed_memory()
        torch.empty(1, device=self._device)
        self._preloading.start()

    def abort_run(self, run: int, *, transport_is_lost: bool) -> None:
        """Called from the control thread: rounds of this run are skipped from now on."""
        with self._abort_noted:
            self._aborted.add(run)
            self._transport_is_lost = self._transport_is_lost or transport_is_lost
            self._abort_noted.notify_all()

    def handle(self, message: Any) -> None:
        """Carry out one message; what goes wrong is reported to the driver, and the session stays usable."""
        if isinstance(message, RoundMessage):
            self._round(message)
            return
        try:
            answer = self._handlers[type(message)](message)
        except Exception as error:  # noqa: BLE001 (reported to the driver, which raises it)
            self._report(self._failure(error, type(message).__name__))
        else:
            self._report(Reply(self._opening.session, answer))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._module = self._interpreter = self._replica = self._transport = None
        self._inputs.clear()
        return_freed_memory()

    # -- requests --

    def _join(self, message: JoinTransport) -> None:
        if self._store is None:
            host, port = self._opening.store
            self._store = dist.TCPStore(host, port, is_master=False, timeout=STORE_TIMEOUT)
        if self._transport is not None:
            self._transport.close()
        self._transport_is_lost = False
        self._transport = open_transport(
            message.backend,
            dist.PrefixStore(message.prefix, self._store),
            message.ranks.index(self._opening.rank),
            len(message.ranks),
            self._opening.device,
            local=message.local,
            watch=self._watch,
        )
        if self._interpreter is not None:
            self._interpreter.relink(self._transport)

    def _watch(self) -> None:
        """Called while a tensor is waited for: raise if it will never come."""
        if self._transport_is_lost:
            raise RuntimeError("another worker is gone")

    def _install(self, message: InstallSkeleton) -> None:
        held = dict(named_tensors(self._module)) if self._module is not None and message.keeps_weights else {}
        held = {name: tensor for name, tensor in held.items() if tensor.device.type != "meta"}
        with self._abort_noted:  # a run that is under way begins afresh, whatever became of its rounds so far
            self._aborted.clear()
        self._inputs.clear()
        self._module = self._replica = self._interpreter = None  # other weights need the room of these
        self._preloading.join()
        skeleton: Skeleton = message.skeleton
        self._module = load_skeleton(skeleton, held, self._device)
        self._replica = StageReplica(self._module, device=self._device, execution=message.execution)
        assert self._transport is not None
        self._interpreter = StageInterpreter(
            self._opening.rank, message.rank_stages, self._replica, self._transport, self._device
        )

    def _receive_weights(self, message: ReceiveWeights) -> None:
        assert self._transport is not None
        assert self._module is not None
        pending = [
            (name, self._transport.receive(0, Parcel(Stream.WEIGHTS, name), spec))
            for name, spec in message.tensors
        ]
        if message.from_file:
            read = message.checkpoint.read(message.from_file, self._device)
            assign_tensors(self._module, read)
        assign_tensors(self._module, {name: leaf.wait() for name, leaf in pending})

    def _return_weights(self, message: ReturnWeights) -> None:
        assert self._transport is not None
        assert self._module is not None
        held = {name: undressed(tensor) for name, tensor in named_tensors(self._module)}
        for name in message.names:
            self._transport.send(0, Parcel(Stream.WEIGHTS, name), held[name], tensor_spec(held[name]))

    def _prepare(self, message: PrepareStage) -> None:
        assert self._replica is not None
        assert self._interpreter is not None
        self._replica.prepare(message.key, message.spec)
        self._interpreter.wire(message.key, message.wiring)
        for key in message.discarded:
            self._interpreter.discard(key)

    def _collect(self, message: Collect) -> Any:
        assert self._interpreter is not None
        assert self._module is not None
        return process_report(self._interpreter.take_records(message.run), resident_bytes(self._module))

    # -- rounds --

    def _round(self, message: RoundMessage) -> None:
        interpreter = self._interpreter
        assert interpreter is not None
        for run in message.ended_runs:
            self._forget(run)
        try:
            task = self._task(message)
            if message.is_void or message.info.run in self._aborted:
                interpreter.skip_round(task)
            else:
                with no_gradients():
                    interpreter.run_round(task)
        except Exception as error:  # noqa: BLE001 (reported to the driver, which raises it)
            step, operation = interpreter.where
            if message.info.run not in self._aborted:
                self._report(self._failure(error, operation, step=step, run=message.info.run))
                self._await_abort(message.info.run)
            interpreter.settle()

    def _task(self, message: RoundMessage) -> RoundTask:
        """The task with its inputs, each received into memory of its own or kept from an earlier call."""
        held = self._inputs.setdefault((message.info.run, message.info.channel), {})
        arriving: dict[str, Pending] = {}
        for item in message.inputs:
            if isinstance(item, InlineInput):
                held[item.name] = tensor_of(item.spec, item.data)
            elif isinstance(item, TransferredInput):
                assert self._transport is not None
                pending = self._transport.receive(0, Parcel(Stream.INPUT, item.name), item.spec)
                if item.is_late:
                    held[item.name] = _awaited(pending, item.spec, self._device)
                else:
                    arriving[item.name] = pending
        held.update({name: pending.wait() for name, pending in arriving.items()})
        info = message.info
        if info.conditions:
            info = replace(info, conditions={step: _received(each) for step, each in info.conditions.items()})
        tensors = {item.name: held[item.name] for item in message.inputs}
        return RoundTask(info, unpacked(message.ops), tensors)

    def _await_abort(self, run: int) -> None:
        with self._abort_noted:
            self._abort_noted.wait_for(lambda: run in self._aborted)

    def _forget(self, run: int) -> None:
        assert self._interpreter is not None
        self._interpreter.end_runs((run,))
        self._inputs = {key: held for key, held in self._inputs.items() if key[0] != run}
        self._aborted.discard(run)

    def _failure(
        self, error: Exception, operation: str, *, step: int | None = None, run: int | None = None
    ) -> Failure:
        stage = self._interpreter.stage if self._interpreter is not None else None
        return Failure(
            session=self._opening.session,
            message=f"{type(error).__name__}: {error}",
            details="".join(traceback.format_exception(error)),
            operation=operation,
            stage=stage,
            step=step,
            run=run,
        )


def _received(condition: Condition) -> Condition:
    timestep = condition.timestep
    if not isinstance(timestep, InlineInput):
        return condition
    return replace(condition, timestep=tensor_of(timestep.spec, timestep.data))


def _awaited(pending: Pending, spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """Whoever needs its elements waits for it."""
    (tensor,) = Delivery(lambda: [pending.wait()]).tensors([spec], device)
    return tensor


def _preload(modules: tuple[str, ...]) -> None:
    with suppress(ImportError):  # rebuilding the denoiser will say what is missing
        for name in modules:
            importlib.import_module(name)
