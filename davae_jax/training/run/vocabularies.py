"""Provides the tokenizers of a run, and derives vocabulary sizes and special ids of the model from them."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from davae_jax.checkpoints.hub import resolve_source
from davae_jax.checkpoints.run_folder import complete_checkpoints, config_folder
from davae_jax.data.config import DataConfig
from davae_jax.data.corpus import Corpus
from davae_jax.model.config import DAVAEConfig, EncoderConfig
from davae_jax.tokenizers.decoder import count_pieces
from davae_jax.tokenizers.encoder import read_vocabulary
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.tokenizers.training import sample_first, train_sentencepiece, train_wordpiece
from davae_jax.training.config import TrainConfig
from davae_jax.utils.errors import InputError, OptionError
from davae_jax.utils.files import write_bytes
from davae_jax.utils.shapes import round_up

DEMO_DECODER_VOCAB_SIZE, DECODER_VOCAB_SIZE = 600, 8000  # if the config does not set it


def prepare_tokenizers(config: TrainConfig, folder: Path, corpus: Corpus) -> None:
    """Puts vocab.txt and spiece.model into the run folder, unless they exist.

    They come from the prepared texts, from --tokenizers, from the pretrained model or its halves, or are trained on the
    corpus, in this order.

    Raises:
      InputError: the given folder has no tokenizers, or not those that the texts were prepared with; or the run has
        checkpoints, but lacks one of the two files.
    """
    trainers = (
        partial(train_wordpiece, vocab_size=config.data.encoder_vocab_size),
        partial(
            train_sentencepiece,
            vocab_size=decoder_vocab_size(config),
            option="--data.decoder-vocab-size",
            source=corpus.source,
        ),
    )
    for name, pretrained, trainer in zip(TOKENIZER_FILES, _pretrained(config), trainers, strict=True):
        if (folder / name).is_file():
            continue
        if complete_checkpoints(folder):
            raise InputError(f"{folder / name}: is missing, and the checkpoints of this run cannot be used without it")
        source = config.tokenizers or (config_folder(resolve_source(pretrained)) if pretrained else None)
        if config.init.model and config.tokenizers:
            _check_same_tokenizer(config, name)
        if corpus.prepared:
            _check_same_file(corpus.prepared.folder / name, source and source / name)
            source = corpus.prepared.folder
        if source is None:
            write_bytes(folder / name, trainer(sample_first(corpus.train)))
        elif (source / name).is_file():
            write_bytes(folder / name, (source / name).read_bytes())
        else:
            raise OptionError("--tokenizers", f"must be a folder with {name}; there is no {source / name}")


def _pretrained(config: TrainConfig) -> tuple[str | None, str | None]:
    """Returns the sources of the pretrained encoder and decoder, which may be one model."""
    return config.init.model or config.init.encoder, config.init.model or config.init.decoder


def _check_same_tokenizer(config: TrainConfig, name: str) -> None:
    """Raises OptionError if a file of --tokenizers differs from that of --init.model, whose ids the weights know."""
    of_model, given = config_folder(resolve_source(config.init.model)) / name, config.tokenizers / name
    if of_model.is_file() and given.is_file() and of_model.read_bytes() != given.read_bytes():
        raise OptionError("--tokenizers", f"{given} differs from {of_model} of --init.model, which brings its own")


def _check_same_file(prepared: Path, given: Path | None) -> None:
    """Raises OptionError if --tokenizers differs from the tokenizer that the texts were prepared with."""
    if given and given.is_file() and prepared.is_file() and given.read_bytes() != prepared.read_bytes():
        raise OptionError(
            "--tokenizers",
            f"{given.parent}: its {given.name} differs from the tokenizer that {prepared.parent} was prepared with; "
            f"prepare the texts with --tokenizers {given.parent}",
        )


def model_config(config: TrainConfig, folder: Path) -> DAVAEConfig:
    """Returns the model's config, completed by the tokenizers in the run folder and the settings of the loss."""
    vocab, spiece = (folder / name for name in TOKENIZER_FILES)
    vocabulary = read_vocabulary(vocab)
    cls_id, sep_id = (vocabulary.index(token) if token in vocabulary else 0 for token in ("[CLS]", "[SEP]"))
    model = with_vocabularies(config.model, len(vocabulary), count_pieces(spiece))
    return with_loss_settings(dataclasses.replace(model, cls_token_id=cls_id, sep_token_id=sep_id), config)


