"""Where the denoiser's inputs are taken to go: what is continued, and how far that is trusted."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncdiff.pipeline.course import Course

PLACES = (999.0, 975.0, 940.0, 900.0, 870.0, 820.0, 790.0, 745.0, 700.0, 650.0, 610.0, 555.0)


def course(*points: tuple[float, torch.Tensor]) -> Course:
    made = Course()
    for place, tensor in points:
        made.observe(place, {"latents": tensor, "t": torch.tensor(place)}, latents="latents", without="t")
    return made


def of(curve: object, num_points: int) -> Course:
    return course(*((place, curve(place)) for place in PLACES[:num_points]))


coefficients = st.lists(st.floats(-2.0, 2.0), min_size=3, max_size=3)


@given(coefficients, coefficients)
def test_a_parabola_is_continued_on_itself(one: list[float], other: list[float]) -> None:
    """As soon as what lines alone were worth, which the third point told, is forgotten."""

    def curve(place: float) -> torch.Tensor:
        u = place / 1000
        return torch.tensor([a + b * u + c * u * u for a, b, c in (one, other)], dtype=torch.float64)

    made = of(curve, len(PLACES)).continued(500.0)["latents"]
    torch.testing.assert_close(made, curve(500.0), rtol=1e-3, atol=1e-3)


def test_two_points_make_a_line() -> None:
    made = of(lambda place: torch.tensor([place, -place]), 2)
    assert torch.equal(made.continued(500.0)["latents"], torch.tensor([500.0, -500.0]))


def test_noise_is_not_continued() -> None:
    """Steps that have nothing to do with each other: the newest point tells most of the next."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(4096, generator=generator) for _ in PLACES]
    sums = itertools.accumulate(noise)
    *known, last = zip(PLACES, sums, strict=True)
    made = course(*known).continued(last[0])["latents"]
    newest, arrived = known[-1][1], last[1]
    assert (made - arrived).norm() < 1.05 * (newest - arrived).norm()
    line = newest + (newest - known[-2][1])
    assert (line - arrived).norm() > 1.3 * (newest - arrived).norm()


def test_only_inputs_that_change_are_continued() -> None:
    mask = torch.tensor([0.0, float("-inf")])
    prompt = torch.randn(3)
    made = Course()
    for place in PLACES[:4]:
        made.observe(
            place,
            {
                "latents": torch.full((2,), place),
                "residual": torch.full((1,), -place, dtype=torch.bfloat16),
                "mask": mask.clone(),  # made anew by the pipeline at every step
                "prompt": prompt,
                "ids": torch.tensor([int(place)]),
                "timestep": torch.tensor(place),
            },
            latents="latents",
            without="timestep",
        )
    continued = made.continued(700.0)
    assert continued.keys() == {"latents", "residual"}
    assert continued["residual"].dtype == torch.bfloat16
    torch.testing.assert_close(continued["residual"].float(), torch.tensor([-700.0]), rtol=0.02, atol=0.0)


def test_an_input_that_is_written_into_changes() -> None:
    latents = torch.zeros(2)
    made = Course()
    for place in (3.0, 2.0):
        latents.fill_(place)
        made.observe(place, {"x": latents}, latents="y", without=None)
    latents.fill_(7.0)
    assert torch.equal(made.continued(1.0)["x"], torch.ones(2))


@pytest.mark.parametrize("num_points", [1, 2, 4])
def test_a_copy_goes_on_by_itself(num_points: int) -> None:
    square = lambda place: torch.tensor([place * place])  # noqa: E731
    made, untouched = of(square, num_points), of(square, num_points)
    other, last = made.copied(), PLACES[num_points]
    for place, value in ((last, square(0.0)), (last - 30, square(5.0))):
        other.observe(place, {"latents": value, "t": value}, latents="latents", without="t")
    for each in (made, untouched):
        each.observe(last, {"latents": square(last), "t": square(last)}, latents="latents", without="t")
    assert torch.equal(made.continued(500.0)["latents"], untouched.continued(500.0)["latents"])
    assert not torch.equal(other.continued(500.0)["latents"], made.continued(500.0)["latents"])


def test_latents_change_even_if_they_have_not_yet() -> None:
    made = of(lambda place: torch.tensor([min(place, PLACES[1])]), 4)
    assert PLACES[4] - 20 < float(made.continued(PLACES[4])["latents"]) < PLACES[3]


def test_a_second_evaluation_of_a_step_takes_the_place_of_the_first() -> None:
    """Heun: every timestep but the first comes twice, and the second latents are the better ones."""
    line = lambda place: torch.tensor([place])  # noqa: E731
    points = [(9.0, line(9.0))]
    for place in (8.0, 7.0):
        points += [(place, line(place) + 0.5), (place, line(place))]
    assert torch.equal(course(*points[:2]).continued(7.0)["latents"], torch.tensor([8.0]))
    assert torch.equal(course(*points[:3]).continued(7.0)["latents"], line(7.0))
    assert torch.equal(course(*points).continued(7.0)["latents"], line(7.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_made_in_single_precision(dtype: torch.dtype) -> None:
    values = [torch.tensor([1000.0 + place], dtype=dtype) for place in PLACES[:5]]
    made = course(*zip(PLACES, values, strict=False)).continued(PLACES[5])["latents"]
    exact = course(*((place, value.double()) for place, value in zip(PLACES, values, strict=False)))
    assert made.dtype == dtype
    assert torch.equal(made, exact.continued(PLACES[5])["latents"].to(dtype))
