"""What import-linter cannot see: imports at run time, and parts of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import asyncdiff

_SOURCE = Path(asyncdiff.__file__).parent
_KNOWS_DISTRIBUTED = ("launch", "runtime")
_HEAVY = {"torch", "diffusers", "transformers", "numpy", "accelerate"}


def loaded_modules(code: str) -> set[str]:
    """The top-level modules that are loaded after `code` ran in a fresh interpreter."""
    report = "import sys; print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", f"{code}\n{report}"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return set(output.rpartition("LOADED")[2].split())


@pytest.mark.parametrize("module", ["asyncdiff", "asyncdiff.errors", "asyncdiff.cli", "asyncdiff.cli.app"])
def test_import_loads_nothing_heavy(module: str) -> None:
    assert not loaded_modules(f"import {module}") & _HEAVY


@pytest.mark.parametrize("package", ["graph", "schedule", "simulation", "planner", "tracking", "protocol"])
def test_pure_package_loads_nothing_heavy(package: str) -> None:
    if not (_SOURCE / package / "__init__.py").exists():
        pytest.skip(f"{package} is not there")
    assert not loaded_modules(f"import asyncdiff.{package}") & _HEAVY


def test_every_public_name_resolves() -> None:
    missing = [name for name in asyncdiff.__all__ if not hasattr(asyncdiff, name)]
    assert not missing


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'asyncdiff' has no attribute 'parallelise'"):
        _ = asyncdiff.parallelise


def test_only_transport_and_launcher_know_torch_distributed() -> None:
    offenders = [
        str(path.relative_to(_SOURCE))
        for path in sorted(_SOURCE.rglob("*.py"))
        if path.relative_to(_SOURCE).parts[0] not in _KNOWS_DISTRIBUTED and _mentions_distributed(path)
    ]
    assert not offenders


def test_detector_of_torch_distributed_detects(tmp_path: Path) -> None:
    for code in (
        "import torch.distributed as dist",
        "from torch.distributed import send",
        "from torch import distributed",
        "import torch\ntorch.distributed.send(x)",
    ):
        (tmp_path / "x.py").write_text(code)
        assert _mentions_distributed(tmp_path / "x.py"), code


def _mentions_distributed(path: Path) -> bool:
    return any(map(_is_distributed, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))


def _is_distributed(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.startswith("torch.distributed") for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        names = {alias.name for alias in node.names}
        return module.startswith("torch.distributed") or (module == "torch" and "distributed" in names)
    if isinstance(node, ast.Attribute) and node.attr == "distributed":
        return isinstance(node.value, ast.Name) and node.value.id == "torch"
    return False
