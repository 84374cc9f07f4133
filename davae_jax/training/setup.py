"""Sets up a run: everything that happens before the first step."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from davae_jax.checkpoints.run_folder import CONFIG_FILE
from davae_jax.data.batches import Batch, BatchSource, TextBatches
from davae_jax.data.corpus import Corpus, read_corpus
from davae_jax.data.inputs.readers import check_outside
from davae_jax.data.packing import PackedBatches
from davae_jax.data.prefetch import prefetch
from davae_jax.data.prepared.shard_batches import PreparedTexts, ShardBatches
from davae_jax.data.prepared.shards import is_prepared
from davae_jax.data.tokenize import filter_by_length, tokenize
from davae_jax.inference.text_vae import TextVAE
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import abstract_model, abstract_training_model, merge, split
from davae_jax.model.stack import unstack_layers
from davae_jax.parallel.agreement import (
    check_same_on_all_processes,
    gather_params,
    run_on_all_processes,
    run_on_process_zero,
)
from davae_jax.parallel.chips import Chip, find_chip
from davae_jax.parallel.multihost import is_process_zero
from davae_jax.parallel.sharding import batch_sharding, make_mesh
from davae_jax.tokenizers.decoder import DecoderTokenizer
from davae_jax.tokenizers.encoder import EncoderTokenizer
from davae_jax.tokenizers.load import load_tokenizers
from davae_jax.training.choose_attention import check_attention, choose_attention
from davae_jax.training.config import TrainConfig
from davae_jax.training.flops import model_flops
from davae_jax.training.initial_state import (
    check_model_options,
    initial_state,
    is_warm_start,
    make_warm_start,
    warm_start_config,
    whole_model_config,
    whole_model_folder,
)
from davae_jax.training.run.checkpointer import Checkpoints
from davae_jax.training.run.folder import check_tokenizers, open_run
from davae_jax.training.run.log import RunLog
from davae_jax.training.run.saved_config import digest_settings
from davae_jax.training.run.vocabularies import model_config, prepare_tokenizers
from davae_jax.training.state import TrainState, abstract_state
from davae_jax.training.step import HeldOutLoss, TrainStep, make_held_out_loss, make_train_step
from davae_jax.utils.errors import OptionError
from davae_jax.utils.locks import FolderLock

Tokenizers = tuple[EncoderTokenizer, DecoderTokenizer]


@dataclasses.dataclass(frozen=True)
class Run:
    """The components of a run that do not change after its setup; the `TrainState` contains those that do."""

    config: TrainConfig  # complete: `config.model` includes the vocabulary sizes
    folder: Path
    lock: FolderLock  # of the folder, on process 0
    corpus: Corpus
    tokenizers: Tokenizers
    graphdef: nnx.GraphDef  # of the model outside a step, with a list of layers
    mesh: Mesh
    batch_sharding: NamedSharding
    batches: BatchSource
    held_out: list[Batch]  # on the devices
    first_step: int  # number of steps taken before this start
    take_step: TrainStep  # to be called under `jax.set_mesh(mesh)`, as is held_out_loss
    held_out_loss: HeldOutLoss
    checkpoints: Checkpoints
    log: RunLog
    chip: Chip | None  # the type of the devices; None if its peak FLOP/s are not known
    flops: Callable[[tuple[int, int]], int]  # model FLOPs of a step on a batch of shape (S, T)

    def text_vae(self, state: TrainState) -> TextVAE | None:
        """Returns the current model, unsharded on one device of process 0; None on the other processes.

        All processes must call this method.
        """
        params = unstack_layers(gather_params(state.params))
        if not is_process_zero():
            return None
        vae = TextVAE(merge(self.graphdef, params), *self.tokenizers)
        vae.batch_size = 256
        return vae


def set_up(config: TrainConfig, lock: FolderLock) -> tuple[Run, TrainState]:
    """Reads the texts, opens and locks the run folder and returns the run with its first state, new or restored.

    The texts are read, and errors in them raised, before any file is written.

    Raises:
      InputError: an option, a file or a folder cannot be used.
    """
    if (folder := config.run_dir) is None:
        raise OptionError("--run-dir", "must name the folder of the run")
    run_on_all_processes(lambda: check_model_options(config))
    mesh, corpus = run_on_all_processes(lambda: (_make_mesh(config), load_corpus(config)))
    check_same_on_all_processes("the options", digest_settings(config))
    check_same_on_all_processes("the texts", corpus.digest)
    check_same_on_all_processes("the held-out texts", corpus.held_out_digest)
    run_on_process_zero(lambda: _prepare_folder(config, folder, corpus, lock))
    if config.init.model:
        model = run_on_all_processes(lambda: whole_model_config(config, whole_model_folder(config, folder)))
    else:
        model = run_on_all_processes(lambda: model_config(config, folder))
    if is_warm_start(config):
        run_on_process_zero(lambda: make_warm_start(config, model, folder))
        model = run_on_all_processes(lambda: warm_start_config(model, folder))
    config = dataclasses.replace(config, model=model)
    config = dataclasses.replace(config, attention=choose_attention(config, mesh.shape))
    tokenizers, batches, held_out = run_on_all_processes(lambda: _tokenize(config, corpus, folder))
    corpus = corpus._replace(held_out=held_out)
    run_on_process_zero(lambda: model.to_json(folder / CONFIG_FILE))

    module = abstract_training_model(model, dtype=config.dtype)
    graphdef = split(module)[0]
    abstract = abstract_state(module, config, mesh)
    checkpoints = Checkpoints(folder, config.log.keep, on_complete=_print_saved if is_process_zero() else None)
    if checkpoints.step:
        state, pending_log = checkpoints.restore(abstract)
    else:
        state, pending_log = initial_state(abstract, model, config, folder), []
    chip = find_chip(jax.devices()[0].device_kind)
    rows = batch_sharding(mesh)
    run = Run(
        config=config,
        folder=folder,
        lock=lock,
        corpus=corpus,
        tokenizers=tokenizers,
        graphdef=split(abstract_model(model, dtype=config.dtype))[0],
        mesh=mesh,
        batch_sharding=rows,
        batches=batches,
        held_out=held_out_batches(config, corpus.held_out, tokenizers, model, rows),
        first_step=checkpoints.step,
        take_step=make_train_step(graphdef, config, abstract, batches.count),
        held_out_loss=make_held_out_loss(graphdef, config, abstract),
        checkpoints=checkpoints,
        log=RunLog(
            folder,
            config.log.every,
            step=checkpoints.step,
            pending=pending_log,
            peak_flops=chip and chip.flops * jax.device_count(),
            last_checkpoint=lambda: checkpoints.last,
        ),
        chip=chip,
        # Batches have only a few shapes, so the FLOPs are counted once per shape, not at every step.
        flops=functools.cache(functools.partial(model_flops, config)),
    )
    return run, state


def _make_mesh(config: TrainConfig) -> Mesh:
    """Returns the run's mesh. Raises InputError if it does not fit, or its devices cannot compute as they should."""
    mesh = make_mesh(config.mesh, config.batch_size, config.accumulate)
    check_attention(config.attention, mesh.devices.flat[0])
    return mesh