def with_loss_settings(model: DAVAEConfig, config: TrainConfig) -> DAVAEConfig:
    """Returns the model's config with the run's settings of the loss and of the length of texts."""
    return dataclasses.replace(
        model,
        fb_mode=1 if config.free_bits.mode == "hard" else 0,
        dim_target_kl=config.free_bits.target,
        length_weighted_loss=config.length_weighted,
        # Texts as long as the training texts can be generated.
        max_out_length=max(model.max_out_length, config.data.max_length),
    )


def with_vocabularies(model: DAVAEConfig, encoder_vocab_size: int, decoder_vocab_size: int) -> DAVAEConfig:
    """Returns the config for tokenizers of these sizes.

    Embedding tables have a multiple of 64 rows. The ids of the decoder's three special tokens follow those of
    SentencePiece.
    """
    n = decoder_vocab_size
    return dataclasses.replace(
        model,
        encoder=dataclasses.replace(model.encoder, vocab_size=round_up(encoder_vocab_size, 64)),
        decoder=dataclasses.replace(model.decoder, vocab_size=round_up(n + 3, 64)),
        **dict(end_token_id=n, pad_token_id=n + 1, bos_token_id=n + 2),
    )


def decoder_vocab_size(config: TrainConfig) -> int:
    """Returns the size of the decoder's vocabulary if its tokenizer is trained."""
    default = DEMO_DECODER_VOCAB_SIZE if config.data.train is None else DECODER_VOCAB_SIZE
    return config.data.decoder_vocab_size or default


def expected_vocabularies(config: TrainConfig, preset: str) -> tuple[int, int, str]:
    """Returns the vocabulary sizes of encoder and decoder before a run exists, and a description of their source.

    Tokenizers are looked up in the same folders as by a run, if these exist on this machine.
    """
    vocab, spiece = (
        _find_tokenizer_file(config, name, source)
        for name, source in zip(TOKENIZER_FILES, _pretrained(config), strict=True)
    )
    encoder_size = len(read_vocabulary(vocab)) if vocab else config.data.encoder_vocab_size
    # A plan may lack the texts; only the demo then uses the synthetic corpus.
    other_texts = preset != "demo" and config.data.train is None
    trained = config.data.decoder_vocab_size or DECODER_VOCAB_SIZE if other_texts else decoder_vocab_size(config)
    decoder_size = count_pieces(spiece) if spiece else trained
    if vocab and spiece:
        folders = " and ".join(dict.fromkeys([str(vocab.parent), str(spiece.parent)]))
        return encoder_size, decoder_size, f"tokenizers in {folders}"
    data = config.data
    sizes_given = data.decoder_vocab_size is not None or data.encoder_vocab_size != DataConfig.encoder_vocab_size
    if preset != "demo" and not (vocab or spiece or sizes_given):
        published = EncoderConfig.vocab_size, DAVAEConfig.end_token_id
        return *published, "published tokenizers; without --tokenizers, a run trains its own"
    prefix = f"one tokenizer from {(vocab or spiece).parent}, the other " if vocab or spiece else ""
    return encoder_size, decoder_size, f"{prefix}trained on the texts; may become smaller"


def _find_tokenizer_file(config: TrainConfig, name: str, pretrained: str | None) -> Path | None:
    if config.tokenizers:
        return config.tokenizers / name
    folders = (*(config.data.train or ()), pretrained and config_folder(Path(pretrained)))
    return next((folder / name for folder in folders if folder and (folder / name).is_file()), None)
