"""What a user may ask of the partition, and what of it can be checked before the first denoiser call."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TypeAlias

from torch import nn

from asyncdiff.config import Settings
from asyncdiff.errors import ConfigurationError
from asyncdiff.schedule.builder import KINDS

PartitionRequest: TypeAlias = str | Sequence[Sequence[str]] | None
"""`"chain"`, `"nested"`, module names per stage, or None for the default."""


def check_partition(partition: PartitionRequest, settings: Settings, denoiser: nn.Module) -> None:
    """`ConfigurationError` for names that are no module, or listed twice, and for another number of stages.

    Whether a block is missing shows at the first call: which modules are called at all depends on the inputs.
    """
    if partition is None or partition in KINDS:
        return
    if isinstance(partition, str) or not _is_lists_of_names(partition):
        raise ConfigurationError(
            f"partition must be 'chain', 'nested' or one list of module names per stage, but {partition!r} "
            "was given."
        )
    if len(partition) != settings.num_stages:
        raise ConfigurationError(
            f"The partition lists {len(partition)} stages, but num_stages={settings.num_stages}. List as "
            f"many, or pass {len(partition) + settings.stride - 1} devices."
        )
    _check_names(partition, [path for path, _ in denoiser.named_modules() if path])


def _is_lists_of_names(partition: object) -> bool:
    return isinstance(partition, Sequence) and all(
        isinstance(names, Sequence)
        and not isinstance(names, str)
        and all(isinstance(name, str) for name in names)
        for names in partition
    )


def _check_names(partition: Sequence[Sequence[str]], paths: list[str]) -> None:
    seen: dict[str, int] = {}
    for stage, names in enumerate(partition):
        if not names:
            raise ConfigurationError(f"Stage {stage} of the partition is empty. Every stage needs a block.")
        for name in names:
            if name.partition("#")[0] not in paths:
                close = difflib.get_close_matches(name, paths, n=3)
                raise ConfigurationError(
                    f"Stage {stage} of the partition names {name!r}, which is no module of the denoiser."
                    + (f" Perhaps {' or '.join(close)}?" if close else "")
                )
            _refuse_overlap(name, stage, seen)
            seen[name] = stage


def _refuse_overlap(name: str, stage: int, seen: dict[str, int]) -> None:
    for other, owner in seen.items():
        if name == other or name.startswith(f"{other}.") or other.startswith(f"{name}."):
            raise ConfigurationError(
                f"The partition repeats {name!r} (of stage {stage}): stage {owner} lists {other!r}. Every "
                "block must be on exactly one stage."
            )