def _print_saved(checkpoint: Path) -> None:
    """Prints the path of a complete checkpoint at once: if the run is lost later, the output names the newest."""
    tqdm.write(f"saved {checkpoint}")
    sys.stdout.flush()


def load_corpus(config: TrainConfig) -> Corpus:
    """Returns the texts that a config names. Raises InputError if a file cannot be used."""
    data = config.data
    if config.run_dir:
        folders = [*(data.train or ()), *(data.valid or ())]
        check_outside(config.run_dir, [folder for folder in folders if not is_prepared(folder)], "--run-dir")
    return read_corpus(data.train, data.valid, data.field, data.encoding, data.max_bad)


def _prepare_folder(config: TrainConfig, folder: Path, corpus: Corpus, lock: FolderLock) -> None:
    open_run(folder, config, corpus, lock)
    prepare_tokenizers(config, folder, corpus)
    check_tokenizers(folder)


def _tokenize(config: TrainConfig, corpus: Corpus, folder: Path) -> tuple[Tokenizers, BatchSource, list[str]]:
    """Returns the run's tokenizers, its source of batches, and the held-out texts that are not too long for it."""
    tokenizers = load_tokenizers(folder, config.model)
    batches = make_batches(config, corpus, tokenizers, config.model)
    held_out = filter_by_length(corpus.held_out, *tokenizers, config.data.max_length, truncate=config.data.truncate)
    return tokenizers, batches, held_out


