"""Bad usage: exit code 2, one line on stderr that names the option, and nothing loaded or started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from asyncdiff.cli.app import build_app
from asyncdiff.cli.failures import run
from asyncdiff.errors import AsyncDiffError, ConfigurationError

GENERATE = ["generate", "--prompt", "a red circle", "-o", "out.png"]

# (arguments, what the one line must contain)
BAD: list[tuple[list[str], str]] = [
    (["nonsense"], "nonsense"),
    (["--nonsense"], "--nonsense"),
    (["bench", "nonsense"], "nonsense"),
    (["generate", "-o", "out.png"], "--prompt"),
    (["generate", "--prompt", "a"], "-o"),
    (["generate", "--prompt", "  ", "-o", "out.png"], "--prompt is empty"),
    (["generate", "--prompt", "a", "-o", "out"], ".png"),
    (["generate", "--prompt", "a", "-o", "out.gif"], ".png"),
    (["generate", "--prompt", "a", "-o", "missing/out.png"], "folder missing does not exist"),
    (["generate", "--prompt", "a", "-o", "folder.png"], "is a folder"),
    ([*GENERATE, "--trace", "missing/run.json"], "--trace"),
    ([*GENERATE, "--trace", "run.txt"], ".json"),
    ([*GENERATE, "--steps", "0"], "--steps 0"),
    ([*GENERATE, "--steps", "many"], "--steps"),
    ([*GENERATE, "--num-images", "0"], "--num-images 0"),
    ([*GENERATE, "--guidance-scale", "-1"], "--guidance-scale -1"),
    ([*GENERATE, "--guidance-scale", "nan"], "--guidance-scale nan"),
    ([*GENERATE, "--height", "100"], "such as 96"),
    ([*GENERATE, "--width", "-8"], "--width -8"),
    ([*GENERATE, "--seed", "-1"], "--seed -1"),
    ([*GENERATE, "--dtype", "int8"], "bfloat16"),
    ([*GENERATE, "--forecast", "cubic"], "linear"),
    ([*GENERATE, "--stride", "0"], "--stride 0"),
    ([*GENERATE, "--warmup-steps", "0"], "--warmup-steps 0"),
    ([*GENERATE, "--warmup-steps", "many"], "a number or 'auto', not 'many'"),
    ([*GENERATE, "--warmup-steps", "2", "--tolerance", "0.1"], "--tolerance goes with --warmup-steps auto"),
    ([*GENERATE, "--warmup-steps", "auto", "--tolerance", "0"], "--tolerance must be above 0"),
    ([*GENERATE, "--freshness", "old"], "paper"),
    ([*GENERATE, "--stages", "0"], "--stages 0"),
    ([*GENERATE, "--devices", "0"], "--devices 0"),
    ([*GENERATE, "--devices", "gpu,gpu"], "'gpu' is no device"),
    ([*GENERATE, "--devices", "cpu,,cpu"], "'' is no device"),
    ([*GENERATE, "--devices", "cpu:0,cpu:1"], "'cpu:0' is no device"),
    ([*GENERATE, "--devices", "cpu,cpu", "--stages", "3"], "--stages 3 with --stride 1 needs 3 devices"),
    ([*GENERATE, "--devices", "cpu,cpu", "--stride", "3"], "--stride 3 needs at least 3 devices"),
    ([*GENERATE, "--devices", "cpu,cpu,cpu", "--stages", "2"], "Use --stages 3"),
    ([*GENERATE, "--guidance", "both"], "together"),
    ([*GENERATE, "--devices", "5", "--guidance", "split"], "--guidance split with --stride 1 needs 2 x"),
    ([*GENERATE, "--devices", "2", "--stages", "2", "--guidance", "split"], "Pass 4 devices"),
    ([*GENERATE, "--guidance-refresh", "0"], "--guidance-refresh 0"),
    (
        [*GENERATE, "--guidance-refresh", "2", "--guidance", "split"],
        "--guidance-refresh 2 and --guidance split",
    ),
    ([*GENERATE, "--guidance-refresh", "2", "--stride", "2"], "--guidance-refresh 2 goes with --stride 1"),
    (
        [*GENERATE, "--guidance-refresh", "2", "--time-shift"],
        "--guidance-refresh 2 goes with no --time-shift",
    ),
    (
        [*GENERATE, "--guidance-refresh", "2", "--stages", "2", "--forecast", "linear"],
        "needs --forecast latents",
    ),
    (["plan", "--arch", "demo", "--devices", "2", "--guidance-refresh", "1,2"], "must be 2 or more"),
    (["quality", "--forecast", "linear", "--guidance-refresh", "2"], "goes with forecast 'latents'"),
    ([*GENERATE, "--model", "./nowhere"], "no such folder"),
    ([*GENERATE, "--model", "a/b/c"], "no model id"),
    ([*GENERATE, "--model", "empty"], "model_index.json"),
    ([*GENERATE, "--model", "model.safetensors"], "single file"),
    (["demo", "--steps", "1"], "--steps 1"),
    (["demo", "--picture", "demo.bmp"], "--picture demo.bmp"),
    (["demo", "--json", "missing/demo.json"], "--json"),
    (["demo", "--devices", "two"], "'two' is no device"),
    (["bench", "step", "--arch", "sd99", "--devices", "cpu,cpu"], "sd99"),
    (["bench", "step", "--size", "250"], "--size 250"),
    (["bench", "step", "--runs", "0"], "--runs 0"),
    (["bench", "step", "--steps", "0"], "--steps 0"),
    (["bench", "step", "--dtype", "int8"], "bfloat16"),
    (["bench", "step", "--json", "bench.csv"], ".json"),
    (["doctor", "--json", "missing/doctor.json"], "--json"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ASYNCDIFF_DEBUG", raising=False)
    return tmp_path


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=lambda value: str(value)[-60:])
def test_bad_usage_is_one_line_and_code_2(
    arguments: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    code = run(build_app(), arguments)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("Error: ")
    assert expected in captured.err
    assert sorted(folder.rglob("*")) == before


def test_bad_usage_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom asyncdiff.cli import main\n"
        f"try: main({[*GENERATE, '--devices', 'cpu,cpu', '--stages', '3']!r})\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("devices", ["cuda:0,cuda:63", "xpu:63"])
def test_missing_device_is_named(devices: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(build_app(), [*GENERATE, "--devices", devices])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert "cuda:0" in error or "cuda:63" in error or "xpu:63" in error


def test_more_devices_than_cores_says_how_to_share(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("counts CUDA devices first")
    code = run(build_app(), [*GENERATE, "--devices", "1000"])
    error = capsys.readouterr().err
    assert code == 2
    assert "--devices 1000" in error


class _Failing:
    """Stands for the app: raises what it is told to."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __call__(self, **_: object) -> None:
        raise self._error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigurationError("too\n few"), 2, "Error: too few\n"),
        (AsyncDiffError("worker 1 died"), 1, "Error: worker 1 died\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "Error: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("ASYNCDIFF_DEBUG", raising=False)
    assert run(_Failing(error), []) == code  # type: ignore[arg-type]
    assert capsys.readouterr().err == line


def test_unexpected_error_is_one_line_that_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ASYNCDIFF_DEBUG", raising=False)
    assert run(_Failing(KeyError("x")), []) == 1  # type: ignore[arg-type]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--debug" in error


def test_debug_variable_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ASYNCDIFF_DEBUG", "1")
    assert run(_Failing(AsyncDiffError("worker 1 died")), []) == 1  # type: ignore[arg-type]
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("Error: worker 1 died\n")
