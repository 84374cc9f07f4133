"""`davae plan`: estimates the resources of a training run and prints them as a table."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from davae_jax.cli.base import Command, parse_options
from davae_jax.cli.train import default_settings, given_model_fields, naming_settings, split_preset
from davae_jax.parallel.chips import CHIPS
from davae_jax.training.config import TrainConfig
from davae_jax.training.presets import PRESETS
from davae_jax.utils.errors import check_options
from davae_jax.utils.files import check_output, to_json, write_output

if TYPE_CHECKING:
    from davae_jax.planning.plan import Plan


@dataclass(kw_only=True)
class PlanCommand(Command):
    """Estimates the memory, compute and communication of a training run on other hardware.

    The first word is a preset; any option of `davae train` changes its settings. The mesh covers `--chips`.
    """

    chip: Literal[tuple(CHIPS)] = "h200"
    """Kind of chip."""

    chips: int = 8
    """Number of chips."""

    efficiency: float = 0.4
    """Attained fraction of the chips' peak FLOP/s and of their links' bandwidth, for the expected time."""

    json: Path | None = None
    """JSON file to which the same numbers are written, unrounded."""

    files: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="config")] = ()
    """File of settings, as of `davae train`: TOML, or the train.json of a run. Can be given several times."""

    preset: tyro.conf.Suppress[str] = "randeng-1b"
    given: tyro.conf.Suppress[tuple[str, ...]] = ()  # fields of the model's config that options or TOML files set
    config: Annotated[TrainConfig, tyro.conf.arg(name="", prefix_name=False)]

    @classmethod
    def parse(cls, argv: Sequence[str], prog: str) -> PlanCommand | None:
        words, (preset, argv) = len(argv), split_preset(argv, "randeng-1b")
        if len(argv) < words:
            prog = f"{prog} {preset}"
        settings, files = default_settings(argv, PRESETS[preset][1])
        with naming_settings(argv, files):
            given = tuple(given_model_fields(argv))
            return parse_options(cls, argv, prog, default=cls(config=settings, preset=preset, given=given))

    def run(self) -> None:
        from davae_jax.checkpoints.run_folder import model_files
        from davae_jax.planning.plan import make_plan, with_planned_vocabularies
        from davae_jax.training.setup import unsharded_weights

        if self.json:
            data = self.config.data
            inputs = [*(data.train or ()), *(data.valid or ()), *self.config.plugin, *self.files]
            check_output(self.json, "--json", inputs=[*inputs, *model_files(self.config.tokenizers)])
        check_options(self, "", "chips", lambda n: n >= 1, "be at least 1")
        check_options(self, "", "efficiency", lambda x: 0 < x <= 1, "be above 0 and at most 1")
        config, tokenizers = with_planned_vocabularies(self.config, self.preset, self.given)
        plan = make_plan(config, CHIPS[self.chip], self.chips, self.efficiency)
        if warning := unsharded_weights(plan.config.model, plan.mesh):
            warnings.warn(warning, stacklevel=2)
        print(format_plan(plan, tokenizers))
        if self.json:
            write_output(self.json, to_json(to_dict(plan)))


def format_plan(plan: Plan, tokenizers: str) -> str:
    """Returns the plan as a table. tokenizers: a description of the tokenizers that determine the vocabulary sizes."""
    from davae_jax.planning.memory import MAX_CHIPS

    config, chip, model = plan.config, plan.chip, plan.config.model
    longest = plan.tokens // config.batch_size
    lines = [
        f"{plan.chips} × {chip.name}, mesh {_mesh(plan.mesh)}",
        f"{config.batch_size} texts of {longest} tokens per step"
        + (f" in {config.accumulate} micro-batches" if config.accumulate > 1 else "")
        + f", {config.dtype}, remat {config.remat}, {config.optimizer.name}",
        *(["each row counts as one text; packed rows may be longer for the encoder"] if config.data.pack else []),
        f"{sum(plan.weights.values()):,} weights: " + ", ".join(f"{name} {n:,}" for name, n in plan.weights.items()),
        *([f"frozen: {', '.join(config.init.freeze)}"] if config.init.freeze else []),
        f"vocabulary sizes: encoder {model.encoder.vocab_size:,}, decoder {model.decoder.vocab_size:,} ({tokenizers})",
        "",
        _row("memory per device", "GB"),
        *(_row(f"  {kind}", f"{n / 1e9:.3f}") for kind, n in plan.memory.items()),
        _row("  total", f"{sum(plan.memory.values()) / 1e9:.3f}")
        + f"  of {chip.memory / 1e9:.1f}: {'fits' if plan.fits else 'DOES NOT FIT'}",
        "",
        _row("FLOPs per step", "TFLOP"),
        *(_row(f"  {part}", f"{n / 1e12:.3f}") for part, n in plan.flops.items()),
        _row("  model total", f"{sum(plan.flops.values()) / 1e12:.3f}"),
        _row("  recomputation", f"{plan.recomputed / 1e12:.3f}"),
        _row("  per device", f"{plan.flops_per_device / 1e12:.3f}"),
        "",
        _row("communication per step and device", "GB"),
        *(
            _row(f"  over {name}", f"{axis.bytes / 1e9:.3f}") + (f"  at {axis.rate / 1e9:.1f} GB/s" * (axis.size > 1))
            for name, axis in plan.traffic.items()
        ),
        "",
        _row("memory traffic of attention", "GB"),
        _row(f"  {plan.attention}", f"{plan.attention_bytes / 1e9:.3f}")
        + f"  at {chip.bandwidth / 1e9:.1f} GB/s; on this chip run: {', '.join(chip.attention)}",
        "",
        _row(f"time per step, {plan.efficiency:.0%} of bfloat16 peak", "s"),
        _row("  compute", f"{plan.compute_seconds:.4f}"),
        _row("  attention, waiting for memory", f"{plan.memory_seconds:.4f}"),
        _row("  communication", f"{plan.communication_seconds:.4f}"),
        _row("  step", f"{plan.seconds[0]:.4f}") + f" (full overlap) to {plan.seconds[1]:.4f} (no overlap)",
        _row("tokens per second", f"{plan.tokens / plan.seconds[1]:,.0f}")
        + f"  to {plan.tokens / plan.seconds[0]:,.0f}",
        "",
        _row(f"minimum number of {chip.name}", str(plan.min_chips[0]) if plan.min_chips else "none")
        + (f"  mesh {_mesh(plan.min_chips[1])}" if plan.min_chips else f"  up to {MAX_CHIPS} with this batch size"),
    ]
    return "\n".join(lines)


def to_dict(plan: Plan) -> dict:
    """Returns the plan's numbers as plain values, in bytes, FLOPs and seconds."""
    values = plan._asdict() | {"chip": plan.chip._asdict(), "fits": plan.fits, "step_seconds": plan.seconds}
    del values["config"]
    return values | {"traffic": {name: axis._asdict() for name, axis in plan.traffic.items()}}


def _mesh(shape: dict[str, int]) -> str:
    return " × ".join(f"{name} {n}" for name, n in shape.items())


def _row(name: str, number: str) -> str:
    return f"{name:36}{number:>14}"
