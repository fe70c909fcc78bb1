"""The report as JSON: stable text, a schema in step with it, and an honest word on what is damaged or newer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_terminal import measured, report

import advisor.report
from advisor.core.errors import DamagedRecord, Unfit
from advisor.core.records import SCHEMA_VERSION, Figure, Profile, Value
from advisor.core.schema import check_version, report_schema
from advisor.report.as_json import dumps, loads, schema_text

COMMITTED = Path(advisor.report.__file__).parent / "report.schema.json"
SHIPPED = Path(__file__).parent.parent / "data"
TEXT = dumps(report())

finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.builds(Value, value=finite, low=st.none() | finite, high=st.none() | finite)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
reports = st.builds(
    lambda number, profile, model_config, text, replayed: report(
        replayed=replayed,
        created=text,
        profile=profile,
        candidates=[*report().candidates, measured(3, True, 1.0, throughput_tok_per_s=number, why_not=text)],
        model=msgspec.structs.replace(report().model, config=model_config),
    ),
    values,
    st.none()
    | st.builds(
        Profile, throughput_bound=st.none() | st.builds(Figure, value=finite, unit=st.text(), source=st.just("bound"))
    ),
    st.dictionaries(st.text(), plain, max_size=3),
    st.text(),
    st.booleans(),
)


def test_the_committed_schema_is_in_step_with_the_records():
    advice = "run: python -m advisor.report.as_json > advisor/report/report.schema.json"
    assert COMMITTED.read_text(encoding="utf-8") == schema_text(), advice


def test_the_schema_is_a_valid_draft_2020_12_schema_without_an_id():
    jsonschema.Draft202012Validator.check_schema(report_schema())
    assert report_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert "$id" not in report_schema()


def test_a_report_is_valid_under_the_committed_schema():
    jsonschema.Draft202012Validator(json.loads(COMMITTED.read_text(encoding="utf-8"))).validate(json.loads(TEXT))


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (["schema_version"], SCHEMA_VERSION + 1),
        (["candidates", 0, "engines"], "one"),
        (["candidates", 0, "outcome"], "fine"),
        (["recommendation", "status"], None),
        (["invented"], 1),
    ],
)
def test_schema_and_reader_refuse_the_same_mistakes(path, wrong):
    data = json.loads(TEXT)
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(report_schema()).validate(data)
    with pytest.raises(Unfit, match=r"r\.json"):
        loads(json.dumps(data), "r.json")


def test_the_text_is_indented_by_two_and_keeps_the_order_of_the_contract():
    assert TEXT.startswith('{\n  "schema_version": 1,\n  "created": ')
    assert list(json.loads(TEXT)) == list(report().__struct_fields__)


def test_free_form_keys_are_sorted_so_that_their_origin_does_not_show():
    def written(environment):
        return dumps(report(software=msgspec.structs.replace(report().software, environment=environment)))

    assert written({"b": "1", "a": "2"}) == written({"a": "2", "b": "1"}) != written({"a": "2"})


def test_the_last_bits_of_a_measured_number_do_not_show():
    nearly = report(candidates=[measured(1, False, 9100.4 * (1 + 1e-12))])
    assert dumps(nearly) == dumps(report(candidates=[measured(1, False, 9100.4)]))
    assert '"value": 9100.4,' in dumps(nearly)


def test_a_config_is_quoted_to_the_last_digit():
    assert "1.23456789e-6" in TEXT.replace("e-06", "e-6")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_refused_by_its_path(bad):
    with pytest.raises(ValueError, match=r"\$\.candidates\[0\]\.sm_active_pct"):
        dumps(report(candidates=[measured(1, False, 1.0, sm_active_pct=bad)]))


@given(reports)
@settings(max_examples=40, deadline=None)
def test_a_report_survives_the_journey_through_json(original):
    text = dumps(original)
    back = loads(text, "r.json")
    assert dumps(back) == text
    assert loads(text.encode(), "r.json") == back
    assert back.model == original.model
    assert back.candidates[-1].why_not == original.candidates[-1].why_not
    told, found = original.candidates[-1].throughput_tok_per_s, back.candidates[-1].throughput_tok_per_s
    assert found.value == pytest.approx(told.value, rel=1e-5)
    assert [found.low is None, found.high is None] == [told.low is None, told.high is None]


@given(st.integers(0, len(TEXT.encode()) - 1), st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_byte_that_changed_is_read_or_reported_but_never_a_surprise(at, byte):
    damaged = bytearray(TEXT.encode())
    damaged[at] = byte
    try:
        loads(bytes(damaged), "r.json")
    except Unfit as error:
        assert str(error).startswith("r.json: ")
        assert "\n" not in str(error)


@given(st.integers(0, len(TEXT.encode()) - 2))
@settings(max_examples=50, deadline=None)
def test_a_report_that_was_cut_off_is_damaged(length):
    with pytest.raises(DamagedRecord, match=r"^r\.json: "):
        loads(TEXT.encode()[:length], "r.json")


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff", b'"\xff"', b"[" * 100_000, b"null", b"[]", b"1e999", b'{"schema_version": 1' + b"0" * 9999 + b"}",
     b'{"schema_version": 1, "profile": 1' + b"0" * 9999 + b"}", '"\ud800"'],
)  # fmt: skip
def test_what_is_no_report_at_all_is_damaged(text):
    with pytest.raises((DamagedRecord, Unfit), match=r"^r\.json: "):
        loads(text, "r.json")


def test_damage_is_named_by_file_and_field():
    with pytest.raises(DamagedRecord, match=r"run/report\.json: .*\$\.candidates\[0\]\.engines"):
        loads(TEXT.replace('"engines": 1,', '"engines": "1",', 1), "run/report.json")


def test_a_newer_report_is_called_newer_even_when_it_holds_unknown_fields():
    newer = TEXT.replace('"schema_version": 1,', '"schema_version": 7, "novelty": [],')
    with pytest.raises(Unfit, match="schema_version 7 was found, 1 is the newest") as caught:
        loads(newer, "r.json")
    assert not isinstance(caught.value, DamagedRecord)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("found", [None, 0, -1, True, 1.0, "1", [1]])
def test_what_never_was_a_version_is_damage(found):
    with pytest.raises(DamagedRecord, match=r"m\.json: `\$\.schema_version` is "):
        check_version(found, "m.json")


def test_the_present_version_is_accepted():
    assert check_version(SCHEMA_VERSION, "m.json") is None


@pytest.mark.parametrize(
    "path",
    sorted(set(SHIPPED.glob("*/report.json")) - set(SHIPPED.glob("*-ablate/*"))),
    ids=lambda path: path.parent.name,
)
def test_every_report_that_is_shipped_can_be_read(path):
    """They were written by earlier versions of the same schema_version: what came later has to have a default."""
    assert loads(path.read_bytes(), str(path)).candidates
    jsonschema.Draft202012Validator(report_schema()).validate(json.loads(path.read_bytes()))
