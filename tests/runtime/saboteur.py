"""A module that misbehaves on demand. Importable in the workers, as `__main__` is not; imports no diffusers
there.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn


class Saboteur(nn.Module):
    """Wraps a block; does what the file says, once, in the process whose pid it names (0: in any)."""

    def __init__(self, inner: nn.Module, orders: Path) -> None:
        super().__init__()
        self.inner = inner
        self.orders = str(orders)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if os.path.exists(self.orders):
            self._obey()
        return self.inner(*args, **kwargs)

    def _obey(self) -> None:
        pid, action = Path(self.orders).read_text().split(maxsplit=1)
        if int(pid) in (0, os.getpid()):
            os.unlink(self.orders)
            ACTIONS[action]()


def _fail() -> None:
    raise RuntimeError("sabotage")


def _fail_late() -> None:
    time.sleep(3.0)
    _fail()


def _interrupt_parent() -> None:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.3)


def _tell_prepared() -> None:
    """As an error, which reaches the driver."""
    from asyncdiff.stage import StageReplica

    replicas = [each for each in gc.get_objects() if isinstance(each, StageReplica)]
    stubs = [stub for replica in replicas for stub in replica._stubs.values()]
    counts = [len(replica._specs) for replica in replicas] + [len(stub.actions) for stub in stubs]
    raise RuntimeError(f"prepared at most {max(counts)}")


ACTIONS: dict[str, Callable[[], None]] = {
    "fail": _fail,
    "fail late": _fail_late,
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "interrupt driver": _interrupt_parent,
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "kill driver": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "tell prepared": _tell_prepared,
    "sleep": lambda: time.sleep(60),
}


def sabotage(pipe: Any, name: str, orders: Path) -> None:
    """Put a saboteur around the denoiser's module `name`."""
    owner_name, _, attribute = name.rpartition(".")
    owner = pipe.unet.get_submodule(owner_name)
    setattr(owner, attribute, Saboteur(getattr(owner, attribute), orders))


def order(orders: Path, action: str, pid: int = 0) -> None:
    """Tell the saboteurs what to do next; in one piece, as they may look at any moment."""
    draft = orders.with_suffix(".draft")
    draft.write_text(f"{pid} {action}")
    draft.rename(orders)


def ordering_at(step: int, orders: Path, action: str, pid: int = 0) -> Callable[..., dict[str, Any]]:
    """A `callback_on_step_end` that gives the order after a step."""

    def callback(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            order(orders, action, pid)
        return kwargs

    return callback
