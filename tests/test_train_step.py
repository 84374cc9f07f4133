"""One training step: the objective is what its formula says, and each optimizer moves its own weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_model import CONFIG, new_model

from davae_jax.checkpoints.weights import flatten
from davae_jax.data.batches import Batch
from davae_jax.data.config import DataConfig
from davae_jax.model.davae import abstract_model, abstract_training_model, split
from davae_jax.model.latent import kl_per_dimension
from davae_jax.model.stack import stack_layers, unstack_layers
from davae_jax.training.config import AdversarialConfig, FreeBitsConfig, NoiseConfig, TrainConfig
from davae_jax.training.objective import StepContext, free_bits_kl, gradient, objective
from davae_jax.training.optimizers import make_optimizer, skip_spikes
from davae_jax.training.state import init_state
from davae_jax.training.step import make_train_step

KEY = jax.random.key(3)
END, PAD, BOS = CONFIG.end_token_id, CONFIG.pad_token_id, CONFIG.bos_token_id
DECODER_IDS = np.array([[BOS, 4, 5, 6, END], [BOS, 7, END, PAD, PAD]], np.int32)
BATCH = Batch.of_texts(np.array([[2, 9, 8, 7, 3], [2, 5, 3, 0, 0]], np.int32), DECODER_IDS, np.array([5, 3], np.int32))
# No dropout, so that the formula can be worked out beside it.
MODEL = dataclasses.replace(
    CONFIG,
    encoder=dataclasses.replace(CONFIG.encoder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    decoder=dataclasses.replace(
        CONFIG.decoder, num_layers=1, embedding_dropout_prob=0.0, attention_dropout_prob=0.0, output_dropout_prob=0.0
    ),
)
CLEAN = TrainConfig(steps=10, noise=NoiseConfig(embedding=0.0), free_bits=FreeBitsConfig(mode="off"))


def with_(config=CLEAN, **changes):
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def model():
    return new_model(MODEL, scale=4.0)


def value(model, config, beta=0.3, batch=BATCH, key=KEY):
    graphdef, params = split(model)
    context = StepContext(key, jnp.float32(beta))
    terms = jax.jit(objective, static_argnums=(1, 4))(params, graphdef, batch, context, config)
    logs = terms.logs | {"loss": terms.model_loss}
    return float(terms.total), {name: np.asarray(v, np.float64) for name, v in logs.items()}


def test_the_objective_is_its_formula(model):
    """rec / length + β·KL + λ·L_g, mean over the batch, and L_d, from the model's public parts."""
    config = with_(adversarial=AdversarialConfig(weight=0.7))
    loss, logs = value(model, config)
    posterior = model.encode(BATCH.encoder_ids)
    keys = jax.random.split(KEY, 6)
    z = posterior.sample(keys[3])
    log_p = np.asarray(jax.nn.log_softmax(model.decode(DECODER_IDS, z)[0]))
    targets = [[4, 5, 6, END], [7, END]]  # the end token is trained, padding is not
    rec = [-np.mean([log_p[row, t, i] for t, i in enumerate(ids)]) for row, ids in enumerate(targets)]
    kl = np.asarray(kl_per_dimension(posterior)).sum(-1)
    sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))  # noqa: E731
    fake, real = model.discriminate(z), model.discriminate(jax.random.normal(keys[5], z.shape))
    loss_d, loss_g = -np.log(1 - sigmoid(fake)).mean() - np.log(sigmoid(real)).mean(), -np.log(sigmoid(fake)).mean()
    expected = dict(rec=np.mean(rec), kl=kl.mean(), kl_unmasked=kl.mean(), loss_d=loss_d, loss_g=loss_g)
    for name, number in expected.items():
        assert logs[name] == pytest.approx(number, rel=1e-4), name
    assert logs["loss"] == pytest.approx(np.mean(rec) + 0.3 * kl.mean() + 0.7 * loss_g, rel=1e-4)
    assert loss == pytest.approx(logs["loss"] + loss_d, rel=1e-5)


def test_without_length_weighting_a_text_counts_whole(model):
    _, per_token = value(model, CLEAN, beta=0.0)
    _, whole = value(model, with_(length_weighted=False), beta=0.0)
    assert whole["rec"] == per_token["rec"]
    assert whole["loss"] > 1.9 * per_token["loss"]


def test_padding_changes_nothing(model):
    wide = Batch.of_texts(
        np.pad(BATCH.encoder_ids, ((0, 0), (0, 3))),
        np.pad(DECODER_IDS, ((0, 0), (0, 3)), constant_values=PAD),
        BATCH.lengths[:, 0],
    )
    assert value(model, CLEAN, batch=wide)[0] == pytest.approx(value(model, CLEAN)[0], rel=1e-5)


