"""The version of the records' JSON, and the JSON Schema of the report that it stands for."""

from __future__ import annotations

from typing import Any

import msgspec

from advisor.core.errors import DamagedRecord, Unfit
from advisor.core.records import SCHEMA_VERSION, Report


def check_version(found: object, source: str) -> None:
    """Accept the `schema_version` that was found in `source` (the name of a file), or say what is wrong with it.

    Raises Unfit for a version newer than this program's, DamagedRecord for anything that never was a version.
    """
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        shown = "missing" if found is None else f"{found!r:.40}"
        raise DamagedRecord(
            f"{source}: `$.schema_version` is {shown}, expected a whole number from 1 to {SCHEMA_VERSION}; "
            "take an undamaged copy or measure again"
        )
    if found > SCHEMA_VERSION:
        raise Unfit(
            f"{source}: schema_version {found} was found, {SCHEMA_VERSION} is the newest that is known here; "
            "install a newer mps-advisor"
        )


def report_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `profile --format json` writes.

    It has no `$id`: a copy describes the reports beside it, wherever it lies.
    """
    schema = msgspec.json.schema(Report)
    for record in schema["$defs"].values():
        # From docstrings, whose indentation Python 3.13 removes and earlier versions keep.
        record["description"] = " ".join(record.get("description", record["title"]).split())
    schema["$defs"]["Report"]["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"mps-advisor report, schema_version {SCHEMA_VERSION}",
        **schema,
    }
