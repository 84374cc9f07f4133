"""The one declaration of everything a training run can be told. The command line and its help come from here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from davae_jax.model.config import DAVAEConfig, Remat
from davae_jax.parallel.config import DistributedConfig, MeshConfig
from davae_jax.regularizers import active, options_type
from davae_jax.utils.errors import OptionError, check_options
from davae_jax.utils.settings import changed_settings

BUILT_IN = options_type()  # the command line's has those of plugins as well


@dataclass(frozen=True)
class DataConfig:
    train: Path | None = None
    """Texts to train on, UTF-8, one a line, or JSON Lines; or a folder that `davae prepare` has made. None: the corpus
    that the project itself generates."""

    valid: Path | None = None
    """Texts to measure on. None: a part of the training texts is kept for it."""

    field: str = "text"
    """Where in a line of JSON the text is."""

    max_length: int = 128
    """Longer texts are left out; in tokens of the decoder, the beginning and the end counted."""

    buckets: int | None = None
    """Shapes that batches come in, by the texts' length; each compiles a program of its own. None: 4, and 1 for the
    project's own corpus, whose texts are of about one length."""

    pack: bool = False
    """Several texts in a row, each with a latent of its own, so that hardly anything is padding. Rows are as long as
    the longest text may be."""

    segment_length: int | None = None
    """Longer texts are learnt in segments of so many tokens, the decoder's recurrent memory between them and one latent
    for all; the encoder then reads as much of a text's beginning as it has positions for. None: in one piece."""

    segment_mask: Literal["full", "published"] = "full"
    """What a token sees of the memory. full: all of it. published: no farther back than a segment is long."""

    pieces: int | None = None
    """Size of the decoder's vocabulary, where tokenizers are trained. None: 8000, and 600 for the project's own
    corpus."""

    entries: int = 8000
    """Size of the encoder's vocabulary, where tokenizers are trained."""

    @property
    def cut(self) -> bool:
        """Whether texts longer than the encoder's positions are kept: those of several segments."""
        return self.segment_length is not None

    def __post_init__(self):
        check_options(self, "data.", "max_length", lambda n: n >= 3, "be at least 3")
        check_options(self, "data.", "buckets", lambda n: n is None or n >= 1, "be at least 1")
        check_options(self, "data.", "segment_length", lambda n: n is None or n >= 1, "be at least 1")
        check_options(self, "data.", "pieces", lambda n: n is None or n >= 10, "be at least 10")
        check_options(self, "data.", "entries", lambda n: n >= 10, "be at least 10")
        if self.pack and self.buckets is not None:
            raise OptionError("--data.buckets", "is used only without --data.pack")
        if self.pack and self.segment_length is not None:
            raise OptionError("--data.segment-length", "is used only without --data.pack")
        if self.valid is not None and self.train is None:
            raise OptionError("--data.valid", "is used only with --data.train")