def test_free_bits():
    kl_BL = jnp.array([[0.2, 0.6, 3.0], [0.4, 0.8, 0.0]])
    count = lambda mode, target: np.asarray(  # noqa: E731
        free_bits_kl(kl_BL, FreeBitsConfig(mode=mode, target=target))
    )
    np.testing.assert_allclose(count("off", 0.5), [3.8, 1.2], rtol=1e-6)
    np.testing.assert_allclose(count("hard", 0.5), [3.6, 0.8], rtol=1e-6)  # each text by itself
    np.testing.assert_allclose(count("clamp", 0.5), [0.5 + 0.7 + 1.5] * 2, rtol=1e-6)  # the batch's means
    np.testing.assert_allclose(count("total", 2.0), [2.5] * 2, rtol=1e-6)  # of 3.8 and 1.2, above the target
    np.testing.assert_allclose(count("total", 2.7), [2.7] * 2, rtol=1e-6)


def test_embedding_noise_and_token_noise_reach_the_encoder(model):
    clean = value(model, CLEAN)[1]["kl"]
    assert value(model, with_(noise=NoiseConfig(embedding=0.5)))[1]["kl"] != pytest.approx(clean, rel=1e-3)
    assert value(model, with_(noise=NoiseConfig(embedding=0.0, substitute=0.9)))[1]["kl"] != pytest.approx(
        clean, rel=1e-3
    )


def test_the_latent_at_every_layer_or_at_the_first_alone(model):
    """What the model computes with it off, from the layers themselves."""
    once = new_model(
        dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, latent_every_layer=False)), scale=4.0
    )
    z = jax.random.normal(KEY, (2, MODEL.latent_size))
    ids = DECODER_IDS
    every = model.decode(ids, z)[0]
    only_first = once.decode(ids, z)[0]
    assert np.abs(every - only_first).max() > 1e-3
    # Without a latent, and with one whose term is 0, both are the same model.
    np.testing.assert_allclose(model.decode(ids, None)[0], once.decode(ids, None)[0], rtol=1e-6)
    np.testing.assert_allclose(model.decode(ids, 0 * z)[0], once.decode(ids, 0 * z)[0], rtol=1e-6)
    from davae_jax import generate

    greedy = generate(once, z, max_length=8, top_k=1)
    logits = once.decode(np.array([greedy[0]]), z[:1])[0]
    assert greedy[0][1:] == np.asarray(logits.argmax(-1))[0, : len(greedy[0]) - 1].tolist()


def gradients(model, config):
    graphdef, params = split(model)
    return jax.jit(gradient, static_argnums=(1, 4))(
        params, graphdef, BATCH, StepContext(KEY, jnp.float32(0.3)), config
    )[0]


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_each_loss_reaches_its_own_weights(model):
    """λ changes the encoder's gradient but neither the discriminator's nor the decoder's."""
    off, on = (gradients(model, with_(adversarial=AdversarialConfig(weight=w))) for w in (0.0, 5.0))
    difference = jax.tree.map(lambda a, b: a - b, on, off)
    assert largest(difference["encoder"]) > 1e-3
    assert largest(difference["decoder"]) < 1e-6
    assert largest(difference["discriminator"]) < 1e-6 < largest(off["discriminator"])


def test_remat_gives_the_same_gradients(model):
    plain, dots, full = (gradients(model, with_(remat=r)) for r in ("none", "dots", "full"))
    for a, b, c in zip(*map(jax.tree.leaves, (plain, dots, full)), strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(a).max())))


@pytest.mark.parametrize("segment_length", [None, 2])
def test_scanned_layers_give_the_same_gradients(segment_length, monkeypatch):
    """With dropout, so that each layer must get its own key, and with the memory, of which each layer has its own."""
    encoder = dataclasses.replace(CONFIG.encoder, num_hidden_layers=2)
    decoder = dataclasses.replace(CONFIG.decoder, num_layers=3)
    model = new_model(dataclasses.replace(CONFIG, encoder=encoder, decoder=decoder), scale=4.0)
    settings = with_(remat="dots", data=DataConfig(segment_length=segment_length))
    graphdef, params = split(model)

    def gradients(graphdef, params):
        context = StepContext(KEY, jnp.float32(0.3))
        traced = jax.jit(lambda p: gradient(p, graphdef, BATCH, context, settings)[0]).trace(params)
        return traced.lower().compile()(params), str(traced.jaxpr).count("scan[")

    unrolled, scans = gradients(graphdef, params)
    monkeypatch.setattr("davae_jax.model.stack.SCAN_ABOVE", 1)
    stacked = stack_layers(params)
    assert stacked["decoder"]["layers"]["stacked"]["mlp_in"]["weight"].shape[0] == 3
    scanned, more_scans = gradients(split(abstract_training_model(model.config))[0], stacked)
    scanned = unstack_layers(scanned)
    assert more_scans > scans and jax.tree.structure(scanned) == jax.tree.structure(unrolled)
    for a, b in zip(jax.tree.leaves(unrolled), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(a).max())))


