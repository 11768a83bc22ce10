"""The processes that torchrun starts compute, bit for bit, what the local executor computes."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from processes import run_script

SCRIPT = str(Path(__file__).parent / "scripts" / "under_torchrun.py")
SEVERAL_DENOISERS = str(Path(__file__).parent / "scripts" / "several_denoisers.py")
TORCHRUN = ["-m", "torch.distributed.run"]


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.wide) for n in (3, 4))])
def test_torchrun_equals_local_executor(world_size: int) -> None:
    check(run_script([*TORCHRUN, "--standalone", "--nproc-per-node", str(world_size), SCRIPT]), world_size)


@pytest.mark.wide
@pytest.mark.parametrize(("family", "world_size"), [("wan-2.2", 2), ("wan-2.2", 3), ("stable-cascade", 2)])
def test_torchrun_equals_local_executor_with_two_denoisers(family: str, world_size: int) -> None:
    """One hands over to the other in the middle of the run, or follows it."""
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", str(world_size), SEVERAL_DENOISERS, family]
    check(run_script(command), world_size)


def test_script_with_a_default_process_group_of_its_own() -> None:
    check(run_script([*TORCHRUN, "--standalone", "--nproc-per-node", "2", SCRIPT, "own-group"]), 2)


def test_two_agents_as_on_two_machines() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", endpoint, "--rdzv-id", "test", SCRIPT, "own-group",
    ]  # fmt: skip
    ended: list[CompletedProcess[str]] = []
    agents = [threading.Thread(target=lambda: ended.append(run_script(command))) for _ in range(2)]
    for agent in agents:
        agent.start()
    for agent in agents:
        agent.join()
    assert [agent.returncode for agent in ended] == [0, 0], ended
    check(
        CompletedProcess(command, 0, ended[0].stdout + ended[1].stdout, ended[0].stderr + ended[1].stderr), 2
    )


def check(ended: CompletedProcess[str], world_size: int) -> None:
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("[rank 0 is done]") == 1, ended.stdout
    assert ended.stdout.count("is done]") == 1, "a worker went on after parallelize"
    for rank in range(1, world_size):
        assert ended.stdout.count(f"[rank {rank} leaves with 0]") == 1, ended.stdout
    assert "Traceback" not in ended.stderr, ended.stderr
