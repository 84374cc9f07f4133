"""What a run needs before its first step: texts, tokenizers, the model's config, the first weights."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from davae_jax.checkpoints.hub import resolve_source
from davae_jax.checkpoints.pretrained import from_pretrained
from davae_jax.checkpoints.run_folder import CONFIG_FILE
from davae_jax.data import demo_corpus
from davae_jax.data.batches import Batches
from davae_jax.data.packing import PackedBatches
from davae_jax.data.shard_batches import PreparedBatches, PreparedTexts
from davae_jax.data.shards import Prepared
from davae_jax.data.texts import read_texts
from davae_jax.data.tokenize import tokenize
from davae_jax.model.config import DAVAEConfig, EncoderConfig
from davae_jax.model.davae import DAVAE, InitKeys, split
from davae_jax.tokenizers.decoder import DecoderTokenizer, count_pieces
from davae_jax.tokenizers.encoder import EncoderTokenizer, read_vocabulary
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.tokenizers.training import train_sentencepiece, train_wordpiece
from davae_jax.training.config import DataConfig, TrainConfig
from davae_jax.training.state import TrainState, init_state
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import write_bytes
from davae_jax.utils.shapes import round_up

HELD_OUT_PART = 0.01  # of the training texts, where no others are given to measure on
DEMO_PIECES, PIECES = 600, 8000  # of the decoder's vocabulary, where the config leaves it open
# What no tensor's shape depends on.
RUNTIME_FIELDS = {
    "encoder": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
    "decoder": [
        *["embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob"],
        *["latent_every_layer", "latent_initializer_scale", "max_memory_length"],
    ],
}
TOKENIZER_TEXTS = 50_000  # at most, to train tokenizers on


class Corpus(NamedTuple):
    train: list[str]
    held_out: list[str]  # what training never shows
    language: Container[str] | None  # the sentences that the grammar accepts, where there is a grammar
    triple: list[str]  # three texts to show an analogy with; of the demo, a text, its opposite, and another
    source: str  # the file, for messages
    lines: np.ndarray  # of each training text, its line there
    prepared: Prepared | None = None  # what is trained on instead of `train`

    @property
    def digest(self) -> str:
        """Of the training texts and their order."""
        if self.prepared:
            return self.prepared.digest
        return hashlib.sha256("\n".join(self.train).encode()).hexdigest()[:16]

    @property
    def held_out_digest(self) -> str:
        """Of the texts to measure on."""
        return hashlib.sha256("\n".join(self.held_out).encode()).hexdigest()[:16]

    @property
    def example(self) -> str:
        return (self.held_out or self.train or [""])[0]

    @property
    def analogy(self) -> list[str]:
        return self.triple or (self.held_out * 3)[:3]


def read_corpus(config: TrainConfig) -> Corpus:
    """The demo's corpus, or the files that the config names. Raises InputError on a file that cannot be used."""
    if config.data.train is None:
        train, held_out, language = demo_corpus.make_corpus()
        good = [text for text in held_out if language[text].good]
        analogy = [good[0], demo_corpus.opposite(good[0], language), good[1]]
        return Corpus(train, held_out, language, analogy, "the demo's corpus", np.arange(1, len(train) + 1))
    if config.data.train.is_dir():
        prepared, valid = Prepared(config.data.train), config.data.valid
        held_out = prepared.held_out() if valid is None else read_texts(valid, config.data.field)
        held_out = [text for text in held_out if text.strip()]
        return Corpus([], held_out, None, [], str(config.data.train), np.zeros(0, int), prepared)
    texts = read_texts(config.data.train, config.data.field)
    lines = np.flatnonzero([bool(text.strip()) for text in texts]) + 1
    source = str(config.data.train)
    if config.data.valid is not None:
        held_out = [text for text in read_texts(config.data.valid, config.data.field) if text.strip()]
        return Corpus([texts[i - 1] for i in lines], held_out, None, [], source, lines)
    # The same texts whatever the run's seed, so that runs can be compared; and all copies of each.
    distinct = list(dict.fromkeys(texts[i - 1] for i in lines))
    order = np.random.default_rng(0).permutation(len(distinct))
    held_out = [distinct[i] for i in np.sort(order[: round(HELD_OUT_PART * len(distinct))])]
    kept_apart = set(held_out)
    lines = np.array([i for i in lines if texts[i - 1] not in kept_apart])
    return Corpus([texts[i - 1] for i in lines], held_out, None, [], source, lines)


