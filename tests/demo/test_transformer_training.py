"""What the transformer is taught is what the pipeline asks of it: text states, noise and timesteps."""

from typing import Any

import pytest
import torch

from asyncdiff.demo import DEMO_CAPTIONS, DEMO_MODELS
from asyncdiff.demo.networks import build_autoencoder, build_flow_scheduler, build_noise_scheduler
from asyncdiff.demo.training.transformer import TransformerNetworks
from asyncdiff.demo.vocabulary import build_tokenizer, caption_tokens

_CAPTIONS = [*DEMO_CAPTIONS[:3], ""]


@pytest.fixture(scope="module")
def networks() -> TransformerNetworks:
    torch.manual_seed(0)
    return TransformerNetworks(build_tokenizer())


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    latents, noise = torch.randn(2, len(_CAPTIONS), 4, 8, 8)
    tokens = caption_tokens(build_tokenizer(), _CAPTIONS)
    return {
        "latents": latents,
        "noise": noise,
        "places": torch.tensor([0.0, 0.3, 0.7, 0.999]),
        "tokens": tokens,
    }


def test_captions_are_encoded_as_the_pipeline_does(networks: TransformerNetworks) -> None:
    pipe = networks.pipeline(build_autoencoder())
    arguments: dict[str, Any] = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": True}
    states, empty, pooled, empty_pooled = pipe.encode_prompt(
        _CAPTIONS[:3], **arguments, **DEMO_MODELS["transformer"].call_arguments
    )
    assert states.shape == (3, 33, 128)
    # The same number of captions at a time: with another one, sums differ in the last bit.
    for captions, expected in ((_CAPTIONS[:3], (states, pooled)), ([""] * 3, (empty, empty_pooled))):
        encoded = networks.encode(caption_tokens(pipe.tokenizer, captions))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(encoded, expected, strict=True))


def test_transformer_sees_the_noise_schedulers_noise_and_timesteps(
    networks: TransformerNetworks, batch: dict[str, torch.Tensor]
) -> None:
    seen: list[Any] = []
    hook = networks.transformer.register_forward_pre_hook(lambda module, given: seen.append(given))
    networks.loss(**batch)
    hook.remove()
    ((noisy, _, _, timesteps),) = seen
    assert timesteps[0] == 1000.0  # pure noise
    assert torch.equal(noisy, build_flow_scheduler().scale_noise(batch["latents"], timesteps, batch["noise"]))


def test_loss_is_zero_where_one_euler_step_leads_to_the_latents(
    networks: TransformerNetworks, batch: dict[str, torch.Tensor]
) -> None:
    latents, noise = batch["latents"], batch["noise"]
    scheduler = build_flow_scheduler()
    scheduler.set_timesteps(1)
    flow = noise - latents
    (reached,) = scheduler.step(flow, scheduler.timesteps[0], noise, return_dict=False)
    torch.testing.assert_close(reached, latents)  # a difference and a sum of float32
    answers = networks.transformer.register_forward_hook(
        lambda module, given, output: type(output)(sample=flow)
    )
    assert networks.loss(**batch) == 0
    answers.remove()


def test_first_prediction_is_zero_whatever_the_caption(
    networks: TransformerNetworks, batch: dict[str, torch.Tensor]
) -> None:
    expected = (batch["noise"] - batch["latents"]).square().mean()
    torch.testing.assert_close(networks.loss(**batch), expected)


def test_steps_are_spread_over_the_noise_almost_as_the_unets() -> None:
    sigmas = build_flow_scheduler().sigmas
    alphas = build_noise_scheduler().alphas_cumprod
    flow, unet = sigmas / (1 - sigmas), ((1 - alphas) / alphas).sqrt()
    for ratio, share in ((3, 0.5), (1, 0.75)):  # of noise to latents
        assert (flow > ratio).float().mean() == pytest.approx(share, abs=0.002)
        assert (unet > ratio).float().mean() == pytest.approx(share, abs=0.025)
