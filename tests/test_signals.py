"""Signals: as KeyboardInterrupt, and as a request to stop."""

import signal

import pytest

from davae_jax.utils import signals
from davae_jax.utils.signals import SIGNALS, StopRequest, interrupt_on_signals


@pytest.fixture(autouse=True)
def handlers_are_restored():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_an_interrupt(number):
    with pytest.raises(KeyboardInterrupt), interrupt_on_signals():
        signal.raise_signal(number)


def test_an_error_that_a_library_makes_of_an_interrupt():
    with pytest.raises(KeyboardInterrupt), interrupt_on_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("aborted") from None
    with pytest.raises(RuntimeError, match="no signal"), interrupt_on_signals():
        raise RuntimeError("no signal")


def test_the_first_signal_asks_for_a_stop_and_a_later_one_interrupts(monkeypatch):
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        now += 0.5
        signal.raise_signal(signal.SIGINT)  # the same one, sent to the process as well
        now += 1.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
