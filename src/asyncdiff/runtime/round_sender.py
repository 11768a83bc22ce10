"""What a worker is told of a round: one control message, and the denoiser inputs that it does not have yet.

An input that stays the same crosses once a run. A small one is in the message itself, any other follows it;
one that is still being computed follows when it is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from asyncdiff.graph import TensorSpec
from asyncdiff.protocol.messages import (
    Condition,
    InlineInput,
    InputItem,
    KeptInput,
    RoundInfo,
    RoundMessage,
    TransferredInput,
)
from asyncdiff.runtime.awaited import arrived, open_delivery
from asyncdiff.runtime.control import WorkerConnection
from asyncdiff.runtime.executor import RoundCall
from asyncdiff.runtime.interrupts import interrupts_deferred
from asyncdiff.runtime.link import Parcel, Stream
from asyncdiff.runtime.lookahead import version_of
from asyncdiff.runtime.transport import Transport
from asyncdiff.schedule.ops import Compute, Op
from asyncdiff.weights.ownership import bytes_of, dense_spec, empty_tensor, tensor_spec

_INLINE_BYTES = 1024
_Receiver: TypeAlias = tuple[int, int, Hashable]  # rank, run and channel


@dataclass(frozen=True)
class _LateInput:
    """An input that a rank has been told of, and that is still being computed."""

    rank: int
    name: str
    spec: TensorSpec
    tensor: torch.Tensor


class RoundSender:
    """Of one session. `device`: the driver's. `failing`: the context in which a run's late inputs are sent,
    which happens in the midst of whatever has waited for them. `transport`: set before the first round."""

    def __init__(
        self, session: int, device: torch.device, failing: Callable[[int], AbstractContextManager[None]]
    ) -> None:
        self.transport: Transport | None = None
        self._session = session
        self._device = device
        self._failing = failing
        self._last_inputs: dict[_Receiver, dict[str, tuple[torch.Tensor, int]]] = {}
        self._late: list[_LateInput] = []

    def send(
        self,
        rank: int,
        connection: WorkerConnection,
        call: RoundCall,
        needed: Collection[str],
        ended_runs: tuple[int, ...],
    ) -> None:
        """Its part of the round; `needed`: the inputs that its stage reads."""
        tensors = call.tensors_of(rank)
        items = list(self._input_items((rank, call.info.run, call.info.channel), tensors, needed))
        items.sort(key=lambda item: isinstance(item, TransferredInput) and item.is_late)
        transferred = [item for item in items if isinstance(item, TransferredInput)]
        if transferred:
            self.send_late()  # in the order in which workers were told of them
        connection.send(
            RoundMessage(
                session=self._session,
                info=self._info_for(call.round.ops[rank], call.info),
                ops=call.round.packed[rank],
                inputs=tuple(items),
                ended_runs=ended_runs,
            )
        )
        for item in transferred:
            # A copy: the noise scheduler or a callback may write into its tensor before a slow reader has it.
            tensor = tensors[item.name].clone()
            delivery = open_delivery(tensor)
            if delivery is None:
                self._transfer(rank, item.name, tensor, item.spec)
            else:
                self._late.append(_LateInput(rank, item.name, item.spec, tensor))
                delivery.tell(functools.partial(self._send_late_of, call.info.run))

    def needs_no_transfer(self, rank: int, call: RoundCall, needed: Collection[str]) -> bool:
        """Whether the message is all that this rank would be sent of the round."""
        receiver = (rank, call.info.run, call.info.channel)
        return all(
            self._has_been_sent(receiver, name, call.tensors[name])
            or self._fits_in_message(call.tensors[name])
            for name in needed
        )

    def send_late(self) -> None:
        """Send the workers the inputs that they began a round without."""
        for each in self._late:
            arrived(each.tensor)
        late, self._late = self._late, []
        with interrupts_deferred():
            for each in late:
                self._transfer(each.rank, each.name, arrived(each.tensor), each.spec)

    def fill_late(self, lost: Collection[int]) -> None:
        """Of a round that does not go on: send something, so that nobody waits for it, except the ranks that
        are lost."""
        late, self._late = self._late, []
        for each in late:
            if each.rank not in lost:
                filler = empty_tensor(each.spec, self._device).zero_()
                with suppress(RuntimeError):
                    self._transfer(each.rank, each.name, filler, each.spec)

    def forget(self, run: int) -> None:
        """The run is over."""
        self._last_inputs = {key: last for key, last in self._last_inputs.items() if key[1] != run}

    def forget_all(self) -> None:
        """Nobody has any input any more."""
        self._last_inputs.clear()

    def _transfer(self, rank: int, name: str, tensor: torch.Tensor, spec: TensorSpec) -> None:
        assert self.transport is not None
        self.transport.send(rank, Parcel(Stream.INPUT, name), tensor, spec)

    def _send_late_of(self, run: int) -> None:
        """As soon as they are there."""
        with self._failing(run):
            self.send_late()

    def _info_for(self, ops: tuple[Op, ...], info: RoundInfo) -> RoundInfo:
        """With the conditions that these operations need, and timesteps in the message itself."""

        def sent(condition: Condition) -> Condition:
            timestep = condition.timestep
            if not isinstance(timestep, torch.Tensor) or not self._fits_in_message(timestep):
                return condition
            return replace(condition, timestep=_inline(str(info.timestep_name), timestep))

        if not info.conditions:
            return info
        steps = {op.condition_step for op in ops if isinstance(op, Compute)}
        conditions = {step: sent(each) for step, each in info.conditions.items() if step in steps}
        return replace(info, conditions=conditions)

    def _input_items(
        self, receiver: _Receiver, tensors: Mapping[str, torch.Tensor], needed: Collection[str]
    ) -> Iterator[InputItem]:
        """The same object that has not been written to since is the same input (a reference is held)."""
        last = self._last_inputs.setdefault(receiver, {})
        for name in needed:
            tensor = tensors[name]
            if self._has_been_sent(receiver, name, tensor):
                yield KeptInput(name)
            elif open_delivery(tensor) is not None:
                yield TransferredInput(name, dense_spec(tensor_spec(tensor)), is_late=True)
            elif self._fits_in_message(tensor):
                yield _inline(name, tensor)
            else:
                yield TransferredInput(name, tensor_spec(tensor))
            last[name] = (tensor, version_of(tensor))

    def _has_been_sent(self, receiver: _Receiver, name: str, tensor: torch.Tensor) -> bool:
        last, version = self._last_inputs.get(receiver, {}), version_of(tensor)
        return version >= 0 and name in last and last[name][0] is tensor and last[name][1] == version

    def _fits_in_message(self, tensor: torch.Tensor) -> bool:
        is_small = tensor.nbytes <= _INLINE_BYTES or self._device.type != "cpu"
        return tensor.device.type == "cpu" and is_small


def _inline(name: str, tensor: torch.Tensor) -> InlineInput:
    return InlineInput(name, tensor_spec(tensor), bytes_of(tensor))
