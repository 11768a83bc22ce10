"""Real sizes without weights: balance and time to trace."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from asyncdiff.planner.costs import rates_of
from asyncdiff.trace import find_blocks, record
from asyncdiff.trace.inputs import flatten_inputs


def sd15():
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768), unet_inputs(64, 768)


def sd21():
    module = UNet2DConditionModel(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=[5, 10, 20, 20],
        use_linear_projection=True,
    )
    return module, unet_inputs(96, 1024)


def sdxl():
    module = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048,
        attention_head_dim=[5, 10, 20],
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2, 10],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
    return module, unet_inputs(128, 2048) | {"added_cond_kwargs": added}


def sd3():
    module = SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )
    return module, {
        "hidden_states": torch.empty(2, 16, 128, 128),
        "encoder_hidden_states": torch.empty(2, 333, 4096),
        "pooled_projections": torch.empty(2, 2048),
        "timestep": torch.empty(2),
    }


def unet_inputs(size, context):
    return {
        "sample": torch.empty(2, 4, size, size),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.empty(2, 77, context),
    }


def recorded(build):
    with init_empty_weights(include_buffers=True):
        module, kwargs = build()
    return record(module.eval(), flatten_inputs(module.forward, (), kwargs), device="cpu")


def best_chain_share(costs, num_stages):
    """Largest stage over the mean, by dynamic programming over prefixes."""
    best = [0.0] + [float("inf")] * len(costs)
    for _ in range(num_stages):
        best = [
            min(
                (max(best[start], sum(costs[start:end])) for start in range(end)),
                default=float("inf"),
            )
            for end in range(len(costs) + 1)
        ]
    return best[-1] * num_stages / sum(costs)


@pytest.mark.parametrize("build", [sd15, sd21, sdxl, sd3])
def test_two_stages_are_balanced_without_weights(build):
    recording = recorded(build)
    assert recording.mode == "fake"
    rates = rates_of("cuda", "float16")
    for cost in (
        lambda flops, moved: flops,
        lambda flops, moved: flops / rates.flops_per_s + moved / rates.bytes_per_s,
    ):
        for num_stages, limit in ((2, 1.05), (3, 1.05), (4, 1.07)):
            graph = find_blocks(recording, num_stages, cost=cost)
            costs = [cost(block.flops, block.memory_bytes) for block in graph.blocks]
            assert best_chain_share(costs, num_stages) <= limit
            assert graph.glue_flops <= 0.05 * sum(block.flops for block in graph.blocks)
