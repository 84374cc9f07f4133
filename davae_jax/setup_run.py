"""What a run needs before its first step: texts, tokenizers, the model's config, the first weights."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from davae_jax import demo_corpus
from davae_jax.checkpoint import CONFIG_FILE, TOKENIZER_FILES, converter, from_pretrained
from davae_jax.config import DAVAEConfig
from davae_jax.data import read_texts
from davae_jax.errors import InputError
from davae_jax.model import DAVAE, InitKeys, Params, abstract_model, split
from davae_jax.tokenizer_training import train_tokenizers
from davae_jax.tokenizers import count_pieces, read_vocabulary
from davae_jax.train_config import TrainConfig

HELD_OUT_PART = 0.01  # of the training texts, where no others are given to measure on
TOKENIZER_TEXTS = 50_000  # at most, to train tokenizers on


class Corpus(NamedTuple):
    train: list[str]
    held_out: list[str]  # what training never shows
    language: Container[str] | None  # the sentences that the grammar accepts, where there is a grammar
    source: str  # the file, for messages
    lines: np.ndarray  # of each training text, its line there

    @property
    def example(self) -> str:
        return next((text for text in self.held_out if text.strip()), self.train[0])


def read_corpus(config: TrainConfig) -> Corpus:
    """The demo's corpus, or the files that the config names. Raises InputError on a file that cannot be used."""
    if config.data.train is None:
        train, held_out, language = demo_corpus.make_corpus()
        return Corpus(train, held_out, language, "the demo's corpus", np.arange(1, len(train) + 1))
    texts = read_texts(config.data.train, config.data.field)
    lines = np.flatnonzero([bool(text.strip()) for text in texts]) + 1
    source = str(config.data.train)
    if config.data.valid is not None:
        held_out = [text for text in read_texts(config.data.valid, config.data.field) if text.strip()]
        return Corpus([texts[i - 1] for i in lines], held_out, None, source, lines)
    # The same texts whatever the run's seed, so that runs can be compared.
    order = np.random.default_rng(0).permutation(len(lines))
    kept = round(HELD_OUT_PART * len(lines))
    chosen, rest = np.sort(order[:kept]), np.sort(order[kept:])
    return Corpus([texts[lines[i] - 1] for i in rest], [texts[lines[i] - 1] for i in chosen], None, source, lines[rest])


def prepare_tokenizers(config: TrainConfig, run_dir: Path, texts: Sequence[str], start: Path | None) -> None:
    """Puts vocab.txt and spiece.model into the run's folder: those given, a warm start's own, or newly trained ones."""
    if all((run_dir / name).is_file() for name in TOKENIZER_FILES):
        return
    folders = [config.tokenizers, start]
    missing = []
    for name in TOKENIZER_FILES:
        source = next((f / name for f in folders if f is not None and (f / name).is_file()), None)
        if source is None:
            missing.append(name)
        else:
            shutil.copyfile(source, run_dir / name)
    if config.tokenizers is not None and missing:
        raise InputError(f"{config.tokenizers}: holds no {' and no '.join(missing)}", exit_code=2)
    if start is not None and missing:
        raise InputError(f"the sources of the warm start hold no {' and no '.join(missing)}; give --tokenizers DIR")
    if missing:
        train_tokenizers(texts[:TOKENIZER_TEXTS], run_dir, pieces=config.data.pieces, entries=config.data.entries)


def model_config(config: TrainConfig, run_dir: Path, start: Path | None) -> DAVAEConfig:
    """The config's model with what the run's tokenizers and loss decide; a warm start's own sizes."""
    if start is not None:
        return DAVAEConfig.from_json(start / CONFIG_FILE)
    vocab, spiece = (run_dir / name for name in TOKENIZER_FILES)
    entries, pieces, model = read_vocabulary(vocab), count_pieces(spiece), config.model
    cls_id, sep_id = (entries.index(token) if token in entries else 0 for token in ("[CLS]", "[SEP]"))
    return dataclasses.replace(
        model,
        encoder=dataclasses.replace(model.encoder, vocab_size=_round_up(len(entries))),
        decoder=dataclasses.replace(model.decoder, vocab_size=_round_up(pieces + 3)),
        cls_token_id=cls_id,
        sep_token_id=sep_id,
        end_token_id=pieces,
        pad_token_id=pieces + 1,
        bos_token_id=pieces + 2,
        fb_mode=1 if config.free_bits.mode == "hard" else 0,
        dim_target_kl=config.free_bits.target,
        length_weighted_loss=config.length_weighted,
    )


def warm_start(config: TrainConfig, run_dir: Path) -> Path | None:
    """The folder of a checkpoint made from the pretrained halves that the config names; says what was taken."""
    if config.init.encoder is None and config.init.decoder is None:
        return None
    folder = run_dir / "init"
    if not folder.exists():
        module = converter("warm_start")
        settings = run_dir / "init.json"
        config.model.to_json(settings)
        report = module.warm_start(
            folder, encoder=config.init.encoder, decoder=config.init.decoder, config=settings, seed=config.seed
        )
        settings.unlink()
        print(module.format_report(report, dataclasses.asdict(config.init)))
    return folder


def new_params(config: DAVAEConfig, train: TrainConfig, start: Path | None) -> tuple[nnx.GraphDef, Params]:
    """The model's description, which computes in the run's dtype, and its first weights, in float32."""
    graphdef, _ = split(abstract_model(config, dtype=jnp.dtype(train.dtype)))
    if start is not None:
        return graphdef, split(from_pretrained(start))[1]
    # Drawn in one compiled program: thousands of small ones take longer.
    draw = jax.jit(lambda key: split(DAVAE(config, rngs=InitKeys(key)))[1])
    return graphdef, draw(jax.random.key(train.seed))


def _round_up(n: int, multiple: int = 64) -> int:
    return -(-n // multiple) * multiple
