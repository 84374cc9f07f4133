"""Loads the two tokenizers in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from davae_jax.tokenizers.decoder import DecoderTokenizer
from davae_jax.tokenizers.encoder import EncoderTokenizer
from davae_jax.utils.errors import InputError

if TYPE_CHECKING:
    from davae_jax.model.config import DAVAEConfig

TOKENIZER_FILES = ("vocab.txt", "spiece.model")


def load_tokenizers(folder: Path, config: DAVAEConfig) -> tuple[EncoderTokenizer, DecoderTokenizer]:
    """Returns the encoder's and the decoder's tokenizer in a folder.

    Raises:
      InputError: a file is missing or damaged, or contains more tokens than the model's vocabulary.
    """
    vocab, spiece = (folder / name for name in TOKENIZER_FILES)
    encoder = EncoderTokenizer(
        folder,
        cls_id=config.cls_token_id,
        sep_id=config.sep_token_id,
        max_ids=config.encoder.max_position_embeddings - 2,
    )
    decoder = DecoderTokenizer(
        folder, bos_id=config.bos_token_id, end_id=config.end_token_id, pad_id=config.pad_token_id
    )
    largest = max(decoder.size - 1, config.bos_token_id, config.end_token_id, config.pad_token_id)
    if encoder.size > config.encoder.vocab_size:
        raise InputError(
            f"{vocab}: {encoder.size} entries, but config's encoder.vocab_size is {config.encoder.vocab_size}"
        )
    if largest >= config.decoder.vocab_size:
        raise InputError(
            f"{spiece}: ids up to {largest}, but config's decoder.vocab_size is {config.decoder.vocab_size}"
        )
    return encoder, decoder
