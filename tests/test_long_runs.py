"""Long runs in short: memory, compiled programs, open files and threads do not grow with steps and calls."""

import jax
import pytest
from robustness import long_run
from test_train import TINY, text_file  # noqa: F401 (a fixture)

from davae_jax.parallel import multihost


def test_growth_is_recognized():
    rows = [dict(done=i, process=1, megabytes=500.0 + i % 3, programs=9, files=20, threads=8) for i in range(40)]
    assert all(values["flat"] for values in long_run.growth(rows).values())
    for name, leak in (("megabytes", 2.0), ("programs", 0.5), ("files", 0.5), ("threads", 0.5)):
        leaking = [row | {name: row[name] + int(leak * row["done"])} for row in rows]
        values = long_run.growth(leaking)
        assert {key for key in values if not values[key]["flat"]} == {name}
        assert values[name]["per_1000"] == pytest.approx(1000 * leak, rel=0.1)
    with pytest.raises(ValueError):
        long_run.growth(rows[:5])
    # A process that was stopped early does not count.
    assert long_run.growth([rows[0] | dict(process=0, files=900), *rows]) == long_run.growth(rows)


def test_training_is_flat(text_file, tmp_path, monkeypatch):  # noqa: F811
    """With samples, held-out losses and checkpoints; memory is left to longer runs."""
    monkeypatch.setattr(multihost, "connect", lambda *_: None)
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rows = []
    options = [*TINY, "--data.train", text_file, "--log.samples", 20, "--log.checkpoint", 10, "--log.figures", 0]
    long_run.train(list(map(str, options)), 160, tmp_path / "run", rows.append)
    assert [row["done"] for row in rows] == [*range(4, 161, 4)]
    values = long_run.growth(rows)
    assert all(values[name]["flat"] for name in ("programs", "files", "threads")), values


@pytest.mark.filterwarnings("ignore:text")
def test_mixed_generations_are_flat(tiny_vae):
    """The shapes of the calls never repeat for long; the programs are those of a few sizes."""
    rows = []
    long_run.generate(tiny_vae, 0, 80, rows.append)
    values = long_run.growth(rows)
    assert values["files"]["flat"] and values["threads"]["flat"], values
    # Batches of 1, 2, 4 and 8: an encoder and a scaled latent each, for texts of up to 16 and up to 32 ids; generators,
    # greedy and filtered, with and without a prompt; and a few of one operation.
    assert 0 < rows[-1]["programs"] <= 4 * (2 * 2 + 2 * 2) + 12
