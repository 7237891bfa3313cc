"""Signals that unwind a process, and give back what they took."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from pytest_vmbottle.host.signals import Interruption, left, undisturbed

TERM, HUP, INT = signal.SIGTERM, signal.SIGHUP, signal.SIGINT


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (TERM, HUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [TERM, HUP])
def test_a_signal_that_would_end_the_process_unwinds_it_as_ctrl_c_does(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt, match=number.name), Interruption():
        signal.raise_signal(number)
    assert signal.getsignal(number) is signal.SIG_DFL


def test_an_exception_of_ones_own_ends_the_process_with_the_status_of_shells() -> None:
    with pytest.raises(SystemExit) as ended, Interruption(left):
        signal.raise_signal(TERM)
    assert ended.value.code == 128 + TERM


def test_what_is_handled_or_ignored_stays_so_unless_the_process_is_ours_alone() -> None:
    signal.signal(HUP, signal.SIG_IGN)
    with Interruption() as ours:
        ours.install()
        assert signal.getsignal(HUP) is signal.SIG_IGN
    ctrl_c = signal.getsignal(INT)
    with Interruption(left, numbers=(TERM, HUP, INT), owned=True):
        assert not {signal.SIG_IGN, signal.SIG_DFL, ctrl_c} & {signal.getsignal(number) for number in (TERM, HUP, INT)}
        with Interruption(left, owned=True):
            pass
        assert signal.getsignal(HUP) is not signal.SIG_IGN, "what an inner one gives back is the outer one's"
    assert [signal.getsignal(number) for number in (TERM, HUP, INT)] == [signal.SIG_DFL, signal.SIG_IGN, ctrl_c]


def test_what_somebody_else_has_taken_over_meanwhile_is_his() -> None:
    ours = Interruption()
    ours.install()
    signal.signal(TERM, signal.SIG_IGN)
    ours.restore()
    ours.restore()
    assert [signal.getsignal(number) for number in (TERM, HUP)] == [signal.SIG_IGN, signal.SIG_DFL]


def test_a_thread_takes_over_nothing() -> None:
    thread = threading.Thread(target=Interruption().install)
    thread.start()
    thread.join()
    assert signal.getsignal(TERM) is signal.SIG_DFL


def test_a_signal_waits_for_the_end_of_a_block_that_must_not_be_disturbed() -> None:
    steps = []

    def block() -> None:
        with undisturbed():
            signal.raise_signal(TERM)
            steps.append("done")
        steps.append("not reached")

    with pytest.raises(KeyboardInterrupt), Interruption():
        block()
    assert steps == ["done"]


def test_a_signal_that_another_thread_gets_does_not_end_such_a_block_either() -> None:
    steps, over = [], threading.Event()
    other = threading.Thread(target=over.wait, args=(30,))
    other.start()

    def block() -> None:
        with undisturbed():
            os.kill(os.getpid(), TERM)  # the kernel may give it to any thread that takes it
            time.sleep(0.1)
            steps.append("done")
        steps.append("not reached")

    try:
        with pytest.raises(KeyboardInterrupt), Interruption():
            block()
    finally:
        over.set()
        other.join()
    assert steps == ["done"]
