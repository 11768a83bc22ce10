"""What is read of safetensors files is exact, in memory of its own, and not more of it than was asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from asyncdiff.weights import Checkpoint, source
from asyncdiff.weights.ownership import tensor_spec

CPU = torch.device("cpu")


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer{number}": torch.randn(5, 7, generator=generator) for number in range(6)}


@pytest.fixture
def checkpoint(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Checkpoint:
    files = (tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    save_file({name: tensors[name] for name in list(tensors)[::2]}, files[0])
    save_file({name: tensors[name] for name in list(tensors)[1::2]}, files[1])
    return Checkpoint(files)


@pytest.mark.parametrize("mapped_bytes", [1, 300, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_those_of_the_files(
    dtype: torch.dtype,
    mapped_bytes: int,
    checkpoint: Checkpoint,
    tensors: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "_MAPPED_BYTES", mapped_bytes)
    wanted = {name: tensor.to(dtype) for name, tensor in tensors.items() if name != "layer3"}
    read = checkpoint.read({name: tensor_spec(tensor) for name, tensor in wanted.items()}, CPU)
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    assert all(tensor.dtype == dtype for tensor in read.values())


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_nothing_of_the_files_stays_mapped(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    """A mapped file counts whole against a limit of memory, and must not be replaced while it is."""
    read = checkpoint.read({name: tensor_spec(tensor) for name, tensor in tensors.items()}, CPU)
    mapped = Path("/proc/self/maps").read_text()
    assert not [path for path in checkpoint.files if str(path) in mapped]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in read.values())


def test_only_so_much_is_mapped_at_a_time(
    checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = {name: tensor_spec(tensor) for name, tensor in tensors.items()}
    monkeypatch.setattr(source, "_MAPPED_BYTES", 2 * 5 * 7 * 4)
    readings = [(path.name, names) for path, names in checkpoint._readings(specs)]
    assert readings == [
        ("one.safetensors", ["layer0", "layer2"]), ("one.safetensors", ["layer4"]),
        ("two.safetensors", ["layer1", "layer3"]), ("two.safetensors", ["layer5"]),
    ]  # fmt: skip


def test_another_shape_is_refused(checkpoint: Checkpoint) -> None:
    spec = {"layer0": tensor_spec(torch.zeros(7, 5))}
    with pytest.raises(ValueError, match=r"has layer0 in shape \(5, 7\), not \(7, 5\)"):
        checkpoint.read(spec, CPU)
