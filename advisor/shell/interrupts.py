"""Ctrl-C where it may not take effect at once: processes are started and ended whole."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

Say = Callable[[str], None]


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_on_signals() -> None:
    """Answer each of them as Ctrl-C is answered: by cleaning up.

    SIGINT too: a script that starts us in the background has it ignored, and would have no way to stop us cleanly.
    """
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    stop()


def stop() -> NoReturn:
    """Raise KeyboardInterrupt, once: whoever presses Ctrl-C again must not interrupt what the first one began, and
    cleaning up goes through many hands. Handlers that are not `stop_on_signals`' own stay.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, _patient)
    raise KeyboardInterrupt


def _patient(number: int, frame: FrameType | None) -> None:
    """It is being cleaned up already."""


def ignore_signals() -> None:
    """For the last moments of a process, in which Python takes its handlers away."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Interrupted:
    """Whether somebody asked to stop while that could not be done."""

    asked = False


@contextmanager
def uninterrupted(say: Say) -> Iterator[Interrupted]:
    """Finish cleaning up even when Ctrl-C is pressed or a SIGTERM arrives; the caller looks whether one did."""
    interrupted = Interrupted()

    def answer(number: int, frame: FrameType | None) -> None:
        interrupted.asked = True
        say("still cleaning up the GPU; please wait")

    before = {number: signal.signal(number, answer) for number in SIGNALS}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def whole() -> Iterator[None]:
    """Do not stop half-way: a process that nobody has noted yet would be left behind, or a record forgotten."""
    with uninterrupted(lambda text: None) as interrupted:
        yield
    if interrupted.asked:
        stop()
