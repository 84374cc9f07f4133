"""The KL's weight and the learning rate, step by step."""

import dataclasses

import numpy as np
import pytest

from davae_jax.training.config import BetaConfig, OptimizerConfig, TrainConfig
from davae_jax.training.schedules import beta_at, learning_rate
from davae_jax.utils.errors import OptionError


def test_trapezoid():
    """100 steps: 20 at the start, 50 rising, 30 at the top."""
    config = BetaConfig(start=0.1, max=1.1, ratio_zero=0.2, ratio_increase=0.5)
    found = [float(beta_at(step, 100, config)) for step in range(100)]
    expected = [0.1] * 20 + [0.1 + i / 50 for i in range(50)] + [1.1] * 30
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_sigmoid():
    """Begins and ends where the trapezoid does, is half way in the middle, and steepest there."""
    config = BetaConfig(start=0.1, max=1.1, ratio_zero=0.2, ratio_increase=0.5, shape="sigmoid")
    found = [float(beta_at(step, 100, config)) for step in range(100)]
    x = 10 * np.arange(50) / 50 - 5
    sigmoid = 1 / (1 + np.exp(-x))
    low, high = 1 / (1 + np.exp(5)), 1 / (1 + np.exp(-5))
    expected = [0.1] * 20 + list(0.1 + (sigmoid - low) / (high - low)) + [1.1] * 30
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[45] == pytest.approx(0.6)


def test_cycles_repeat_the_trapezoid():
    config = BetaConfig(start=0.0, max=1.0, ratio_zero=0.25, ratio_increase=0.5, cycles=3)
    found = [float(beta_at(step, 120, config)) for step in range(120)]
    np.testing.assert_allclose(found[:40], found[40:80], atol=1e-5)
    np.testing.assert_allclose(found[:40], found[80:], atol=1e-5)
    np.testing.assert_allclose(found[:40], [0.0] * 10 + [i / 20 for i in range(20)] + [1.0] * 10, atol=1e-5)


def test_cycles_that_do_not_divide_the_steps_begin_at_the_start():
    """2,000 steps in 6 periods: the fourth begins at step 1,000 exactly."""
    config = BetaConfig(start=0.1, max=1.0, ratio_zero=0.2, ratio_increase=0.5, cycles=6)
    assert float(beta_at(999, 2000, config)) == 1.0
    np.testing.assert_allclose(float(beta_at(1000, 2000, config)), 0.1, rtol=1e-6)


def test_no_rise_is_a_jump():
    config = BetaConfig(start=0.0, max=1.0, ratio_zero=0.5, ratio_increase=0.0)
    assert [float(beta_at(step, 10, config)) for step in range(10)] == [0.0] * 5 + [1.0] * 5
    constant = BetaConfig(start=0.3, max=0.3)
    np.testing.assert_allclose([float(beta_at(step, 10, constant)) for step in range(10)], 0.3)


def test_learning_rate():
    rate = learning_rate(OptimizerConfig(learning_rate=2.0, warmup=0.1, end=0.25), 100)
    np.testing.assert_allclose([rate(step) for step in range(11)], [0.2 * i for i in range(11)], rtol=1e-5)
    np.testing.assert_allclose(rate(55), 2 * (0.25 + 0.75 * 0.5), rtol=1e-5)  # half way down the cosine
    np.testing.assert_allclose(rate(100), 0.5, rtol=1e-5)
    rate = learning_rate(OptimizerConfig(learning_rate=2.0, warmup=0.1, schedule="constant"), 100)
    assert float(rate(5)) == 1.0 and float(rate(99)) == 2.0


def test_warmup_stable_decay():
    """10 steps up, level, 20 steps down to a quarter. Before the decay, the number of steps does not matter."""
    config = OptimizerConfig(learning_rate=2.0, schedule="wsd", warmup_steps=10, decay_steps=20, end=0.25)
    expected = [0.2 * i for i in range(10)] + [2.0] * 70 + [2 - 1.5 * i / 20 for i in range(21)]
    np.testing.assert_allclose([learning_rate(config, 100)(step) for step in range(101)], expected, rtol=1e-5)
    stable = dataclasses.replace(config, decay_steps=0)
    for steps in (60, 1000):
        np.testing.assert_allclose([learning_rate(stable, steps)(step) for step in range(80)], expected[:80], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: BetaConfig(max=-1.0), "--beta.max"),
        (lambda: BetaConfig(ratio_zero=0.6, ratio_increase=0.5), "--beta.ratio-zero"),
        (lambda: BetaConfig(cycles=0), "--beta.cycles"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "--optimizer.learning-rate"),
        (lambda: OptimizerConfig(decay_steps=5), "--optimizer.decay-steps"),
        (
            lambda: TrainConfig(20, optimizer=OptimizerConfig(schedule="wsd", warmup_steps=10, decay_steps=11)),
            "--optimizer.decay-steps",
        ),
        (lambda: OptimizerConfig(warmup=2.0), "--optimizer.warmup"),
    ],
)
def test_invalid_settings_raise(make, option):
    with pytest.raises(OptionError) as e:
        make()
    assert (e.value.option, e.value.exit_code) == (option, 2)
