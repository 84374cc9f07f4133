"""`davae warm-start`: creates a model from a pretrained BERT and/or Transformer-XL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from davae_jax.cli.base import Command
from davae_jax.model.config import DAVAEConfig


@dataclass(kw_only=True)
class WarmStart(Command):
    """Creates a checkpoint whose encoder is a pretrained BERT and/or whose decoder is a pretrained Transformer-XL. All
    other weights are initialized randomly.
    """

    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder to create; it appears when it is complete."""

    encoder: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: random)")] = None
    """Hugging Face BERT: folder with config.json and model.safetensors or pytorch_model.bin, or a repo id."""

    decoder: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: random)")] = None
    """Transformer-XL in the Fengshenbang 1.1B layout: folder with the same files, or a repo id."""

    config: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: the published settings)")] = None
    """A complete config.json, for all settings that the config.json files of the sources lack."""

    latent_size: Annotated[
        int | None,
        tyro.conf.arg(help_behavior_hint=f"(default: the config's; {DAVAEConfig.latent_size} as published)"),
    ] = None
    """Number of latent dimensions."""

    seed: int = 0
    """Random seed of the initialization."""

    overwrite: bool = False
    """Replace DST if it exists and contains a model and nothing else."""

    def run(self) -> None:
        from davae_jax.checkpoints.warm_start import format_report, warm_start

        report = warm_start(
            self.dst,
            encoder=self.encoder,
            decoder=self.decoder,
            config=self.config,
            latent_size=self.latent_size,
            seed=self.seed,
            overwrite=self.overwrite,
        )
        print(format_report(report, {"encoder": self.encoder, "decoder": self.decoder}))
        print(f"wrote {self.dst}")
