"""The configuration of a DAVAE: reads the published config.json unchanged and writes it back without loss."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

from davae_jax.utils.errors import ConfigError, InputError, OptionError
from davae_jax.utils.files import write_json
from davae_jax.utils.json_files import read_json_object

# Bounds of what a config.json may ask for, far above any model: a damaged file must not make a program build for hours.
LAYERS, MAX_LAYERS = ("num_layers", "num_hidden_layers"), 1000
MAX_SIZE = 1 << 24  # of widths, vocabularies, positions

# A field without an option on the command line of train.py: the tokenizers or another option determine it.
T_ = TypeVar("T_")
Hidden = Annotated[T_, tyro.conf.Suppress]


@dataclass(frozen=True)
class EncoderConfig:
    """A BERT encoder. The defaults are the published ones, BERT-base Chinese."""

    vocab_size: Hidden[int] = 21128
    hidden_size: int = 768
    """Width."""

    num_hidden_layers: int = 12
    """Number of layers."""

    num_attention_heads: int = 12
    """Number of attention heads, which divides the width."""

    intermediate_size: int = 3072
    """Width of the feed-forward layers."""

    max_position_embeddings: int = 512
    """Number of positions: the maximum length of a text in encoder tokens, special tokens included."""

    type_vocab_size: Hidden[int] = 2
    hidden_act: Hidden[str] = "gelu"
    layer_norm_eps: float = 1e-12
    """Added to the variance in every LayerNorm."""

    hidden_dropout_prob: float = 0.1
    """Dropout of the embeddings and of the output of each sublayer."""

    attention_probs_dropout_prob: float = 0.1
    """Dropout of the attention probabilities."""

    pad_token_id: Hidden[int] = 0
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    extra: Hidden[dict[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        _require_positive("encoder", self, "vocab_size hidden_size num_hidden_layers num_attention_heads")
        _require_positive("encoder", self, "intermediate_size max_position_embeddings type_vocab_size")
        _require_heads_divide("encoder", self)
        _require_probability("encoder", self, "hidden_dropout_prob attention_probs_dropout_prob")
        if self.hidden_act != "gelu":
            raise ConfigError(
                "encoder", "hidden_act", f"is {self.hidden_act!r}; only 'gelu' (the erf form) is supported"
            )
        if self.pad_token_id != 0:
            raise ConfigError("encoder", "pad_token_id", "must be 0: the attention mask is `ids > 0`")
        _require_positive_eps("encoder", self)


@dataclass(frozen=True)
class DecoderConfig:
    """A Transformer-XL decoder with relative positions and a recurrent memory.

    The defaults are the published ones, with 1.1 billion weights.
    """

    vocab_size: Hidden[int] = 50048
    num_layers: int = 32
    """Number of layers."""

    hidden_size: int = 1600
    """Width; an even number."""

    num_attention_heads: int = 25
    """Number of attention heads, which divides the width."""

    embedding_dropout_prob: float = 0.1
    """Dropout of the embeddings and of the position features."""

    attention_dropout_prob: Hidden[float] = 0.1  # of the published file, whose program does not use it
    output_dropout_prob: float = 0.1
    """Dropout of the output of each sublayer."""

    max_sequence_length: Hidden[int] = 512
    max_memory_length: int = 512
    """Number of past tokens in the recurrent memory."""

    layer_norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm."""

    latent_every_layer: bool = True
    """Add the latent before every layer, as published; off: before the first alone."""

    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    latent_initializer_scale: float = 1.0
    """Factor of initializer_range for the projection of the latent. At 1, the noise of the latent is initially √L times
    as large as a token embedding. Use a value near 0 if the decoder is pretrained, or still has to learn the
    language."""

    extra: Hidden[dict[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        _require_positive("decoder", self, "vocab_size num_layers hidden_size num_attention_heads max_sequence_length")
        _require_heads_divide("decoder", self)
        _require_probability("decoder", self, "embedding_dropout_prob attention_dropout_prob output_dropout_prob")
        if self.hidden_size % 2:
            raise ConfigError("decoder", "hidden_size", f"is {self.hidden_size}; sines and cosines need an even width")
        if not 0 <= self.latent_initializer_scale < math.inf:
            reason = f"is {self.latent_initializer_scale}; it must be 0 or more and finite"
            raise ConfigError("decoder", "latent_initializer_scale", reason)
        if not 0 <= self.max_memory_length <= MAX_SIZE:
            reason = f"is {reprlib.repr(self.max_memory_length)}; it must be in [0, {MAX_SIZE}]"
            raise ConfigError("decoder", "max_memory_length", reason)
        _require_positive_eps("decoder", self)
        if self.extra.get("relative_encoding", True) is not True:
            raise ConfigError("decoder", "relative_encoding", "must be true; other decoders are not supported")


@dataclass(frozen=True)
class DAVAEConfig:
    """The configuration of the whole model. Sampling fields default to the fallbacks of the published program."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    latent_size: int = 256
    """Number of latent dimensions."""

    # Loss.
    fb_mode: Hidden[int] = 1
    dim_target_kl: Hidden[float] = 1.0
    length_weighted_loss: Hidden[bool] = True

    # Defaults of the commands for sampling.
    temperature: float = 1.0
    """Default sampling temperature: logits are divided by it."""

    top_k: int = 50
    """Default number of most likely tokens to sample from; 0 is off."""

    top_p: float = 1.0
    """Default for nucleus sampling: total probability of the most likely tokens to sample from; 0 is off."""

    repetition_penalty: float = 1.0
    """Default repetition penalty: above 1, tokens that the text contains already become less likely."""

    std_scale: float = 1.0
    """Default factor of the posterior's standard deviation when a text is varied; 0 uses the posterior mean."""

    max_out_length: int = 100
    """Default maximum number of tokens of a generated text."""

    # Special tokens: two of the encoder, three of the decoder.
    cls_token_id: Hidden[int] = 101
    sep_token_id: Hidden[int] = 102
    end_token_id: Hidden[int] = 50000
    pad_token_id: Hidden[int] = 50001
    bos_token_id: Hidden[int] = 50002

    extra: Hidden[dict[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        _require_positive("", self, "latent_size max_out_length")
        if self.fb_mode not in (0, 1, 2):
            raise ConfigError("", "fb_mode", f"is {self.fb_mode!r}; it must be 0, 1 or 2")
        if not self.std_scale >= 0:
            raise ConfigError("", "std_scale", f"is {self.std_scale!r}; it cannot be negative")
        _require_ids(self, "cls_token_id sep_token_id end_token_id pad_token_id bos_token_id")
        try:
            check_sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty)
        except OptionError as e:
            raise ConfigError("", e.option, e.reason) from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DAVAEConfig:
        """Reads a parsed config.json. Unknown keys of each section are kept in its `extra`.

        Raises:
          ConfigError: a field that determines a shape is missing, or a value is not allowed.
        """
        values = dict(values)
        sections = {}
        for name, section_class in (("encoder", EncoderConfig), ("decoder", DecoderConfig)):
            if not isinstance(values.get(name), dict):
                raise ConfigError("", name, "is missing; it must be a section")
            sections[name] = _from_dict(section_class, values.pop(name), name, _REQUIRED[name])
        return _from_dict(cls, values, "", _REQUIRED[""], **sections)

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as plain values: the inverse of `from_dict`."""
        return _to_dict(self)

    @classmethod
    def from_json(cls, path: str | Path) -> DAVAEConfig:
        """Reads a config.json.

        Raises:
          InputError: the file is missing, is not JSON, lacks a field that determines a shape, or contains a value that
            is not allowed; the message names the file.
        """
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except ConfigError as e:
            raise ConfigError(e.section, e.field, e.reason, file=path) from None
        except OverflowError:
            raise InputError(f"{path}: contains a number that is too large") from None

    def to_json(self, path: str | Path) -> None:
        """Writes config.json, unknown keys included, in the published layout."""
        write_json(Path(path), self.to_dict())


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a config.json. Raises InputError naming the file if it is missing or does not contain a JSON object."""
    try:
        return read_json_object(Path(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a model folder needs its config.json") from None


# Fields that a config.json must have: those that determine the shape of a tensor, and the length of the memory.
_REQUIRED = {
    "encoder": [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
    ],
    "decoder": ["vocab_size", "num_layers", "hidden_size", "num_attention_heads", "max_memory_length"],
    "": ["latent_size"],
}


SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty")


def check_sampling(temperature: float, top_k: int, top_p: float, repetition_penalty: float) -> None:
    """Raises OptionError, with the argument's name, for the first sampling setting that is out of its range."""
    smallest, largest = 1e-30, 1e30  # within this range, float32 logits stay finite
    if not smallest <= temperature <= largest:
        raise OptionError("temperature", f"must be above 0 and finite in float32, not {temperature}")
    if top_k < 0 or top_k != int(top_k):
        raise OptionError("top_k", f"must be an integer of 0 (off) or more, not {top_k}")
    if not 0 <= top_p <= 1:
        raise OptionError("top_p", f"must be in [0, 1], not {top_p}")
    if not smallest <= repetition_penalty <= largest:
        raise OptionError("repetition_penalty", f"must be above 0 and finite in float32, not {repetition_penalty}")


def _from_dict(cls, values: dict[str, Any], section: str, required: list[str], **sections):
    """Builds a section from its parsed values, or, given its `sections`, the whole configuration."""
    if missing := [name for name in required if values.get(name) is None]:
        first, *others = missing
        raise ConfigError(section, first, "is missing" + (f", and so are {', '.join(others)}" if others else ""))
    types = {name: kind for name, kind in get_type_hints(cls).items() if name != "extra"}
    known, extra = dict(sections), {}
    for name, value in values.items():
        if name in types and value is not None:
            known[name] = _convert(value, types[name], section, name)
        else:
            extra[name] = value
    return cls(**known, extra=extra)


def _convert(value, kind: type, section: str, name: str):
    """Returns a value as the field's type. JSON writes 1.0 as 1, and some programs write 12 as 12.0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int and is_number and value == int(value):
        return int(value)
    if kind is float and is_number:
        return float(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    raise ConfigError(section, name, f"is {reprlib.repr(value)}, not of type {kind.__name__}")


def _to_dict(config) -> dict[str, Any]:
    values = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name == "extra":
            values.update(value)
        else:
            values[f.name] = _to_dict(value) if dataclasses.is_dataclass(value) else value
    return values


def _require_positive(section: str, config, names: str) -> None:
    for name in names.split():
        value, largest = getattr(config, name), MAX_LAYERS if name in LAYERS else MAX_SIZE
        if value < 1:
            raise ConfigError(section, name, f"is {value}; it must be at least 1")
        if value > largest:
            raise ConfigError(section, name, f"is {reprlib.repr(value)}; it must be at most {largest}")


def _require_positive_eps(section: str, config) -> None:
    if not config.layer_norm_eps > 0:
        raise ConfigError(section, "layer_norm_eps", f"is {config.layer_norm_eps}; it must be above 0")


def _require_probability(section: str, config, names: str) -> None:
    for name in names.split():
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(section, name, f"is {getattr(config, name)}; it must be in [0, 1)")


def _require_ids(config, names: str) -> None:
    # Ids are not compared with the vocabulary sizes here, because a model without tokenizers may have a smaller
    # vocabulary than the published ids. Tokenizers are compared with the model when they are loaded.
    for name in names.split():
        if not 0 <= getattr(config, name) < 1 << 31:
            raise ConfigError("", name, f"is {reprlib.repr(getattr(config, name))}; an id must be in [0, 2³¹)")


def _require_heads_divide(section: str, config) -> None:
    if config.hidden_size % config.num_attention_heads:
        reason = f"{config.num_attention_heads} does not divide hidden_size {config.hidden_size}"
        raise ConfigError(section, "num_attention_heads", reason)


# Which activations of a layer are saved for the backward pass (gradient checkpointing); the rest is recomputed.
Remat = Literal["none", "dots", "full"]

# How the decoder's attention is computed. xla: by XLA's operations, on any device; the reference. mosaic_tpu: by
# kernels for TPUs that never write the scores to memory (`attention_tpu`). auto: a training run tries the others on its
# devices and chooses one (`training.choose_attention`); where none has been chosen, it is xla.
Attention = Literal["auto", "xla", "mosaic_tpu"]

# How the matrices of encoder and decoder are stored for inference (`model.quantized`). float32: in the model's dtype.
WeightFormat = Literal["float32", "bfloat16", "int8"]
