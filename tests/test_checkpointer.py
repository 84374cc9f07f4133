"""Saving and restoring a run's checkpoints, without a run around them: `test_train.py` has those."""

import errno
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from davae_jax.checkpoints.run_folder import complete_checkpoints
from davae_jax.model.stack import stack_layers
from davae_jax.training.run.checkpointer import Checkpoints
from davae_jax.training.state import TrainState
from davae_jax.utils.errors import InputError


def state_at(step):
    params = {"encoder": {"layers": {0: {"weight": jnp.full((2, 3), step, jnp.float32)}}}}
    return TrainState(jnp.int32(step), params, (jnp.ones(3) * step,), (jnp.zeros(()),), {}, {})


def like(state):
    device = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


def test_saved_restored_and_reported(tmp_path):
    reported = []
    with Checkpoints(tmp_path, keep=1, on_complete=reported.append) as checkpoints:
        assert (checkpoints.step, checkpoints.last) == (0, "none yet")
        for step, loss in ((1, 1.0), (2, 2.0), (3, float("nan"))):
            checkpoints.save(state_at(step), held_out_loss=loss, extra_state=[{"loss": loss}])
        checkpoints.wait()
        assert reported == [checkpoints.path(step) for step in (1, 2, 3)]
        assert checkpoints.step == 3 and checkpoints.last == str(tmp_path / "checkpoints" / "3")
    # The newest, and the one with the lowest loss.
    assert sorted(int(path.name) for path in complete_checkpoints(tmp_path)) == [1, 3]
    state, extra_state = Checkpoints(tmp_path, keep=1).restore(like(state_at(0)))
    jax.tree.map(np.testing.assert_array_equal, state, state_at(3))
    assert len(extra_state) == 1 and np.isnan(extra_state[0]["loss"])


def test_stacked_layers_are_saved_one_by_one(tmp_path, monkeypatch):
    """So that every command reads them, and a run resumes with them stacked or not."""
    monkeypatch.setattr("davae_jax.model.stack.SCAN_ABOVE", 1)
    layers = {i: {"weight": jnp.full((2, 3), 1.0 + i)} for i in range(3)}
    state = TrainState(jnp.int32(1), {"encoder": {"layers": layers}}, ({"encoder": {"layers": layers}},), (), {}, {})
    stacked = stack_layers(state)
    assert stacked.params["encoder"]["layers"]["stacked"]["weight"].shape == (3, 2, 3)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(stacked)
    for wanted in (stacked, state):
        found, _ = Checkpoints(tmp_path, keep=1).restore(like(wanted))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_an_array_that_is_not_what_was_saved(tmp_path, capsys, monkeypatch):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state_at(1))
        wrong = {name: jnp.uint32(1) for name in ("step", "params.encoder.layers.0.weight")}
        monkeypatch.setattr("davae_jax.training.run.checkpointer.array_sums", lambda arrays: wrong)
        checkpoints.save(state_at(2))
    monkeypatch.undo()
    state, extra_state = Checkpoints(tmp_path, keep=2).restore(like(state_at(0)))
    assert int(state.step) == 1 and extra_state is None
    assert "checksum mismatch in " in capsys.readouterr().err
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["1"]
    assert (tmp_path / "checkpoints" / "2.damaged").is_dir()


def test_a_folder_that_cannot_be_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(InputError, match=r"step 1 cannot be saved .*the last complete checkpoint is none yet"):
        checkpoints.save(state_at(1))


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(tmp_path, monkeypatch):
    """It keeps its name, and the run does not go back to an earlier one."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state_at(step))
    files = [path for path in (tmp_path / "checkpoints" / "2" / "params").rglob("*") if path.is_file()]
    for file in files:
        file.write_bytes(b"")  # for Orbax, which does not call `open` of Python
    denied = files[-1]

    def open_unless_denied(path, mode):
        if Path(path) == denied:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open(path, mode)

    monkeypatch.setattr("davae_jax.training.run.checkpointer.open", open_unless_denied, raising=False)
    with pytest.raises(InputError) as e:
        Checkpoints(tmp_path, keep=2).restore(like(state_at(0)))
    assert str(e.value).startswith(f"{denied}: ")
    assert sorted(path.name for path in complete_checkpoints(tmp_path)) == ["1", "2"]
    monkeypatch.undo()
    assert int(Checkpoints(tmp_path, keep=2).restore(like(state_at(0)))[0].step) == 1
