"""The settings of a training run. The command line of train.py and its help are generated from these classes."""

# The help texts below fields are single lines, because the command line's help keeps their line breaks.
# ruff: noqa: E501
from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from davae_jax.data.config import DataConfig
from davae_jax.model.config import Attention, DAVAEConfig, Remat
from davae_jax.parallel.config import DistributedConfig, MeshConfig
from davae_jax.regularizers.config import RegularizersConfig
from davae_jax.utils.errors import (
    NON_NEGATIVE,
    UNIT_INTERVAL,
    OptionError,
    check_integers,
    check_options,
)


@dataclass(frozen=True)
class BetaConfig:
    """Schedule of the KL weight β: a linear or sigmoid warmup (Li et al. 2020, Optimus), repeated for cyclical
    annealing (Fu et al. 2019).

    In each cycle β is `start` for a fraction `ratio_zero` of the steps, rises to `max` over a fraction `ratio_increase`
    of them, and then remains at `max`.
    """

    start: float = 1e-4
    """Initial β of each cycle."""

    max: float = 0.1
    """Final β of each cycle; if it equals `start`, β is constant (Higgins et al. 2017)."""

    ratio_zero: float = 0.05
    """Fraction of a cycle during which β is `start`."""

    ratio_increase: float = 0.5
    """Fraction of a cycle over which β rises."""

    cycles: int = 1
    """Number of cycles in the whole training; 1 means a single warmup."""

    shape: Literal["linear", "sigmoid"] = "linear"
    """Shape of the rise. sigmoid: the logistic function from −5 to 5 (Bowman et al. 2016), scaled to begin at `start` and end at `max` exactly."""

    def __post_init__(self):
        check_options(self, "beta.", "start max", *NON_NEGATIVE)
        check_options(self, "beta.", "cycles", lambda n: n >= 1, "be at least 1")
        if not (self.ratio_zero >= 0 and self.ratio_increase >= 0 and self.ratio_zero + self.ratio_increase <= 1):
            raise OptionError(
                "--beta.ratio-zero",
                f"{self.ratio_zero} and --beta.ratio-increase {self.ratio_increase} must be 0 or more, and their sum "
                "at most 1",
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer of encoder and decoder. The defaults are the published settings."""

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), Adafactor (Shazeer & Stern 2018), or Muon (Jordan 2024) for the matrices inside the layers with AdamW for all other weights."""

    learning_rate: float = 5e-5
    """Peak learning rate."""

    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Learning rate schedule after the warmup: cosine decay to `end`, constant, or constant until a linear decay to `end` over the last `decay-steps` steps (wsd: warmup, stable, decay; Hu et al. 2024). Until its decay, wsd does not depend on the number of steps."""

    warmup: float = 0.01
    """Fraction of all steps over which the learning rate rises from 0."""

    warmup_steps: int = 0
    """Number of these steps, in place of the fraction `warmup`; 0: the fraction counts."""

    decay_steps: int = 0
    """Number of last steps over which wsd decays; 0: none. May change when a run goes on."""

    end: float = 0.1
    """Final learning rate of a decay, as a fraction of the peak."""

    weight_decay: float = 0.1
    """Weight decay of matrices; biases and LayerNorms have none."""

    clip: float = 1.0
    """Maximum global gradient norm; 0 is off."""

    spike: float = 0.0
    """Skip a step whose gradient norm exceeds its running mean by this factor; 0 is off."""

    b1: float = 0.9
    """Decay of the mean of the gradients (AdamW, and Muon's AdamW)."""

    b2: float = 0.999
    """Decay of the mean of the squared gradients."""

    eps: float = 1e-8
    """Added to the root of the mean of the squared gradients."""

    def __post_init__(self):
        check_options(self, "optimizer.", "learning_rate weight_decay clip spike", *NON_NEGATIVE)
        check_options(self, "optimizer.", "eps", lambda x: 0 < x < float("inf"), "be above 0 and finite")
        check_options(self, "optimizer.", "warmup end", *UNIT_INTERVAL)
        check_options(self, "optimizer.", "b1 b2", lambda x: 0 <= x < 1, "be in [0, 1)")
        check_options(self, "optimizer.", "warmup_steps decay_steps", lambda n: n >= 0, "be at least 0")
        if self.decay_steps and self.schedule != "wsd":
            raise OptionError("--optimizer.decay-steps", "is used only with --optimizer.schedule wsd")

    def count_warmup(self, steps: int) -> int:
        """Returns the number of steps over which the learning rate rises, of a training of `steps` steps."""
        return self.warmup_steps or round(self.warmup * steps)


@dataclass(frozen=True)
class NoiseConfig:
    """Noise on the encoder's input during training (denoising); the decoder reconstructs the clean text."""

    embedding: float = 0.1
    """Standard deviation of Gaussian noise on the embeddings, after their LayerNorm."""

    drop: float = 0.0
    """Probability of dropping a token."""

    substitute: float = 0.0
    """Probability of replacing a token by a random one."""

    shuffle: float = 0.0
    """Strength of the shuffling of tokens: a uniform number below this + 1 is added to each position, and the tokens are sorted by the result."""

    def __post_init__(self):
        check_options(self, "noise.", "drop substitute", lambda p: 0 <= p < 1, "be in [0, 1)")
        check_options(self, "noise.", "embedding shuffle", *NON_NEGATIVE)


@dataclass(frozen=True)
class FreeBitsConfig:
    """Free bits: KL below a target is not penalized (one of the model card's five techniques)."""

    mode: Literal["hard", "clamp", "total", "off"] = "hard"
    """hard: per text, only dimensions above the target count, as published. clamp: Kingma et al. 2016, for the batch mean of each dimension. total: the same for the total KL, as one group. off: the full KL counts."""

    target: float = 1.0
    """Free nats per dimension; with `total`, of the total KL."""

    def __post_init__(self):
        check_options(self, "free-bits.", "target", *NON_NEGATIVE)


@dataclass(frozen=True)
class PosteriorConfig:
    """Normalization of the posterior."""

    mean_scale: float = 0.0
    """BN-VAE's γ (Zhu et al. 2020): standard deviation that the posterior means are normalized to, per dimension over the batch; the mean KL is then at least L·γ²/2. 0 is off."""

    def __post_init__(self):
        check_options(self, "posterior.", "mean_scale", *NON_NEGATIVE)


@dataclass(frozen=True)
class LaggingConfig:
    """Extra encoder steps at the beginning of the training, against a lagging encoder (He et al. 2019). The paper ends
    this phase when the mutual information stops growing; here its length is given."""

    encoder_steps: int = 0
    """Number of steps of the encoder alone before each step of encoder and decoder; 0 is off."""

    until: float = 0.1
    """Fraction of the training after which this phase ends."""

    def __post_init__(self):
        check_options(self, "lagging.", "encoder_steps", lambda n: n >= 0, "be at least 0")
        check_options(self, "lagging.", "until", *UNIT_INTERVAL)


@dataclass(frozen=True)
class AdversarialConfig:
    """Adversarial training against a discriminator of latents (Makhzani et al. 2015; one of the five techniques)."""

    weight: float = 0.0
    """Weight λ of the encoder's adversarial loss."""

    learning_rate: float = 1e-4
    """Learning rate of the discriminator."""

    def __post_init__(self):
        check_options(self, "adversarial.", "weight learning_rate", *NON_NEGATIVE)

    def optimizer(self, main: OptimizerConfig) -> OptimizerConfig:
        """Returns the discriminator's optimizer, given that of encoder and decoder."""
        return with_constant_rate(main, self.learning_rate)


def with_constant_rate(main: OptimizerConfig, learning_rate: float) -> OptimizerConfig:
    """Returns the same optimizer with a constant learning rate, without weight decay or skipped steps."""
    rate = dict(learning_rate=learning_rate, schedule="constant", warmup=0.0, warmup_steps=0, decay_steps=0)
    rate |= dict(weight_decay=0.0, spike=0.0)
    return dataclasses.replace(main, **rate)


FREEZABLE = ("encoder", "decoder", "embeddings", "posterior")  # the weights of each: `training.freezing`


@dataclass(frozen=True)
class InitConfig:
    """Pretrained weights to start from, whose sizes the model has, and weights that are not trained."""

    model: str | None = None
    """Whole model: run folder, converted or published checkpoint, or Hugging Face repo id. It brings its tokenizers and all sizes; dropout is that of this run."""

    encoder: str | None = None
    """Hugging Face BERT: folder or repo id."""

    decoder: str | None = None
    """Transformer-XL in the Fengshenbang 1.1B layout: folder or repo id."""

    freeze: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PART")] = ()
    """Part whose weights stay as they are: encoder (with its posterior head), decoder (with its latent projection), embeddings (the tables of both, and the encoder's LayerNorm after them; the decoder's logits use its table too) or posterior (the posterior head). Can be given several times. The optimizer keeps nothing for them."""

    def __post_init__(self):
        for half in ("encoder", "decoder"):
            if self.model is not None and (source := getattr(self, half)) is not None:
                reason = f"{source} cannot be given with --init.model {self.model}, which has both halves"
                raise OptionError(f"--init.{half}", reason)
        if unknown := [part for part in self.freeze if part not in FREEZABLE]:
            raise OptionError("--init.freeze", f"must be one of {', '.join(FREEZABLE)}, not {unknown[0]}")
        # In one order and once, so that runs which freeze the same have the same settings.
        object.__setattr__(self, "freeze", tuple(part for part in FREEZABLE if part in self.freeze))


@dataclass(frozen=True)
class LogConfig:
    """Logging and checkpoints. These settings do not affect the trained weights."""

    every: int = 20
    """Steps between two lines of metrics.jsonl; each line contains means over these steps."""

    samples: int = 500
    """Steps between samples and reconstructions; 0: never."""

    checkpoint: int = 500
    """Steps between checkpoints. One is always saved after the last step."""

    keep: int = 2
    """Number of newest checkpoints to keep, besides the one with the lowest held-out loss."""

    held_out: int = 256
    """Number of held-out texts whose loss is computed at every checkpoint, without noise and at the highest β; 0: none."""

    figures: int = 1000
    """Number of held-out texts to evaluate on at the end; 0: no evaluation."""

    profile_steps: Annotated[tuple[int, int] | None, tyro.conf.arg(prefix_name=False)] = None
    """First and last step of a profiler trace for TensorBoard or Perfetto, counted from the start of this process, for example 10 12."""

    def __post_init__(self):
        check_options(self, "log.", "every checkpoint keep", lambda n: n >= 1, "be at least 1")
        check_options(self, "log.", "samples held_out figures", lambda n: n >= 0, "be at least 0")
        steps = self.profile_steps
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise OptionError(
                "--profile-steps", f"must be a first and a last step, such as 10 12, not {' '.join(map(str, steps))}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Trains a DAVAE on plain text. The run folder can be given to every `davae` command as a model."""

    steps: int = 20_000
    """Number of training steps."""

    batch_size: int = 64
    """Texts per step; with --data.pack, rows per step."""

    seed: int = 0
    """Random seed: determines the initial weights, the data order and all random numbers."""

    run_dir: Path | None = None
    """Run folder, for metrics, checkpoints, tokenizers and config. A run whose folder contains checkpoints resumes."""

    tokenizers: Path | None = None
    """Folder with spiece.model and vocab.txt. None: tokenizers are trained on the texts."""

    model: DAVAEConfig = field(default_factory=DAVAEConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    data: DataConfig = field(default_factory=DataConfig)
    beta: BetaConfig = field(default_factory=BetaConfig)
    free_bits: FreeBitsConfig = field(default_factory=FreeBitsConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    posterior: PosteriorConfig = field(default_factory=PosteriorConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    lagging: LaggingConfig = field(default_factory=LaggingConfig)
    regularizers: RegularizersConfig = field(default_factory=RegularizersConfig)

    plugin: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Python file that registers further regularizers (docs/regularizers.md). Can be given several times."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    init: InitConfig = field(default_factory=InitConfig)
    log: LogConfig = field(default_factory=LogConfig)

    length_weighted: bool = True
    """Divide the reconstruction loss of each text by its number of tokens, as published; off: sum over the tokens."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype (bfloat16 is mixed precision); weights and optimizer states are float32."""

    remat: Remat = "none"
    """Gradient checkpointing: the activations that a layer saves for the backward pass. none: all. dots: the results of matrix products. full: only the layer's input, which takes the least memory and, at the published size, 22 % more compute."""

    attention: Attention = "auto"
    """How the decoder's attention is computed in training. xla: on any device. mosaic_tpu: on TPUs, by kernels that never write the scores to memory. auto: at the start, one layer is computed with each that the devices can run, and the fastest of those that agree with xla is used; on a CPU, xla."""

    accumulate: int = 1
    """Gradient accumulation: number of micro-batches per step."""

    logits_chunk: int = 128
    """Number of positions of each text whose logits are in memory at once."""

    def __post_init__(self):
        check_options(self, "", "steps batch_size accumulate logits_chunk", lambda n: n >= 1, "be at least 1")
        if self.batch_size % self.accumulate:
            raise OptionError(
                "--batch-size", f"must be a multiple of --accumulate {self.accumulate}, not {self.batch_size}"
            )
        check_options(self, "", "seed", lambda n: 0 <= n < 2**32, "be an integer from 0 to 2³² − 1")
        check_integers(self, unless=("seed",))
        rest = self.steps - self.optimizer.count_warmup(self.steps)
        if self.optimizer.decay_steps > rest:
            reason = f"must be at most {rest}, the steps after the warmup, not {self.optimizer.decay_steps}"
            raise OptionError("--optimizer.decay-steps", reason)
        for name in ("decoder_vocab_size", "encoder_vocab_size") if self.init.model else ():
            if (size := getattr(self.data, name)) != getattr(DataConfig, name):
                reason = f"{size} cannot be given with --init.model {self.init.model}, which has tokenizers of its own"
                raise OptionError(f"--data.{name.replace('_', '-')}", reason)
        frozen = set(self.init.freeze)
        if {"encoder", "decoder"} <= frozen:
            raise OptionError("--init.freeze", "must leave the encoder or the decoder to train")
        if self.posterior.mean_scale and frozen & {"encoder", "posterior"}:
            raise OptionError(
                "--posterior.mean-scale", "changes the posterior head, which --init.freeze leaves as it is"
            )
        if self.lagging.encoder_steps and frozen & {"encoder", "decoder"}:
            raise OptionError(
                "--lagging.encoder-steps", "needs an encoder and a decoder that --init.freeze does not name"
            )
        if self.posterior.mean_scale and not self.data.pack and self.batch_size == self.accumulate:
            raise OptionError("--posterior.mean-scale", "needs a larger batch: a single text has no standard deviation")
