"""What a training depends on, and the command that says so."""

from dataclasses import asdict, dataclass
from pathlib import Path

COMMAND = "python -m asyncdiff.demo.train"


@dataclass(frozen=True)
class TrainingSettings:
    """Everything the trained weights depend on, apart from versions, machine and a given autoencoder.

    `model` is one of `asyncdiff.demo.DEMO_MODELS`; its denoiser is the U-Net or the transformer.
    """

    model: str = "unet"
    seed: int = 0
    threads: int = 2
    pictures: int = 24_000
    crop_steps: int = 1500
    autoencoder_steps: int = 250
    autoencoder_batch: int = 16
    autoencoder_rate: float = 1.5e-3
    denoiser_steps: int = 2800
    denoiser_batch: int = 32
    denoiser_rate: float = 1e-3
    caption_dropout: float = 0.1
    ema_decay: float = 0.998


# The settings each bundled model was trained with.
DEFAULT_SETTINGS: dict[str, TrainingSettings] = {
    settings.model: settings
    for settings in (
        TrainingSettings("unet"),
        # Small batches, because matrix products are nearly all of its work: half a batch takes half the time.
        TrainingSettings(
            "transformer",
            threads=1,
            pictures=16_000,
            denoiser_steps=4000,
            denoiser_batch=16,
            denoiser_rate=2e-3,
        ),
    )
}


def option(setting: str) -> str:
    """The command line option of a setting."""
    return f"--{setting.replace('_', '-')}"


def command(settings: TrainingSettings, autoencoder: Path | None) -> str:
    """The command that trains with these settings, defaults left out."""
    defaults = asdict(DEFAULT_SETTINGS[settings.model]) | {"model": "unet"}
    changed = {name: value for name, value in asdict(settings).items() if value != defaults[name]}
    if autoencoder is not None:
        changed["autoencoder"] = autoencoder
    options = [f" {option(name)} {value}" for name, value in changed.items()]
    return f"{COMMAND} --output DIR" + "".join(options)