@pytest.mark.parametrize("chunk", [2, 3])
def test_logits_in_parts_give_the_same_loss_and_gradients(model, chunk):
    """T is 4: in two parts, and in two of which one is filled up."""
    whole, parts = (gradients(model, with_(logits_chunk=c)) for c in (128, chunk))
    assert value(model, with_(logits_chunk=chunk))[0] == pytest.approx(value(model, CLEAN)[0], rel=1e-6)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_logits_in_parts_are_never_whole(model):
    """No array of [B, T, V] in the step's program, nor a larger one."""
    # A vocabulary of a size that nothing else in the model has.
    V = 90
    odd = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, vocab_size=V))
    graphdef, params = split(abstract_model(odd))
    ids = np.tile(DECODER_IDS, (1, 8))
    batch = Batch.of_texts(BATCH.encoder_ids, ids, np.array([40, 30], np.int32))

    def whole(chunk):
        context = StepContext(KEY, jnp.float32(0.3))
        traced = jax.make_jaxpr(gradient, static_argnums=(1, 4))
        program = str(traced(params, graphdef, batch, context, with_(logits_chunk=chunk)))
        return f"[2,39,{V}]" in program or f"[2,40,{V}]" in program

    assert whole(128) and not whole(8)


def test_accumulated_gradients_are_those_of_the_whole_batch(model):
    """Draws differ between the two, so none are made: no noise, and a posterior without variance."""
    graphdef, params = split(model)
    params = jax.tree.map(jnp.array, params)
    L = MODEL.latent_size
    # The log-variances' rows: tanh of a saturated pooler is ±1, so that large weights of one sign make them −∞-like.
    batch = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), BATCH)
    config = with_(batch_size=4)
    params["encoder"]["pooler"]["bias"] = params["encoder"]["pooler"]["bias"] + 20.0
    posterior = params["encoder"]["posterior"]["weight"]
    params["encoder"]["posterior"]["weight"] = posterior.at[L:].set(-3.0)
    run = jax.jit(gradient, static_argnums=(1, 4))
    (whole, logs), (parts, parts_logs) = (
        run(params, graphdef, batch, StepContext(KEY, jnp.float32(0.3)), with_(config, accumulate=n)) for n in (1, 2)
    )
    assert float(parts_logs["rec"]) == pytest.approx(float(logs["rec"]), rel=1e-5)
    for name in ("encoder", "decoder"):
        for a, b in zip(jax.tree.leaves(whole[name]), jax.tree.leaves(parts[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_every_optimizer_learns_and_decays_matrices_alone(model, name):
    optimizer = dataclasses.replace(CLEAN.optimizer, name=name, warmup=0.0, learning_rate=1e-2, schedule="constant")
    config = with_(optimizer=optimizer, beta=dataclasses.replace(CLEAN.beta, max=1e-4))
    graphdef, params = split(model)
    step, state = make_train_step(graphdef, config), init_state(jax.tree.map(jnp.array, params), config)
    losses = []
    for _ in range(10):
        state, logs = step(state, BATCH)
        losses.append(float(logs["rec"]))
    assert losses[-1] < 0.7 * losses[0]
    update = make_optimizer(dataclasses.replace(optimizer, weight_decay=0.5), 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved, _ = update.update(zeros, update.init(params), params)
    weights, moved = flatten(params), flatten(moved)
    for path, weight in weights.items():
        decays = weight.ndim > 1 and not path.endswith("bias")  # some biases have two axes
        np.testing.assert_allclose(moved[path], -1e-2 * 0.5 * weight * decays, rtol=1e-5, atol=1e-9, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_an_optimizer_updates_stacked_layers_as_each_of_a_list(name, monkeypatch):
    """With halves of different depths, and gradients whose size differs from layer to layer."""
    encoder = dataclasses.replace(CONFIG.encoder, num_hidden_layers=2)
    decoder = dataclasses.replace(CONFIG.decoder, num_layers=3)
    params = split(new_model(dataclasses.replace(CONFIG, encoder=encoder, decoder=decoder)))[1]
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda w: 10.0 ** rng.integers(-3, 3) * rng.standard_normal(w.shape, np.float32), params)
    settings = dataclasses.replace(CLEAN.optimizer, name=name, warmup=0.0, learning_rate=1e-2, weight_decay=0.5)
    optimizer = make_optimizer(settings, 10, separate_decoder=name == "adamw")

    @jax.jit
    def take_two(params, grads):
        _, state = optimizer.update(grads, optimizer.init(params), params)
        return optimizer.update(jax.tree.map(lambda g: g + 1, grads), state, params)

    one_by_one = take_two(params, grads)
    monkeypatch.setattr("davae_jax.model.stack.SCAN_ABOVE", 1)
    stacked = take_two(stack_layers(params), stack_layers(grads))
    assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(one_by_one)) / 1.5
    stacked = unstack_layers(stacked)
    assert jax.tree.structure(stacked[0]) == jax.tree.structure(one_by_one[0])
    for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_spikes_are_skipped():
    """A norm over ten times the usual moves nothing, not even the moments; one that stays is taken for usual at last.

    By hand: the mean of 100 norms of 5 is 5, each skip raises it by a tenth, and 5 · 1.1^n ≥ 70 / 10 from n = 4 on.
    """
    optimizer = skip_spikes(optax.adam(0.1), 10.0)
    weights, usual, spike = (jnp.array(x) for x in ([1.0, 1.0], [3.0, 4.0], [42.0, 56.0]))
    update = jax.jit(optimizer.update)
    state = optimizer.init(weights)
    updates, state = update(spike, state, weights)  # nothing is skipped in the first 100 steps
    assert jnp.abs(updates).min() > 0
    state = optimizer.init(weights)
    for _ in range(100):
        _, state = update(usual, state, weights)
    moments = jax.tree.map(np.asarray, state.inner)
    for n in range(1, 5):
        updates, state = update(spike, state, weights)
        assert not updates.any() and int(state.skipped) == n
        jax.tree.map(np.testing.assert_array_equal, moments, state.inner)
    updates, state = update(spike, state, weights)
    assert updates.any() and int(state.skipped) == 4
    updates, state = update(jnp.array([jnp.nan, 1.0]), state, weights)
    assert not updates.any() and int(state.skipped) == 5


def test_a_step_moves_everything_but_the_frequencies(model):
    """Both optimizers, in one state; the learning rate's first step is 0 with a warmup."""
    config = with_(optimizer=dataclasses.replace(CLEAN.optimizer, warmup=0.0, learning_rate=1e-3))
    graphdef, params = split(model)
    before = jax.tree.map(np.array, params)
    state, logs = make_train_step(graphdef, config)(init_state(jax.tree.map(jnp.array, params), config), BATCH)
    assert int(state.step) == 1
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.params, before)
    assert [path for path, has_moved in flatten(moved).items() if not has_moved] == ["decoder.inv_freq"]
    assert float(logs["lr"]) == pytest.approx(1e-3) and float(logs["grad_norm"]) > 0


def test_training_lowers_the_loss(model):
    config = with_(steps=60, optimizer=dataclasses.replace(CLEAN.optimizer, learning_rate=3e-3))
    graphdef, params = split(model)
    step, state = make_train_step(graphdef, config), init_state(jax.tree.map(jnp.array, params), config)
    losses = []
    for _ in range(60):
        state, logs = step(state, BATCH)
        losses.append(float(logs["rec"]))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_bfloat16(model):
    """Products in bfloat16, weights and moments in float32: the float32 run to bfloat16's 8 bits, and not to more."""
    config = with_(optimizer=dataclasses.replace(CLEAN.optimizer, warmup=0.0, learning_rate=1e-3))
    _, params = split(model)
    found = {}
    for dtype in ("float32", "bfloat16"):
        graphdef, _ = split(abstract_model(MODEL, dtype=dtype))
        step = make_train_step(graphdef, with_(config, dtype=dtype))
        state = init_state(jax.tree.map(jnp.array, params), config)
        for _ in range(5):
            state, logs = step(state, BATCH)
        kept = {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)}
        assert kept == {np.dtype("float32")}
        found[dtype] = [float(logs[name]) for name in ("loss", "rec", "kl_unmasked", "loss_d", "grad_norm")]
    np.testing.assert_allclose(found["bfloat16"], found["float32"], rtol=0.1)
    assert np.abs(np.divide(found["bfloat16"], found["float32"]) - 1).max() > 1e-5


def test_fresh_noise_every_step(model):
    """The draws follow from seed and step: two steps differ, the same step does not."""
    config = with_(optimizer=dataclasses.replace(CLEAN.optimizer, learning_rate=0.0, weight_decay=0.0))
    graphdef, params = split(model)
    step = make_train_step(graphdef, config)
    fresh = lambda: init_state(jax.tree.map(jnp.array, params), config)  # noqa: E731
    state, first = step(fresh(), BATCH)
    _, second = step(state, BATCH)
    _, again = step(fresh(), BATCH)
    assert float(first["rec"]) == float(again["rec"]) != float(second["rec"])
