"""Noise schedulers as people set them up, each with the stand-in that it drives: for tests, and for the table
in docs/noise-schedulers.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asyncdiff.tiny.registry import TINY_PIPELINES
from asyncdiff.tiny.stand_in import TinyPipeline


@dataclass(frozen=True)
class SchedulerCase:
    """A noise scheduler of diffusers with options, put in the place of the stand-in's own.

    `arguments`: what `pipe(...)` is given besides, such as timesteps of one's own.
    """

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    family: str = "sd15"

    @property
    def name(self) -> str:
        """The scheduler and what differs from its defaults."""
        return " ".join([self.scheduler, *filter(None, [self.variant])])

    @property
    def variant(self) -> str:
        """What differs from the defaults; empty where nothing does."""
        given = {**self.options, **self.arguments}
        return " ".join(f"{key}={_short(value)}" for key, value in given.items())

    @property
    def stand_in(self) -> TinyPipeline:
        """The family that it drives here."""
        return TINY_PIPELINES[self.family]

    def build(self) -> Any:
        """The stand-in with this noise scheduler, made as users make it: from the configuration of the one
        before."""
        import diffusers

        pipe = self.stand_in.build()
        scheduler = getattr(diffusers, self.scheduler)
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **self.options)
        return pipe


def _short(value: object) -> str:
    return "[...]" if isinstance(value, list) else str(value)


def _cases(scheduler: str, *variants: dict[str, Any], family: str = "sd15") -> tuple[SchedulerCase, ...]:
    """Of `variants`, "call" goes to the pipeline's call and the rest to the noise scheduler."""
    return tuple(
        SchedulerCase(
            scheduler,
            {name: value for name, value in variant.items() if name != "call"},
            variant.get("call", {}),
            family,
        )
        for variant in variants
    )


def _flow(scheduler: str, *variants: dict[str, Any]) -> tuple[SchedulerCase, ...]:
    return _cases(scheduler, *variants, family="sd3")


_UNCLIPPED = {"clip_sample": False}
_KARRAS = {"use_karras_sigmas": True}
_V = {"prediction_type": "v_prediction"}
_ZERO_SNR = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, **_V}
_TIMESTEPS = {"call": {"timesteps": [999, 850, 600, 350, 120, 20]}}
_FLOW_PREDICTION = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

SCHEDULER_CASES: tuple[SchedulerCase, ...] = (
    *_cases("DDIMScheduler", _UNCLIPPED, {**_UNCLIPPED, **_ZERO_SNR}, {"call": {"eta": 0.5}}),
    *_cases("DDPMScheduler", _UNCLIPPED, _TIMESTEPS),
    *_cases("PNDMScheduler", {}, {"skip_prk_steps": False}, {"timestep_spacing": "trailing"}),
    *_cases(
        "EulerDiscreteScheduler",
        {},
        {**_KARRAS, "timestep_spacing": "trailing", **_V},
        {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"},
        {"timestep_type": "continuous", **_KARRAS, **_V},
        {**_ZERO_SNR},
        _TIMESTEPS,
        {"call": {"sigmas": [14.0, 6.0, 2.5, 1.0, 0.4, 0.1]}},
    ),
    *_cases("EulerAncestralDiscreteScheduler", {}, _ZERO_SNR),
    *_cases(
        "DPMSolverMultistepScheduler",
        {},
        _KARRAS,
        {"algorithm_type": "sde-dpmsolver++", **_KARRAS},
        {"solver_order": 3, "final_sigmas_type": "sigma_min", "timestep_spacing": "trailing", **_V},
        {"use_lu_lambdas": True, "euler_at_final": True},
        _TIMESTEPS,
    ),
    *_cases("DPMSolverSinglestepScheduler", {}, _KARRAS),
    *_cases("DPMSolverSDEScheduler", {"noise_sampler_seed": 0}, {"noise_sampler_seed": 0, **_KARRAS}),
    *_cases("UniPCMultistepScheduler", {}, _KARRAS, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    *_cases("DEISMultistepScheduler", {}),
    *_cases("LMSDiscreteScheduler", {}, {**_KARRAS, "timestep_spacing": "trailing"}),
    *_cases("HeunDiscreteScheduler", {}, {**_KARRAS, **_V}, _TIMESTEPS),
    *_cases("KDPM2DiscreteScheduler", {}, {**_KARRAS, "timestep_spacing": "trailing"}),
    *_cases("KDPM2AncestralDiscreteScheduler", {}, {**_KARRAS}),
    *_cases("LCMScheduler", {}, {"call": {"timesteps": [999, 759, 499, 359, 259, 19]}}),
    *_cases("TCDScheduler", {"call": {"eta": 0.3}}),
    *_cases("SASolverScheduler", {}),
    *_cases("IPNDMScheduler", {}),
    *_cases("EDMEulerScheduler", {}, {"sigma_schedule": "exponential", **_V}),
    *_cases("EDMDPMSolverMultistepScheduler", {}, {"algorithm_type": "sde-dpmsolver++"}),
    *_flow(
        "FlowMatchEulerDiscreteScheduler",
        {},
        {"use_dynamic_shifting": True, "call": {"mu": 0.9}},
        {"use_karras_sigmas": True, "shift_terminal": 0.02},
        {"stochastic_sampling": True},
        {"call": {"sigmas": [1.0, 0.9, 0.7, 0.5, 0.3, 0.1]}},
    ),
    *_flow("FlowMatchHeunDiscreteScheduler", {}),
    *_flow("DPMSolverMultistepScheduler", _FLOW_PREDICTION),
    *_flow("UniPCMultistepScheduler", _FLOW_PREDICTION),
)
