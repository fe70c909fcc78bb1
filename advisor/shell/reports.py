"""Reads a REPORT that the user names: the JSON of `profile --format json`, or a run folder, which is replayed."""

from __future__ import annotations

from pathlib import Path

from advisor.core.errors import BadQuestion, Unfit
from advisor.core.records import Report
from advisor.report.as_json import dumps, loads


def read_report(path: Path) -> Report:
    """The report in a file, or that of a recorded run.

    Raises BadQuestion where there is no such file, DamagedRecord or Unfit where it cannot be read, was damaged or
    comes from a newer version.
    """
    if path.is_dir():
        from advisor.profiling import as_recorded  # replaying needs all of the tool, reading a file hardly any

        # Through its text, so that a run and its report differ in nothing, not even in the last digits.
        return loads(dumps(as_recorded(path)), str(path))
    try:
        return loads(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise BadQuestion(
            f"{path} does not exist; a report is expected, as mps-advisor profile --format json writes it"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise Unfit(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
