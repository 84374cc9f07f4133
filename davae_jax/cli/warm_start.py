"""`davae warm-start`: a new model from a BERT and/or a Transformer-XL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from davae_jax.checkpoints.warm_start import PUBLISHED_SETTINGS, format_report, warm_start
from davae_jax.cli.base import Command


@dataclass(kw_only=True)
class WarmStart(Command):
    """A new checkpoint whose encoder comes from a BERT and/or whose decoder comes from a Transformer-XL.

    What neither source holds is freshly drawn.
    """

    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder to make; it appears when it is complete."""

    encoder: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: freshly drawn)")] = None
    """Hugging Face BERT: folder with config.json and model.safetensors or pytorch_model.bin, or a repo id."""

    decoder: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: freshly drawn)")] = None
    """Transformer-XL in the Fengshenbang 1.1B layout: a folder likewise, or a repo id."""

    config: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: the published settings)")] = None
    """A full config.json, for all that the sources' own do not say."""

    latent_size: Annotated[
        int | None,
        tyro.conf.arg(help_behavior_hint=f"(default: the config's; {PUBLISHED_SETTINGS.latent_size} as published)"),
    ] = None
    """Size of the latent."""

    seed: int = 0
    """Seed of what is freshly drawn."""

    overwrite: bool = False
    """Replace what stands at DST."""

    def run(self) -> None:
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
