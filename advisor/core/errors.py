"""The ways in which a question can end without an answer, each with its exit code (see the README's table)."""

from __future__ import annotations


class AdvisorError(Exception):
    """A failure that the user can act on: one line that says what is wrong, what was expected, what to do."""

    exit_code = 3


class BadQuestion(AdvisorError):
    """The question is malformed: an option, an unknown model, a broken config.json."""

    exit_code = 2


class Unfit(AdvisorError):
    """This machine or this data cannot serve the question."""

    exit_code = 3


class NotRecorded(Unfit):
    """A replayed run does not hold the trial that is asked for. Replay never makes one up."""


class DamagedRecord(Unfit):
    """A recorded file that cannot be trusted; the message names the file and the field."""


class NoHonestAnswer(AdvisorError):
    """No answer can be given honestly: inconclusive, does not fit, nothing meets the SLO, outside the corpus."""

    exit_code = 4
