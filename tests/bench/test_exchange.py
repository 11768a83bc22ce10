"""What crosses between the stages of the made-up denoiser is what was asked for."""

from __future__ import annotations

import pytest

from asyncdiff.bench.block_chain import PARTITIONS
from asyncdiff.bench.exchange import Exchange, measure_exchange

PREDICTION_BYTES = 4 * 8 * 8 * 4


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "crossings", "predictions"),
    [("chain", 1, 1), pytest.param("nested", 2, 0, marks=pytest.mark.wide)],
)
def test_bytes_are_those_of_the_hidden_states(kind: str, crossings: int, predictions: int) -> None:
    size = 64 << 10
    result = measure_exchange(kind, size, devices=["cpu", "cpu"], block_ms=0.5, steps=3, runs=1)
    assert result.bytes_per_step == crossings * size + predictions * PREDICTION_BYTES
    assert len(result.overhead_ms) == 3
    assert len(result.compute_ms) == 2
    assert min(result.compute_ms) > 0
    assert result.step_ms > max(result.compute_ms) / 2


def test_partitions_name_every_part_once() -> None:
    for stages in PARTITIONS.values():
        assert sorted(name for stage in stages for name in stage) == [
            *(f"blocks.{index}" for index in range(4)), "enter", "leave",
        ]  # fmt: skip


def test_median_and_p90_of_known_overheads() -> None:
    overheads = tuple(float(value) for value in range(11))
    result = Exchange("chain", 1024, 2048, 1.0, (1.0, 1.0), (0.0, 0.0), (0.0, 0.0), overheads)
    assert (result.median_ms, result.p90_ms) == (5.0, 9.0)
    assert result.to_json()["p90_ms"] == 9.0
    assert result.row()[:3] == ["chain, 1 KiB", "5.00", "9.00"]