def batches_of(
    config: TrainConfig, corpus: Corpus, tokenizers: tuple[EncoderTokenizer, DecoderTokenizer], model: DAVAEConfig
) -> Batches | PackedBatches | PreparedBatches:
    """The batch of every step, as the config lays it out. Raises InputError where no text can be used."""
    longest, common = config.data.max_length, _batching(config, model)
    texts = None
    if corpus.prepared is None:
        texts = tokenize(corpus.train, *tokenizers, max_length=longest, source=corpus.source, truncate=config.data.cut)
        texts = texts._replace(lines=corpus.lines[texts.lines - 1])
    if config.data.pack:
        positions = model.encoder.max_position_embeddings
        texts = texts or PreparedTexts(corpus.prepared, longest, positions)
        return PackedBatches(texts, row_length=longest, **common)
    common |= dict(
        buckets=config.data.buckets or (1 if config.data.train is None else 4),
        encoder_positions=model.encoder.max_position_embeddings,
    )
    if texts is None:
        return PreparedBatches(corpus.prepared, max_length=longest, **common)
    return Batches(texts, **common)


def held_out_batches(
    config: TrainConfig, texts: list[str], tokenizers: tuple[EncoderTokenizer, DecoderTokenizer], model: DAVAEConfig
) -> Batches:
    """Batches of one shape, of texts that fit, each as large as a part of a training batch."""
    rows = tokenize(texts, *tokenizers, max_length=config.data.max_length, source="", truncate=config.data.cut)
    common = _batching(config, model) | dict(batch_size=config.batch_size // config.accumulate)
    return Batches(rows, encoder_positions=model.encoder.max_position_embeddings, **common)


def _batching(config: TrainConfig, model: DAVAEConfig) -> dict[str, Any]:
    return dict(batch_size=config.batch_size, pad_id=model.pad_token_id, seed=config.seed)


def prepare_tokenizers(config: TrainConfig, run_dir: Path, corpus: Corpus) -> None:
    """Puts vocab.txt and spiece.model into the run's folder: those of prepared texts, those given, a pretrained half's
    own, or new ones.

    Raises:
      InputError: a folder that is named has none, or others than the texts were prepared with.
    """
    sizes = dict(vocab_size=config.data.entries), dict(vocab_size=pieces_of(config), option="--data.pieces")
    trained = partial(train_wordpiece, **sizes[0]), partial(train_sentencepiece, **sizes[1])
    halves = (config.init.encoder, config.init.decoder)
    for name, half, train in zip(TOKENIZER_FILES, halves, trained, strict=True):
        if (run_dir / name).is_file():
            continue
        source = config.tokenizers or (resolve_source(half) if half else None)
        if corpus.prepared:
            source = _same_tokenizer(corpus.prepared.folder / name, source and source / name).parent
        if source is None:
            write_bytes(run_dir / name, train(corpus.train[:TOKENIZER_TEXTS]))
        elif (source / name).is_file():
            write_bytes(run_dir / name, (source / name).read_bytes())
        else:
            raise InputError(f"{source / name}: no such file; give a folder that has it with --tokenizers", exit_code=2)


def _same_tokenizer(prepared: Path, given: Path | None) -> Path:
    """The file of the prepared folder. Raises InputError where another is asked for."""
    if given and given.is_file() and prepared.is_file() and given.read_bytes() != prepared.read_bytes():
        said = f"{given}: is not what {prepared.parent} was prepared with"
        raise InputError(f"{said}; prepare with --tokenizers {given.parent}", exit_code=2)
    return prepared


def model_config(config: TrainConfig, run_dir: Path) -> DAVAEConfig:
    """The config's model with what the run's tokenizers and loss decide."""
    vocab, spiece = (run_dir / name for name in TOKENIZER_FILES)
    entries = read_vocabulary(vocab)
    cls_id, sep_id = (entries.index(token) if token in entries else 0 for token in ("[CLS]", "[SEP]"))
    model = with_vocabularies(config.model, len(entries), count_pieces(spiece))
    return dataclasses.replace(
        model,
        cls_token_id=cls_id,
        sep_token_id=sep_id,
        fb_mode=1 if config.free_bits.mode == "hard" else 0,
        dim_target_kl=config.free_bits.target,
        length_weighted_loss=config.length_weighted,
        max_out_length=max(model.max_out_length, config.data.max_length),  # what was learnt can be generated
    )


def with_vocabularies(model: DAVAEConfig, entries: int, pieces: int) -> DAVAEConfig:
    """The model for tokenizers of these sizes: table rows in 64s, the decoder's own tokens after its pieces."""
    return dataclasses.replace(
        model,
        encoder=dataclasses.replace(model.encoder, vocab_size=round_up(entries, 64)),
        decoder=dataclasses.replace(model.decoder, vocab_size=round_up(pieces + 3, 64)),
        **dict(end_token_id=pieces, pad_token_id=pieces + 1, bos_token_id=pieces + 2),
    )


def vocabularies(config: TrainConfig, preset: str) -> tuple[int, int, str]:
    """(entries, pieces, whose they are): sizes of the tokenizers that a run will have, before there is one."""
    of_halves = config.init.encoder, config.init.decoder
    vocab, spiece = (_tokenizer_file(config, name, half) for name, half in zip(TOKENIZER_FILES, of_halves, strict=True))
    entries = len(read_vocabulary(vocab)) if vocab else config.data.entries
    # A plan need not name the texts; those of the demo are the demo's alone.
    trained = config.data.pieces or PIECES if preset != "demo" and config.data.train is None else pieces_of(config)
    pieces = count_pieces(spiece) if spiece else trained
    if vocab and spiece:
        return entries, pieces, f"those of {' and '.join(dict.fromkeys([str(vocab.parent), str(spiece.parent)]))}"
    asked = config.data.pieces is not None or config.data.entries != DataConfig.entries
    if preset != "demo" and not (vocab or spiece or asked):
        published = EncoderConfig.vocab_size, DAVAEConfig.end_token_id
        return *published, "the published ones, for --tokenizers; without it a run trains its own"
    of = f"one of {(vocab or spiece).parent}, the other " if vocab or spiece else ""
    return entries, pieces, f"{of}trained on the texts, and may become smaller"


def _tokenizer_file(config: TrainConfig, name: str, half: str | None) -> Path | None:
    """Where a run would take it from, as far as that lies here."""
    if config.tokenizers:
        return config.tokenizers / name
    places = (folder / name for folder in (config.data.train, half and Path(half)) if folder)
    return next((path for path in places if path.is_file()), None)


def truncation_mismatch(config: TrainConfig, corpus: Corpus) -> str | None:
    """Where training reads long texts in another way than they were prepared for, for a warning."""
    if corpus.prepared is None or corpus.prepared.truncated == config.data.cut:
        return None
    if config.data.cut:
        return f"{corpus.source}: was prepared without --truncate, so texts too long for the encoder are not in it"
    return (
        f"{corpus.source}: was prepared with --truncate, for --data.segment-length: "
        "the encoder sees only the beginning of long texts"
    )


def pieces_of(config: TrainConfig) -> int:
    """Of a decoder's tokenizer that is trained."""
    return config.data.pieces or (DEMO_PIECES if config.data.train is None else PIECES)


def unsharded_weights(model: DAVAEConfig, mesh: Mapping[str, int]) -> str | None:
    """Which weights stay whole although the mesh should split them, for a warning."""
    said, fsdp, tensor = [], mesh["fsdp"], mesh["tensor"]
    inner = model.encoder.intermediate_size, 4 * model.decoder.hidden_size
    for half, part, F in zip(("encoder", "decoder"), (model.encoder, model.decoder), inner, strict=True):
        D, V = part.hidden_size, part.vocab_size
        if D % fsdp:
            said.append(f"--mesh.fsdp {fsdp} does not divide the {half}'s width {D}")
        if D % tensor and F % tensor and V % tensor:
            said.append(f"--mesh.tensor {tensor} divides none of the {half}'s widths {D}, {F} and {V}")
    return f"{'; '.join(said)}: weights that stay whole on every device" if said else None


def warm_start(config: TrainConfig, model: DAVAEConfig, run_dir: Path) -> None:
    """Makes `init/` in the run's folder, a checkpoint from the pretrained halves, and says what was taken."""
    from davae_jax.checkpoints.warm_start import format_report
    from davae_jax.checkpoints.warm_start import warm_start as warm_start_checkpoint

    folder = run_dir / "init"
    if not folder.exists():
        settings = run_dir / "init.json"
        model.to_json(settings)
        halves = dataclasses.asdict(config.init)
        report = warm_start_checkpoint(folder, config=settings, seed=config.seed, **halves)
        settings.unlink()
        print(format_report(report, halves))


def warm_started(model: DAVAEConfig, run_dir: Path) -> DAVAEConfig:
    """The config of what `warm_start` made: a pretrained half brings its own sizes, the run says how it is trained."""
    made = DAVAEConfig.from_json(run_dir / "init" / CONFIG_FILE)
    told = {
        part: dataclasses.replace(getattr(made, part), **{name: getattr(getattr(model, part), name) for name in names})
        for part, names in RUNTIME_FIELDS.items()
    }
    return dataclasses.replace(made, **told)


def first_state(abstract: TrainState, config: DAVAEConfig, train: TrainConfig, run_dir: Path) -> TrainState:
    """The state before the first step, every array made where it is to lie: freshly drawn weights, or imported ones."""
    places = jax.tree.map(lambda x: x.sharding, abstract)
    if train.init.encoder or train.init.decoder:
        params = split(from_pretrained(run_dir / "init", mesh=places.step.mesh))[1]
        return jax.jit(partial(init_state, config=train), out_shardings=places, donate_argnums=0)(params)
    # Drawn in one compiled program: thousands of small ones take longer.
    draw = lambda key: init_state(split(DAVAE(config, rngs=InitKeys(key)))[1], train)  # noqa: E731
    return jax.jit(draw, out_shardings=places)(jax.random.key(train.seed))