def make_batches(config: TrainConfig, corpus: Corpus, tokenizers: Tokenizers, model: DAVAEConfig) -> BatchSource:
    """Returns the source of training batches for a config. Raises InputError if no text can be used."""
    longest, positions = config.data.max_length, model.encoder.max_position_embeddings
    common = dict(batch_size=config.batch_size, pad_id=model.pad_token_id, seed=config.seed)
    texts = None
    if corpus.prepared is None:
        texts = tokenize(
            corpus.train, *tokenizers, max_length=longest, source=corpus.source, truncate=config.data.truncate
        )
        texts = texts._replace(lines=corpus.lines[texts.lines - 1], files=corpus.files)
    if config.data.pack:
        texts = texts or PreparedTexts(corpus.prepared, longest, positions)
        return PackedBatches(texts, row_length=longest, **common)
    buckets = config.data.buckets or (1 if config.data.train is None else 4)
    if texts is None:
        return ShardBatches(corpus.prepared, max_length=longest, buckets=buckets, encoder_positions=positions, **common)
    return TextBatches(texts, buckets=buckets, encoder_positions=positions, **common)


def held_out_batches(
    config: TrainConfig, texts: list[str], tokenizers: Tokenizers, model: DAVAEConfig, sharding: NamedSharding
) -> list[Batch]:
    """Returns the held-out texts on the devices, in batches of one shape, each as large as a micro-batch.

    At most `config.log.held_out` texts are used, without a rest that fills no batch. None may be too long
    (`filter_by_length`).
    """
    texts = texts[: config.log.held_out]
    if not texts:
        return []
    rows = tokenize(texts, *tokenizers, max_length=config.data.max_length, source="", truncate=config.data.truncate)
    source = TextBatches(
        rows,
        config.batch_size // config.accumulate,
        pad_id=model.pad_token_id,
        seed=config.seed,
        encoder_positions=model.encoder.max_position_embeddings,
    )
    batches = prefetch(source, sharding, first_step=0)
    return [next(batches) for _ in range(source.steps_per_epoch)]


def truncation_mismatch(config: TrainConfig, corpus: Corpus) -> str | None:
    """Returns a warning if --truncate of the prepared texts does not match --data.segment-length, or None."""
    if corpus.prepared is None or corpus.prepared.truncated == config.data.truncate:
        return None
    if config.data.truncate:
        return f"{corpus.source}: was prepared without --truncate, so texts too long for the encoder are missing"
    return (
        f"{corpus.source}: was prepared with --truncate, for --data.segment-length; "
        "the encoder reads only the beginning of long texts"
    )


def unsharded_weights(model: DAVAEConfig, mesh: Mapping[str, int]) -> str | None:
    """Returns a warning about weights that cannot be sharded over the mesh, or None."""
    problems, fsdp, tensor = [], mesh["fsdp"], mesh["tensor"]
    feed_forward = model.encoder.intermediate_size, 4 * model.decoder.hidden_size
    for name, section, F in zip(("encoder", "decoder"), (model.encoder, model.decoder), feed_forward, strict=True):
        D, V = section.hidden_size, section.vocab_size
        if D % fsdp:
            problems.append(f"--mesh.fsdp {fsdp} does not divide the {name}'s width {D}")
        if D % tensor and F % tensor and V % tensor:
            problems.append(f"--mesh.tensor {tensor} divides none of the {name}'s widths {D}, {F} and {V}")
    return f"{'; '.join(problems)}: those weights are replicated on every device" if problems else None
