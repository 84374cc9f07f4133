"""Models of given sizes for the benchmarks, with random weights, in JAX and in PyTorch: their speed is that of any."""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from benchmarks.common import positive
from davae_jax.checkpoints.published.to_torch import export
from davae_jax.checkpoints.run_folder import CONFIG_FILE, PARAMS_FOLDER
from davae_jax.checkpoints.weights import flat_params, save_weights
from davae_jax.data.demo_corpus import make_corpus
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import DAVAE, InitKeys, abstract_model, merge, split
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.tokenizers.training import SPECIAL_TOKENS, train_sentencepiece, train_wordpiece

# Options of train.py for the smallest training that has everything; `write_texts` makes its texts.
SMALLEST_TRAINING = shlex.split(
    "--batch-size 4 --data.decoder-vocab-size 400 --data.encoder-vocab-size 400 --data.buckets 1 --data.max-length 64 "
    "--model.latent-size 4 --model.encoder.hidden-size 16 --model.encoder.num-hidden-layers 1 "
    "--model.encoder.intermediate-size 16 --model.decoder.hidden-size 16 --model.decoder.num-layers 1 "
    "--model.max-out-length 12"
)

VOCABULARY = 400  # of the tokenizers that `write_texts` makes
# Ids of tokenizers that are trained, for `dataclasses.replace` of a model's config.
TRAINED_IDS = {"cls_token_id": SPECIAL_TOKENS.index("[CLS]"), "sep_token_id": SPECIAL_TOKENS.index("[SEP]")}


def resize(
    config: DAVAEConfig, *, encoder: dict | None = None, decoder: dict | None = None, latent_size: int | None = None
) -> DAVAEConfig:
    """Returns the config with other sizes of encoder, decoder and latent; the heads keep their width where it divides.

    Args:
      encoder, decoder: any of `layers`, `width` and `vocab`.
    """
    encoder, decoder = encoder or {}, decoder or {}
    e, d = config.encoder, config.decoder
    width = encoder.get("width", e.hidden_size)
    e = replace(
        e,
        num_hidden_layers=encoder.get("layers", e.num_hidden_layers),
        hidden_size=width,
        intermediate_size=e.intermediate_size * width // e.hidden_size,
        num_attention_heads=_heads(e, width),
        vocab_size=encoder.get("vocab", e.vocab_size),
    )
    width = decoder.get("width", d.hidden_size)
    d = replace(
        d,
        num_layers=decoder.get("layers", d.num_layers),
        hidden_size=width,
        num_attention_heads=_heads(d, width),
        vocab_size=decoder.get("vocab", d.vocab_size),
    )
    if "vocab" in decoder:  # the three special ids are the last ones
        n = d.vocab_size
        config = replace(config, end_token_id=n - 3, pad_token_id=n - 2, bos_token_id=n - 1)
    return replace(config, encoder=e, decoder=d, latent_size=latent_size or config.latent_size)


def _heads(section, width: int) -> int:
    """Returns the number of heads for a width."""
    head = section.hidden_size // section.num_attention_heads
    return width // head if width % head == 0 else 1


def add_sizes(parser: argparse.ArgumentParser, config: DAVAEConfig) -> None:
    """Adds the options --layers, --width and --vocab of a decoder, with the sizes of a config."""
    decoder = config.decoder
    for name, default in (
        ("layers", decoder.num_layers),
        ("width", decoder.hidden_size),
        ("vocab", decoder.vocab_size),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"of the decoder ({default})")


def random_model(config: DAVAEConfig) -> DAVAE:
    """Returns a new model."""
    params = jax.jit(lambda: split(DAVAE(config, rngs=InitKeys(jax.random.key(0))))[1])()
    return merge(split(abstract_model(config))[0], params)


def decoder_weights(model: DAVAE) -> list:
    """Returns the weights that a step of decoding reads: the decoder's without `relative`, which is applied once."""
    return [w for path, w in flat_params(model).items() if path.startswith("decoder.") and ".relative." not in path]


def random_twin(config: DAVAEConfig):
    """Returns a PyTorch twin of this config with PyTorch's initial weights, for evaluation.

    PyTorch's threads wait without spinning, if it is not imported yet: a product takes ten times as long where one
    spins for another that has no core, and JAX's threads may have it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from davae_jax.parity.twin import Twin

    return Twin(config.to_dict()).eval()


def write_published(config: DAVAEConfig, folder: Path) -> Path:
    """Writes a new model in the published layout, in float16, without tokenizers. Returns the folder."""
    with tempfile.TemporaryDirectory() as name:
        weights = {path: np.asarray(w) for path, w in flat_params(random_model(config)).items()}
        save_weights(Path(name) / PARAMS_FOLDER, [weights], {"buffers": ["inv_freq"]})
        config.to_json(Path(name) / CONFIG_FILE)
        return export(name, folder)


def write_texts(folder: Path, count: int, *, tokenizers: bool = False) -> Path:
    """Writes a file of sentences of the demo's corpus, and with `tokenizers` small ones beside it. Returns the file."""
    corpus = make_corpus().train
    texts = [corpus[i % len(corpus)] for i in range(count)]
    file = folder / "texts.txt"
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    if tokenizers:
        contents = train_wordpiece(corpus[:1000], VOCABULARY), train_sentencepiece(corpus[:1000], VOCABULARY, option="")
        for name, content in zip(TOKENIZER_FILES, contents, strict=True):
            (folder / name).write_bytes(content)
    return file
