"""`python -m benchmarks`: each benchmark at its smallest size. The structure of what it writes is asserted, no time."""

import contextlib
import dataclasses
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import common
from benchmarks.__main__ import find_questions, main
from davae_jax.model.davae import abstract_model, split
from davae_jax.training.config import NoiseConfig
from davae_jax.training.objective import StepContext, gradient

QUESTIONS = find_questions()
SUMMARY = {"median", "least", "most"}


def printed(argv):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(argv)
    return out.getvalue()


def numbers(value):
    """Yields all numbers in a row."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def check(row):
    """Asserts that a row is as benchmarks/common.py describes it."""
    assert all(math.isfinite(number) for number in numbers(row)), row
    assert any(number > 0 for number in numbers(row)), row
    for summary in (value for value in row.values() if isinstance(value, dict)):
        assert summary.keys() == SUMMARY
        assert summary["least"] <= summary["median"] <= summary["most"]
    if "value" not in row:
        return
    assert row["value"]["least"] > 0
    value, is_rate = row["value"]["median"], row["unit"].endswith("/s")
    for other, kind in ((row.get("peer_value", {}).get("median"), "peer"), (row.get("limit_value"), "limit")):
        if other is not None:
            assert row[kind] and other > 0
            assert row[f"{kind}_ratio"] == pytest.approx(value / other if is_rate else other / value)


def test_the_list_names_every_benchmark_and_its_question(capsys):
    lines = printed([]).splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(QUESTIONS)
    assert {"attention", "compile_time", "data", "decode", "encode", "growth", "load", "startup"} <= QUESTIONS.keys()
    assert all(question.endswith("?") for question in QUESTIONS.values())
    with pytest.raises(SystemExit) as error:
        main(["speed"])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("python -m benchmarks: there is no 'speed'; choose from ")


def test_ratios_say_how_many_times_as_good():
    faster = common.row({"n": 1}, "tokens/s", [4.0, 6.0, 5.0], peer=("peer", [2.5]), limit=("stream", 10.0))
    slower = common.row({"n": 1}, "s", [4.0, 6.0, 5.0], peer=("peer", [2.5]), limit=("stream", 1.0))
    assert faster["value"] == {"median": 5.0, "least": 4.0, "most": 6.0}
    assert (faster["peer_ratio"], faster["limit_ratio"]) == (2, 0.5)
    assert (slower["peer_ratio"], slower["limit_ratio"]) == (0.5, 0.2)
    for row in (faster, slower):
        check(row)


def test_functions_are_called_in_turns():
    calls = []
    results = common.in_turns({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, 2)
    assert calls == list("abab") and results == {"a": [1, 3], "b": [2, 4]}


def test_tables(capsys):
    rows = [common.row({"table": "Speed", "n": 1000}, "tokens/s", [1.0, 2.0, 9.0], limit=("stream", 4.0)), {"a": None}]
    common.print_tables(rows)
    assert capsys.readouterr().out == (
        "\nSpeed:\n\n| n | value | limit | limit value | limit ratio |\n|---|---|---|---|---|\n"
        "| 1,000 | 2 (1 to 9) tokens/s | stream | 4 tokens/s | 50% |\n\n| a |\n|---|\n|  |\n"
    )


@pytest.mark.parametrize("file", ["no/such/folder.json", "."])
def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_measured(file, capsys):
    parser = common.make_parser("Why?", "why.py")
    with pytest.raises(SystemExit):
        common.parse(parser, ["--json", file], {})
    assert f"argument --json: {file}: cannot be written" in capsys.readouterr().err


def test_a_process_tells_its_own_memory():
    block = b"x" * 200_000_000  # of this process, which the other must not count
    finished = common.run_python("-c", "print('a'); print('b')")
    assert finished.output == "a\nb" and 1 < finished.peak_MB < 100 < len(block) / 1e6
    with pytest.raises(SystemExit, match="failed with code 3"):
        common.run_python("-c", "raise SystemExit(3)")


def test_a_model_that_cannot_be_read_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["decode", str(tmp_path / "none")])
    assert error.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith(f"python -m benchmarks decode: {tmp_path / 'none'}: ") and err.count("\n") == 1


def test_the_peer_of_training_computes_the_same_loss_and_gradient():
    """On texts of different lengths, without noise; the latents' noise is that of the step."""
    torch = pytest.importorskip("torch")
    from benchmarks.torch_training import TorchTraining
    from benchmarks.train_step import SIZES, config_of, initial_params, make_batches, published_weights

    config = config_of(**SIZES["smallest"])
    adversarial = dataclasses.replace(config.adversarial, weight=0.1)
    free_bits = dataclasses.replace(config.free_bits, target=0.0)
    config = dataclasses.replace(config, adversarial=adversarial, free_bits=free_bits, noise=NoiseConfig(embedding=0.0))
    (batch,), params = make_batches(config, 1), initial_params(config)
    batch = batch._replace(lengths=np.arange(len(batch.lengths), dtype=np.int32)[:, None] % 40 + 3)
    context = StepContext(jax.random.key(3), beta=jnp.float32(config.beta.max))
    graphdef = split(abstract_model(config.model))[0]
    grads, logs = jax.jit(lambda p: gradient(p, graphdef, batch, context, config))(params)
    key_of_latents = jax.random.split(context.key, 6)[3]
    eps = jax.random.normal(key_of_latents, (len(batch.lengths), config.model.latent_size))

    peer = TorchTraining(config, published_weights(config, params))
    peer.steps_taken = config.steps  # where β is at its maximum
    losses = peer.loss(batch, torch.tensor(np.asarray(eps)))
    losses["loss"].backward()
    for name in ("loss", "rec", "kl", "loss_g"):
        assert losses[name].item() == pytest.approx(float(logs[name]), rel=1e-5), name
    norm = sum(p.grad.square().sum() for p in peer.main if p.grad is not None).sqrt().item()
    expected = optax.tree.norm({half: grads[half] for half in ("encoder", "decoder")})
    assert norm == pytest.approx(float(expected), rel=1e-4)


@pytest.fixture
def one_torch_thread():
    """Several would wait for each other where there are more workers than cores."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUESTIONS)
def test_the_smallest_size(name, tmp_path, monkeypatch, one_torch_thread):
    monkeypatch.chdir(tmp_path)  # nothing is left in the folder where it is started
    file = tmp_path / "out.json"
    table = printed([name, "--smallest", "--json", str(file)])
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result.keys() == {"machine", "rows"}
    machine = {"date", "processor", "cores", "load average before", "python", "jax", "jaxlib"}
    assert machine <= result["machine"].keys()
    assert result["rows"] and table.count("\n|") >= 2 + len(result["rows"])
    for row in result["rows"]:
        check(row)
    assert list(tmp_path.iterdir()) == [file]
