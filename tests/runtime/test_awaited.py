"""Tensors that are still being computed elsewhere: who waits for them, who does not, and that nothing else is
different."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from asyncdiff.runtime.awaited import AwaitedTensor, Delivery, arrived, open_delivery
from asyncdiff.tiny.stable_diffusion import unet
from asyncdiff.tiny.text import CLIP_WIDTH
from asyncdiff.weights.ownership import tensor_spec

CPU = torch.device("cpu")


def two() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 3, generator=generator), torch.randn(2, 3, 5, generator=generator)]


def delivery_of(tensors: list[torch.Tensor]) -> tuple[Delivery, list[torch.Tensor]]:
    delivery = Delivery(lambda: tensors)
    return delivery, delivery.tensors([tensor_spec(tensor) for tensor in tensors], CPU)


NEEDING: dict[str, Callable[[torch.Tensor], Any]] = {
    "cpu then sum": lambda x: x.cpu().sum(),
    "dtype": lambda x: x.to(torch.float64),
    "indexing by a mask": lambda x: x[x > 0],
    "in place": lambda x: x.mul_(2.0),
    "item": lambda x: x[0, 0, 0].item(),
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy().copy(),
    "array": lambda x: torch.as_tensor(np.asarray(x)),
    "printing": repr,
    "formatting": lambda x: f"{x}",
    "pickling": lambda x: pickle.loads(pickle.dumps(x)),
    "copying": copy.deepcopy,
    "saving": lambda x: _saved(x),
    "contiguous of a transposed one": lambda x: x.transpose(1, 2).contiguous(),
    "matmul": lambda x: x @ x.transpose(1, 2),
    "truth": lambda x: bool((x == x).all()),
    "as strided": lambda x: x.as_strided((2,), (1,)),
    "out": lambda x: torch.add(torch.zeros(2, 4, 3), x, out=torch.empty(2, 4, 3)),
    "written to another": lambda x: torch.empty(2, 4, 3).copy_(x),
    "dlpack": lambda x: torch.from_dlpack(x),
    "pointer": lambda x: torch.tensor(x.data_ptr() > 0),
    "storage": lambda x: torch.tensor(x.untyped_storage().nbytes()),
}


def _saved(tensor: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    loaded: torch.Tensor = torch.load(file)
    return loaded


@pytest.mark.parametrize("name", NEEDING)
def test_whoever_needs_elements_gets_the_right_ones(name: str) -> None:
    tensor = two()[0]
    delivery, (awaited, _) = delivery_of([tensor.clone(), two()[1]])
    made, expected = NEEDING[name](awaited), NEEDING[name](tensor)
    assert not delivery.is_open
    if isinstance(expected, torch.Tensor):
        assert torch.equal(made, expected)
        assert name == "in place" or type(made) is torch.Tensor
    else:
        assert str(made) == str(expected)


HANDING_ON: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "half of the batch": lambda x, y: x.narrow(0, 1, 1),
    "sliced": lambda x, y: x[:, 1:3],
    "sum": lambda x, y: y + x,
    "sum with a weight": lambda x, y: torch.add(y, x, alpha=0.5),
    "scaled": lambda x, y: x * 0.7,
    "scaled by a tensor": lambda x, y: y * x,
    "behind zeros": lambda x, y: torch.cat([torch.zeros_like(x), x]),
    "beside another": lambda x, y: torch.cat([y, x], dim=1),
    "clone": lambda x, y: x.clone(),
    "detached": lambda x, y: x.detach(),
    "itself": lambda x, y: x.to(torch.float32).to("cpu"),
    "several times": lambda x, y: torch.cat([(x * 2 + y)[:1], y[1:] + x[1:]]).narrow(1, 0, 2),
}


@pytest.mark.parametrize("name", HANDING_ON)
def test_handing_on_waits_for_nothing(name: str) -> None:
    tensor, other = two()[0], torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    delivery, (awaited, _) = delivery_of([tensor, two()[1]])
    made, expected = HANDING_ON[name](awaited, other), HANDING_ON[name](tensor, other)
    assert delivery.is_open
    assert (made.shape, made.stride(), made.dtype, made.device) == (
        expected.shape, expected.stride(), expected.dtype, expected.device,
    )  # fmt: skip
    assert (made.is_contiguous(), made.requires_grad) == (expected.is_contiguous(), False)
    assert delivery.is_open
    assert torch.equal(made, expected)


def test_what_was_put_off_reads_what_was_there() -> None:
    tensor, other = two()[0], torch.ones(2, 4, 3)
    _, (awaited, _) = delivery_of([tensor.clone(), two()[1]])
    total, part = awaited + other, awaited[:1]
    other.zero_()
    awaited.add_(1.0)
    assert torch.equal(total, tensor + 1)
    assert torch.equal(part, tensor[:1] + 1), "a part shares its memory with the whole"
    assert torch.equal(awaited, tensor + 1)


def test_writing_into_a_part_writes_into_the_whole() -> None:
    tensor = two()[0]
    _, (awaited, _) = delivery_of([tensor.clone(), two()[1]])
    awaited[:, :2] = awaited[:, :2] * 3.0
    expected = tensor.clone()
    expected[:, :2] *= 3.0
    assert torch.equal(awaited, expected)


def test_other_strides_than_were_said_are_made_those() -> None:
    tensor = torch.randn(2, 3, 4)
    delivery = Delivery(lambda: [tensor.transpose(1, 2).contiguous().transpose(1, 2)])
    (awaited,) = delivery.tensors([tensor_spec(tensor)], CPU)
    assert arrived(awaited).stride() == awaited.stride() == tensor.stride()
    assert torch.equal(awaited, tensor)


def test_copies_that_would_be_laid_out_otherwise_are_not_put_off() -> None:
    tensor, expanded = two()[0], torch.randn(1, 4, 1).expand(2, 4, 3)
    delivery, (awaited, _) = delivery_of([tensor, two()[1]])
    made = awaited + expanded
    assert not delivery.is_open
    assert type(made) is torch.Tensor
    assert torch.equal(made, tensor + expanded)


def test_two_deliveries_meet() -> None:
    one, other = two()[0], two()[0] * 2
    first, (a,) = delivery_of([one])
    second, (b,) = delivery_of([other])
    assert torch.equal(a + b, one + other)
    assert not first.is_open
    assert not second.is_open


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        tensor = two()[0]
        delivery, (awaited, _) = delivery_of([tensor, two()[1]])
        made = awaited + 1
        assert delivery.is_open
        assert torch.equal(made, tensor + 1)


def test_everybody_is_told_of_a_failure() -> None:
    def wait() -> list[torch.Tensor]:
        raise RuntimeError("sabotage")

    delivery = Delivery(wait)
    (awaited,) = delivery.tensors([tensor_spec(two()[0])], CPU)
    total = awaited + 1
    for each in (awaited, total, awaited):
        with pytest.raises(RuntimeError, match="sabotage"):
            each.sum()
    delivery.end()  # nobody who needs it


def test_interrupt_is_told_once() -> None:
    def wait() -> list[torch.Tensor]:
        raise KeyboardInterrupt

    delivery = Delivery(wait)
    (awaited,) = delivery.tensors([tensor_spec(two()[0])], CPU)
    with pytest.raises(KeyboardInterrupt):
        awaited.sum()
    delivery.end()
    with pytest.raises(RuntimeError, match="interrupted"):
        awaited.sum()


def test_listeners_are_told_once_when_all_is_there() -> None:
    delivery, (awaited, _) = delivery_of(two())
    seen: list[bool] = []
    delivery.tell(lambda: seen.append(open_delivery(awaited) is None))
    awaited.sum()
    awaited.sum()
    assert seen == [True]


def test_only_one_thread_waits() -> None:
    calls: list[int] = []
    begin = threading.Barrier(4)

    def wait() -> list[torch.Tensor]:
        calls.append(1)
        return two()

    delivery = Delivery(wait)
    awaited, _ = delivery.tensors([tensor_spec(tensor) for tensor in two()], CPU)
    sums: list[torch.Tensor] = []

    def look() -> None:
        begin.wait(10)
        sums.append(awaited.sum())

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(calls) == 1
    assert all(torch.equal(each, two()[0].sum()) for each in sums)
    assert len(sums) == 4


def test_what_nobody_can_look_at_any_more_is_not_made() -> None:
    delivery, (awaited, other) = delivery_of(two())
    made = weakref.ref((awaited * 2)._promise)
    assert made() is None
    delivery.arrive()
    assert isinstance(other, AwaitedTensor)


def test_bottom_of_a_unet_does_not_wait_for_residuals() -> None:
    """The sums with the skip connections stand before it in the forward."""
    model = unet()
    generator = torch.Generator().manual_seed(0)
    sample, prompt = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, CLIP_WIDTH)
    residuals = [torch.randn(2, *shape) for shape in ((8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4))]
    middle = torch.randn(2, 16, 4, 4)
    events: list[str] = []

    def wait() -> list[torch.Tensor]:
        events.append("waited")
        return [*residuals, middle]

    def forward(down: list[torch.Tensor], mid: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(
                sample, 3, prompt, down_block_additional_residuals=down, mid_block_additional_residual=mid
            ).sample

    expected = forward(list(residuals), middle)
    model.mid_block.register_forward_hook(lambda *_: events.append("middle"))
    model.up_blocks[0].register_forward_hook(lambda *_: events.append("up"))
    *down, mid = Delivery(wait).tensors([tensor_spec(each) for each in [*residuals, middle]], CPU)
    assert torch.equal(forward(down, mid), expected)
    assert events == ["middle", "waited", "up"]
