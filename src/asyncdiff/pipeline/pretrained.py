"""The second door: a pipeline whose denoiser is never whole in any process.

The pipeline is built around a denoiser without weights; every process then reads its own stage's weights from
the safetensors files, so that a model larger than any one device or process runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asyncdiff.errors import ConfigurationError
from asyncdiff.launch.default_group import is_started_by_torchrun, torchrun_local_rank, torchrun_rank
from asyncdiff.launch.torchrun import join_torchrun
from asyncdiff.pipeline.denoiser import DENOISER_NAMES, denoisers_of
from asyncdiff.pipeline.devices import parse_devices, settle_placement
from asyncdiff.pipeline.front_door import Wish, divide
from asyncdiff.pipeline.weightless import without_weights
from asyncdiff.weights import Checkpoint, Unloaded, assign_tensors, named_tensors
from asyncdiff.weights.ownership import stand_in, tensor_spec

_WEIGHTS = "diffusion_pytorch_model"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def from_pretrained(model: str | Path, devices: int | Sequence[str] | None = None, **options: Any) -> Any:
    """A pipeline that is divided over devices from the start; `handle_of(pipe)` is its handle.

    `model`: a folder in diffusers' format, or a hub id. `options`: those of `parallelize`; all others go to
    `DiffusionPipeline.from_pretrained` (`dtype`, `variant`, `revision`, components ...). What is not divided
    is moved to the first device. No process ever holds the whole denoiser, until `handle.remove()` reads it
    into the driver. Under torchrun every rank calls this, and ranks above 0 load their stage only. Raises
    `ConfigurationError` before anything is started.
    """
    from diffusers import DiffusionPipeline

    wish = Wish(**{field.name: options.pop(field.name) for field in fields(Wish) if field.name in options})
    device = _first_device(devices)
    placement = settle_placement(
        devices,
        wish.num_stages,
        wish.stride,
        wish.runtime,
        device,
        wish.guidance_of_devices,
        wish.controlnet,
    )
    if placement.runtime == "torchrun" and torchrun_rank() > 0:
        join_torchrun(list(placement.devices))
    hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
    folder = _folder_of(model, hub | options)
    dtype = options.get("dtype", options.get("torch_dtype"))
    denoisers: dict[str, nn.Module] = {}
    unloaded: dict[str, Unloaded] = {}
    for name in _denoisers_in(folder):
        if name not in options:
            denoisers[name], unloaded[name] = unloaded_denoiser(
                folder / name, _dtype_for(name, dtype), device, options.get("variant")
            )
    pipe = DiffusionPipeline.from_pretrained(folder, **options, **denoisers)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in denoisers:
            part.to(device)
    divide(pipe, denoisers_of(pipe), device, devices, wish, unloaded)
    return pipe


def _first_device(devices: int | Sequence[str] | None) -> torch.device:
    """Where the driver's part of the pipeline goes."""
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if is_started_by_torchrun():
        if devices is not None and not isinstance(devices, int | str):
            return torch.device(devices[0])
        return torch.device("cuda", torchrun_local_rank()) if default.type == "cuda" else default
    if devices is None:
        return default
    return torch.device(parse_devices(devices, default)[0])


def _dtype_for(name: str, dtype: torch.dtype | Mapping[str, torch.dtype] | None) -> torch.dtype | None:
    """Of one component; diffusers takes a mapping by name too, whose "default" is for all others."""
    if isinstance(dtype, Mapping):
        return dtype.get(name, dtype.get("default", torch.float32))
    return dtype


def _folder_of(model: str | Path, options: dict[str, Any]) -> Path:
    """The folder itself, or where the hub's files are; components that are given are not downloaded."""
    from diffusers import DiffusionPipeline

    if not Path(model).is_dir():
        try:
            return Path(DiffusionPipeline.download(str(model), **options))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{model} is no folder, and cannot be downloaded: {error}") from error
    if not (Path(model) / "model_index.json").is_file():
        raise ConfigurationError(f"{model} has no model_index.json, so it is no diffusers pipeline.")
    return Path(model)


def _denoisers_in(folder: Path) -> list[str]:
    """Which denoisers the pipeline has in folders of their own."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return [name for name in DENOISER_NAMES if index.get(name, [None])[0] == "diffusers"]


def unloaded_denoiser(
    folder: Path, dtype: torch.dtype | None, device: torch.device, variant: str | None = None
) -> tuple[nn.Module, Unloaded]:
    """A diffusers model from its folder, without weights, and where they are.

    Exactly what `from_pretrained(folder, torch_dtype=dtype)` builds, values aside: buffers that are computed
    are there, modules that are kept in float32 are. The first parameter is a stand-in on `device`, so that
    `model.device` answers. `ConfigurationError` where the files do not have every weight.
    """
    kind = _model_class(folder)
    checkpoint = Checkpoint(_weight_files(folder, variant))
    with without_weights(dtype or torch.float32):
        model = kind.from_config(kind.load_config(folder)).eval()
    missing = {name for name in model.state_dict() if name not in checkpoint.homes}
    if missing:
        raise ConfigurationError(
            f"{folder} has no weights for {', '.join(sorted(missing)[:3])}{' ...' * (len(missing) > 3)} of "
            f"{type(model).__name__}. Load it with from_pretrained, then call asyncdiff.parallelize."
        )
    names = frozenset(model.state_dict())
    kept = set(getattr(kind, "_keep_in_fp32_modules", None) or ())
    placed: dict[str, torch.Tensor] = {}
    for index, (name, tensor) in enumerate(named_tensors(model)):
        if name in names:
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(torch.float32 if kept.intersection(name.split(".")) else dtype)
            placed[name] = stand_in(tensor_spec(tensor), device if index == 0 else None)
    assign_tensors(model, placed)
    model.register_to_config(_name_or_path=str(folder))
    return model, Unloaded(checkpoint, names)


def _model_class(folder: Path) -> Any:
    import diffusers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config.get("_class_name", "")
    if not hasattr(diffusers, name):
        raise ConfigurationError(
            f"{folder} is a {name or 'model of no named class'}, which diffusers does not have. Load it with "
            "from_pretrained, then call asyncdiff.parallelize."
        )
    return getattr(diffusers, name)


def _weight_files(folder: Path, variant: str | None) -> tuple[Path, ...]:
    """The safetensors files: one, or shards with an index."""
    ending = f".{variant}" if variant else ""
    for index in (
        folder / f"{_WEIGHTS}.safetensors.index{ending}.json",
        folder / f"{_WEIGHTS}{ending}.safetensors.index.json",
    ):
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = tuple(folder / shard for shard in dict.fromkeys(shards))
            gone = [file.name for file in files if not file.is_file()]
            if gone:
                raise ConfigurationError(f"{folder} has no {', '.join(gone)}, which its index names.")
            return files
    whole = folder / f"{_WEIGHTS}{ending}.safetensors"
    if not whole.is_file():
        raise ConfigurationError(
            f"{folder} has no {whole.name}: weights can be read piece by piece from safetensors files only."
        )
    return (whole,)
