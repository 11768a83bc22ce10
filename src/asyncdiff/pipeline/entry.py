"""What is put on a denoiser while it is divided: its forward, and its cache contexts."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from asyncdiff.errors import ParallelizedError

if TYPE_CHECKING:
    from asyncdiff.pipeline.handle import Handle


class DenoiserEntry:
    """The instance-level forward of a parallelized denoiser. `call`: gets the arguments of each call, and
    returns what `forward` would have."""

    def __init__(
        self, call: Callable[[tuple[Any, ...], dict[str, Any]], Any], forward: Callable[..., Any]
    ) -> None:
        self._call = call
        self.handle: Handle | None = None
        self.__signature__ = inspect.signature(forward)
        self.__doc__ = forward.__doc__

    def __deepcopy__(self, memo: dict[int, Any]) -> DenoiserEntry:
        raise ParallelizedError(
            "The denoiser cannot be copied while it is divided over devices. Call handle.remove() first."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._call_uncompiled(*args, **kwargs)
        return self._call(args, kwargs)

    @torch.compiler.disable
    def _call_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)


class ContextNames(threading.local):
    """The name of the cache context that this thread is in."""

    current: str | None = None


class NamedContext:
    """Wraps diffusers' `cache_context` to know the name of the call that is being made."""

    def __init__(self, names: ContextNames, original: Callable[..., Any]) -> None:
        self._names = names
        self._original = original

    @contextmanager
    def __call__(self, name: str, **where: Any) -> Iterator[None]:
        before, self._names.current = self._names.current, name
        try:
            with self._original(name, **where):
                yield
        finally:
            self._names.current = before
