"""Cut points are good where it counts: real configurations with inputs of usual sizes, on fake tensors."""

from __future__ import annotations

import pytest

from asyncdiff.bench.architectures import ARCHITECTURES, stable_diffusion
from asyncdiff.bench.pipelines_table import examine_real_size
from asyncdiff.pipeline.examination import Examination

# Largest stage x N / total. What the mission asks of its own list; all others keep it too.
LIMITS = {2: 1.05, 4: 1.08}
ALWAYS = ("sd15", "sd3")

MISSION = {architecture.name for architecture in stable_diffusion.ARCHITECTURES}
NAMES = [
    pytest.param(name, marks=() if name in ALWAYS else pytest.mark.wide, id=name)
    for name in (*ALWAYS, *(name for name in ARCHITECTURES if name not in ALWAYS))
]

pytestmark = pytest.mark.timeout(600)  # some seconds each; minutes where other tests have the cores


@pytest.fixture(scope="module", params=NAMES)
def examination(request: pytest.FixtureRequest) -> Examination:
    """One after the other: pytest runs all tests of one before it makes the next."""
    return examine_real_size(ARCHITECTURES[request.param])


def devices(num_stages: int) -> list[str]:
    return [f"cuda:{index}" for index in range(num_stages)]


def test_list_of_the_mission_is_whole() -> None:
    assert {
        "sd15", "sd21", "x4-upscaler", "sdxl", "sdxl-inpainting", "controlnet-sd15", "controlnet-sdxl", "sd3",
        "svd", "animatediff",
    } == MISSION  # fmt: skip


@pytest.mark.parametrize("num_stages", sorted(LIMITS))
def test_default_partition_is_balanced_in_flops(examination: Examination, num_stages: int) -> None:
    """Costs being FLOPs; counted from the blocks of the plan, not taken from its predictions."""
    plan = examination.plan(num_stages, devices(num_stages), by_flops=True)
    assert 1.0 + examination.flops_imbalance(plan) <= LIMITS[num_stages]


@pytest.mark.parametrize("num_stages", sorted(LIMITS))
def test_default_partition_is_balanced_in_time(examination: Examination, num_stages: int) -> None:
    """In the seconds that `parallelize` estimates for a GPU: also what moves memory is divided evenly."""
    predictions = examination.plan(num_stages, devices(num_stages)).predictions
    assert predictions is not None
    assert predictions.balance <= LIMITS[num_stages]
    assert sum(predictions.parameter_bytes) >= examination.parameter_bytes * 0.99


def test_work_is_in_blocks(examination: Examination) -> None:
    """What every stage repeats (embeddings of time and text, rope) costs next to nothing."""
    graph = examination.graph(examination.plan(2, devices(2), by_flops=True))
    assert graph.glue_flops <= 0.01 * sum(block.flops for block in graph.blocks)