@dataclass(frozen=True)
class BetaConfig:
    """The KL's weight β: a trapezoid (Li et al. 2020, Optimus), repeated for cyclical annealing (Fu et al. 2019).

    A period holds `start` for `ratio_zero` of its steps, rises to `max` over `ratio_increase` of them, and stays there.
    """

    start: float = 1e-4
    """β at a period's beginning."""

    max: float = 0.1
    """β at its end. Equal to `start`: constant (Higgins et al. 2017)."""

    ratio_zero: float = 0.05
    """Part of a period that stays at `start`."""

    ratio_increase: float = 0.5
    """Part of a period over which β rises."""

    cycles: int = 1
    """Periods in the whole training; 1 is the plain trapezoid."""

    shape: Literal["linear", "sigmoid"] = "linear"
    """How β rises. sigmoid: as the logistic function from −5 to 5 (Bowman et al. 2016), scaled to begin and end exactly
    at `start` and `max`."""

    def __post_init__(self):
        check_options(self, "beta.", "start max", lambda x: 0 <= x < float("inf"), "be 0 or more and finite")
        check_options(self, "beta.", "cycles", lambda n: n >= 1, "be at least 1")
        if not (self.ratio_zero >= 0 and self.ratio_increase >= 0 and self.ratio_zero + self.ratio_increase <= 1):
            raise OptionError(
                "--beta.ratio-zero",
                f"{self.ratio_zero} and --beta.ratio-increase {self.ratio_increase} must be 0 or more, and their sum "
                "at most 1",
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """Of encoder and decoder. The defaults are the published settings."""

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    """Loshchilov & Hutter 2019; Shazeer & Stern 2018; Jordan 2024, for the matrices inside the layers, AdamW for the
    rest."""

    learning_rate: float = 5e-5
    """The highest one."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warmup: down to `end` along a cosine, or as it is."""

    warmup: float = 0.01
    """Part of all steps over which the rate rises from 0."""

    end: float = 0.1
    """The cosine's last rate, as a part of the highest."""

    weight_decay: float = 0.1
    """Of matrices; biases and LayerNorms decay never."""

    clip: float = 1.0
    """Largest global norm of the gradient; 0 is off."""

    spike: float = 0.0
    """Skip a step whose gradient's norm is over so many times its running mean; 0 is off."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        finite = "learning_rate weight_decay clip spike"
        check_options(self, "optimizer.", finite, lambda x: 0 <= x < float("inf"), "be 0 or more and finite")
        check_options(self, "optimizer.", "eps", lambda x: 0 < x < float("inf"), "be above 0 and finite")
        check_options(self, "optimizer.", "warmup end", lambda x: 0 <= x <= 1, "lie in [0, 1]")
        check_options(self, "optimizer.", "b1 b2", lambda x: 0 <= x < 1, "lie in [0, 1)")


@dataclass(frozen=True)
class NoiseConfig:
    """What is done to the encoder's input in training; the decoder has to give back the clean text."""

    embedding: float = 0.1
    """Standard deviation of the Gaussian noise on the embeddings, after their LayerNorm."""

    drop: float = 0.0
    """Probability that a token is left out."""

    substitute: float = 0.0
    """Probability that a token is replaced by a random one."""

    shuffle: float = 0.0
    """How far a token may move: each place gets a uniform draw below this + 1 added, and the places are sorted."""

    def __post_init__(self):
        check_options(self, "noise.", "drop substitute", lambda p: 0 <= p < 1, "lie in [0, 1)")
        check_options(self, "noise.", "embedding shuffle", lambda x: 0 <= x < float("inf"), "be 0 or more and finite")


@dataclass(frozen=True)
class FreeBitsConfig:
    """What of the KL counts (one of the model card's five measures)."""

    mode: Literal["hard", "clamp", "total", "off"] = "hard"
    """hard: of each text, the dimensions above the target, as published. clamp: Kingma et al. 2016, each dimension's
    mean over the batch. total: the same of the whole KL, as one group. off: all of it."""

    target: float = 1.0
    """Nats a dimension may carry for nothing; with total, all of them together."""

    def __post_init__(self):
        check_options(self, "free-bits.", "target", lambda x: 0 <= x < float("inf"), "be 0 or more and finite")


@dataclass(frozen=True)
class PosteriorConfig:
    """What is done to the posterior before it is used."""

    mean_scale: float = 0.0
    """γ of BN-VAE (Zhu et al. 2020): the means' deviation over a batch, in each dimension; the mean KL is then at least
    L·γ²/2. 0: as the encoder gives them."""

    def __post_init__(self):
        check_options(self, "posterior.", "mean_scale", lambda x: 0 <= x < float("inf"), "be 0 or more and finite")


@dataclass(frozen=True)
class LaggingConfig:
    """More steps for the encoder than for the decoder at first (He et al. 2019). The paper ends this when the mutual
    information no longer grows; here the part of the training is said."""

    encoder_steps: int = 0
    """Steps of the encoder alone before each one of both; 0 is off."""

    until: float = 0.1
    """Part of the training after which every step is one of both."""

    def __post_init__(self):
        check_options(self, "lagging.", "encoder_steps", lambda n: n >= 0, "be at least 0")
        check_options(self, "lagging.", "until", lambda x: 0 <= x <= 1, "lie in [0, 1]")


@dataclass(frozen=True)
class AdversarialConfig:
    """Training in the latent space against a discriminator (Makhzani et al. 2015; one of the five measures)."""

    weight: float = 0.0
    """λ: what the encoder's adversarial loss is multiplied by."""

    learning_rate: float = 1e-4
    """The discriminator's own."""

    def __post_init__(self):
        both = "weight learning_rate"
        check_options(self, "adversarial.", both, lambda x: 0 <= x < float("inf"), "be 0 or more and finite")

    def optimizer(self, main: OptimizerConfig) -> OptimizerConfig:
        return with_own_rate(main, self.learning_rate)


def with_own_rate(main: OptimizerConfig, learning_rate: float) -> OptimizerConfig:
    """As the main one, with a constant rate of its own and no decay."""
    rate = dict(learning_rate=learning_rate, schedule="constant", warmup=0.0, weight_decay=0.0, spike=0.0)
    return dataclasses.replace(main, **rate)


@dataclass(frozen=True)
class InitConfig:
    """Pretrained halves to start from; the run's model takes their sizes."""

    encoder: str | None = None
    """Hugging Face BERT: folder or repo id."""

    decoder: str | None = None
    """Transformer-XL in the Fengshenbang 1.1B layout: folder or repo id."""


@dataclass(frozen=True)
class LogConfig:
    """What is written when. Changes nothing of what is learnt."""

    every: int = 20
    """Steps between two lines of metrics.jsonl; each is the mean over them."""

    samples: int = 500
    """Steps between two looks at samples and reconstructions; 0 is never."""

    checkpoint: int = 500
    """Steps between two checkpoints. The last step always has one."""

    keep: int = 2
    """Checkpoints to keep, the newest; and the one of the lowest held-out loss."""

    held_out: int = 256
    """Texts whose loss is measured, without noise and at the highest β, at every checkpoint; 0 is none."""

    figures: int = 1000
    """Texts to measure on at the end; 0 is no figures."""

    profile_steps: Annotated[tuple[int, int] | None, tyro.conf.arg(prefix_name=False)] = None
    """First and last step of a trace for TensorBoard or Perfetto, counted from the start: 10 12."""

    def __post_init__(self):
        check_options(self, "log.", "every checkpoint keep", lambda n: n >= 1, "be at least 1")
        steps = self.profile_steps
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise OptionError(
                "--profile-steps", f"must be a first and a last step, such as 10 12, not {' '.join(map(str, steps))}"
            )
        check_options(self, "log.", "samples held_out figures", lambda n: n >= 0, "be at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """Trains a DAVAE, from plain text to a checkpoint that every `davae` command reads."""

    steps: int = 20_000
    """Updates in all."""

    batch_size: int = 64
    """Texts a step; with --data.pack, rows."""

    seed: int = 0
    """Of the initial weights, the data's order and every draw."""

    run_dir: Path | None = None
    """Folder of the run: metrics, checkpoints, tokenizers, config. Started again on the same one, a run resumes."""

    tokenizers: Path | None = None
    """Folder with spiece.model and vocab.txt. None: trained on the texts."""

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
    regularizers: BUILT_IN = field(default_factory=BUILT_IN)

    plugin: tuple[Path, ...] = ()
    """Python file that registers regularizers of its own (docs/regularizers.md). May be given several times."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    init: InitConfig = field(default_factory=InitConfig)
    log: LogConfig = field(default_factory=LogConfig)

    length_weighted: bool = True
    """A text's reconstruction loss is divided by its number of tokens, as published; with --no it is their sum."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What to compute in; weights and optimizers are float32."""

    remat: Remat = "none"
    """Gradient checkpointing, what is kept of a layer for the backward pass. none: everything. dots: the results of its
    matrix products. full: its input alone, the least memory and, at the published size, 22 % more work."""

    accumulate: int = 1
    """Parts a batch is computed in, one after the other: a large batch in little memory."""

    logits_chunk: int = 128
    """Positions of each text whose logits are in memory at once."""

    def __post_init__(self):
        check_options(self, "", "steps batch_size accumulate logits_chunk", lambda n: n >= 1, "be at least 1")
        if self.batch_size % self.accumulate:
            raise OptionError(
                "--batch-size", f"must be a multiple of --accumulate {self.accumulate}, not {self.batch_size}"
            )
        check_options(self, "", "seed", lambda n: 0 <= n < 2**32, "be a whole number from 0 to 2³² − 1")
        if self.posterior.mean_scale and not self.data.pack and self.batch_size == self.accumulate:
            raise OptionError("--posterior.mean-scale", "needs a larger batch: a single text has no standard deviation")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values only, as the run's train.json has them; of the regularizers, those that are on."""
    values = dataclasses.asdict(config)
    values["regularizers"] = {name: dataclasses.asdict(one) for name, one in active(config.regularizers).items()}
    return json.loads(json.dumps(values, default=str))


# Where something lies: texts and tokenizers are compared by their contents, of pretrained halves whether there are any.
PLACES = ("data.train", "data.valid", "tokenizers", "init.encoder", "init.decoder")


def digest_of(config: TrainConfig) -> str:
    """Of all that processes of one run must have in common, places aside."""
    values = to_dict(config)
    del values["distributed"]
    for name in PLACES:
        section, _, field = name.rpartition(".")
        where = values[section] if section else values
        where[field] = where[field] is not None
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# What changes no result. Of plugins the text is compared (`run_folder.open_run`), not the place.
NOT_COMPARED = ("run_dir", "log", "mesh", "distributed", "plugin")


def differences(old: dict[str, Any], new: dict[str, Any], besides: Collection[str] = ()) -> list[str]:
    """Returns the settings in which two runs' configs differ, as `utils.settings.changed_settings` gives them.

    A setting that one of them does not have (another version wrote it) counts as at its default.
    """
    return changed_settings(old, new, defaults=to_dict(TrainConfig()), ignored=(*NOT_COMPARED, *besides))
