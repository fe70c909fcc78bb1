"""The report as JSON text, and back. `python -m advisor.report.as_json` writes its JSON Schema to stdout."""

from __future__ import annotations

import math
import sys
from typing import Any

import msgspec

from advisor.core.errors import DamagedRecord
from advisor.core.records import AblationReport, Report
from advisor.core.schema import check_version, report_schema

# Enough for any measured figure, and few enough that the last bits of floating point do not show.
SIGNIFICANT_DIGITS = 6


def dumps(report: Report | AblationReport) -> str:
    """The report as indented JSON: keys as declared, free-form keys sorted, numbers to 6 significant digits.

    The model's facts are kept to the last digit, because its config.json is a quotation. Raises ValueError
    naming the field that holds an infinity or not-a-number: what is missing has to be None.
    """
    data = msgspec.to_builtins(report, order="deterministic")
    text = msgspec.json.encode({key: data[key] if key == "model" else _tidy(data[key], f"$.{key}") for key in data})
    return msgspec.json.format(text, indent=2).decode()


def loads(text: str | bytes, source: str) -> Report:
    """The report in `text`, which was read from `source` (a file's name, for the message).

    Raises DamagedRecord naming the source and the field, or Unfit where a newer version wrote it.
    """
    try:
        # First as plain data: a newer report has to be called newer, not damaged by its unknown fields.
        data = msgspec.json.decode(text)
        if not isinstance(data, dict):
            raise DamagedRecord(
                f"{source}: holds {type(data).__name__}, expected an mps-advisor report (a JSON object)"
            )
        check_version(data.get("schema_version"), source)
        return msgspec.json.decode(text, type=Report)
    except (ValueError, OverflowError, RecursionError) as error:
        raise DamagedRecord(
            f"{source}: {error}; expected an mps-advisor report: take an undamaged copy or write it again"
        ) from error


def schema_text() -> str:
    """The committed `report.schema.json`, to the byte."""
    return msgspec.json.format(msgspec.json.encode(report_schema()), indent=2).decode() + "\n"


def _tidy(data: Any, path: str) -> Any:  # noqa: ANN401 - JSON
    """`data` with every float rounded, and text that JSON can hold."""
    match data:
        case dict():
            return {key: _tidy(value, f"{path}.{key}") for key, value in data.items()}
        case list():
            return [_tidy(value, f"{path}[{index}]") for index, value in enumerate(data)]
        case float() if not math.isfinite(data):
            raise ValueError(f"{path} is {data}; a report holds finite numbers, and None for what is missing")
        case float():
            return float(f"{data:.{SIGNIFICANT_DIGITS}g}") + 0.0  # + 0.0 turns -0.0 into 0.0
        case str():
            return data.encode(errors="replace").decode()
        case _:
            return data


if __name__ == "__main__":
    sys.stdout.write(schema_text())
