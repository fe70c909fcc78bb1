"""The page: it loads and runs nothing, every figure has its title and data, and every number is one of the report's."""

from __future__ import annotations

import functools
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from rich.console import Console
from test_schema import reports
from test_terminal import advice, failed, measured, report, value

from advisor import reporting
from advisor.core.records import FAST, Caution, CurvePoint, Percentiles, Profile, Question, WaterfallStep
from advisor.report.as_json import dumps, loads
from advisor.report.html import Source, page
from advisor.report.terminal import render

ROOT = Path(__file__).parent.parent
# All that are shipped, and the studies that are whole profiles.
STUDIES = ("0.5b-serve-1024-call-1", "3b-serve-1024-call-1", "3b-serve-1024-first-full")
SHIPPED = sorted(path.parent for path in (ROOT / "data").glob("*/manifest.json"))
RUNS = [folder for folder in SHIPPED if json.loads((folder / "manifest.json").read_text()).get("ablation") is None]
RUNS += [ROOT / "data" / "studies" / f"h200-qwen2.5-{name}" for name in STUDIES]
CALL_2 = ROOT / "data" / "h200-qwen2.5-0.5b-serve-1024-call-2"
CALL_2_3B = ROOT / "data" / "h200-qwen2.5-3b-serve-1024-call-2"
VOID = {"meta", "link", "br", "hr", "img", "input", "col", "wbr"}


class Node:
    """An element: its attributes by [name], what is in it, and its text."""

    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.children, self.own = [], []

    def __getitem__(self, name):
        return self.attributes.get(name)

    def all(self, *tags):
        for child in self.children:
            if not tags or child.tag in tags:
                yield child
            yield from child.all(*tags)

    def texts(self):
        """Every piece of text with the element that it is directly in, as they stand on the page."""
        for piece in self.own:
            if isinstance(piece, Node):
                yield from piece.texts()
            else:
                yield piece, self

    @property
    def text(self):
        return "".join(text for text, _ in self.texts())

    @property
    def classes(self):
        return (self["class"] or "").split()

    def inside(self, *tags):
        return self.parent is not None and (self.parent.tag in tags or self.parent.inside(*tags))


class Tree(HTMLParser):
    """Builds the tree and refuses what is not well-formed: every element is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.root = self.at = Node("", {}, None)
        self.feed(text)
        self.close()
        assert self.at is self.root, f"<{self.at.tag}> is not closed"

    def handle_starttag(self, tag, attributes, closed=False):
        assert len(dict(attributes)) == len(attributes), f"<{tag}> has an attribute twice"
        node = Node(tag, dict(attributes), self.at)
        self.at.children.append(node)
        self.at.own.append(node)
        if tag not in VOID and not closed:
            self.at = node

    def handle_startendtag(self, tag, attributes):
        assert self.at.tag in ("svg", "text") and self.at.inside("figure"), f"<{tag}/> outside a drawing"
        self.handle_starttag(tag, attributes, closed=True)

    def handle_endtag(self, tag):
        assert self.at.tag == tag, f"</{tag}> closes <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.own.append(data)


@functools.cache
def recorded(folder):
    return reporting.read(folder)


@functools.cache
def under_objectives(folder, told):
    done = run("profile", "--replay", folder, "--slo", told, "--format", "json")
    return Source(loads(done.stdout, "report.json"), "report.json")


def tree(*sources):
    return Tree(page(sources)).root


def one(**more):
    return tree(Source(report(**more), "report.json"))


def by_id(root, name):
    return next(node for node in root.all() if node["id"] == name)


def words(node):
    return " ".join(node.text.split())


# ---------------------------------------------------------------- what every page has to be

PAGES = {**{folder.name: (folder,) for folder in RUNS}, "two": (CALL_2, CALL_2_3B), "all": tuple(RUNS)}


@pytest.fixture(params=list(PAGES), scope="module")
def shown(request):
    sources = [recorded(folder) for folder in PAGES[request.param]]
    return tree(*sources), sources


def test_it_loads_nothing_and_runs_nothing(shown):
    root, _ = shown
    for node in root.all():
        assert node.tag not in ("script", "iframe", "object", "embed", "img", "image", "use", "form", "base")
        for name, text in node.attributes.items():
            assert not name.startswith("on"), f"{name} runs a script"
            assert name not in ("src", "srcset", "data", "action", "xlink:href")
            if name == "href":
                assert text.startswith("#") or (node.tag == "link" and text == "data:,")
            assert "url(" not in (text or "")
    (style,) = root.all("style")
    assert "@import" not in style.text and "url(" not in style.text
    policy = next(node["content"] for node in root.all("meta") if node["http-equiv"])
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_its_links_lead_somewhere_and_names_are_unique(shown):
    root, _ = shown
    names = [node["id"] for node in root.all() if node["id"]]
    assert len(names) == len(set(names))
    for node in root.all():
        if node.tag == "a":
            assert node["href"].removeprefix("#") in names
        for name in (node["aria-labelledby"] or "").split():
            assert name in names


def test_every_figure_has_a_title_a_description_and_its_data(shown):
    root, sources = shown
    drawings = list(root.all("svg"))
    assert len(drawings) >= 6 * len(sources)
    tables = {node["id"] for node in root.all("table")}
    for svg in drawings:
        title, told = svg.children[:2]
        assert (title.tag, told.tag) == ("title", "desc") and title.text and len(told.text) > 40
        assert svg["role"] == "img" and svg["aria-labelledby"].split() == [title["id"], told["id"]]
        assert any(node["data-field"] for node in svg.all("circle", "polygon", "rect")), "nothing is drawn"
        name = title["id"].removesuffix("-wide-title").removesuffix("-narrow-title")
        assert {f"{name}-data", name.removesuffix("candidates") + "tried"} & tables


def test_its_tables_say_what_they_are_and_can_be_scrolled_by_keyboard(shown):
    root, _ = shown
    for table in root.all("table"):
        assert table.children[0].tag == "caption" and words(table.children[0])
        assert table.parent["role"] == "region" and table.parent["tabindex"] == "0"
        assert table.parent["aria-labelledby"] == table.children[0]["id"]
        columns = len(next(table.all("thead")).children[0].children)
        for row in (node for node in table.all("tr") if not node.inside("thead")):
            assert row.children[0].tag == "th" and row.children[0]["scope"] == "row" and words(row.children[0])
            assert sum(int(cell["colspan"] or 1) for cell in row.children) == columns
        assert all(node["scope"] for node in table.all("th"))


def test_headings_do_not_skip_a_level(shown):
    root, _ = shown
    levels = [int(node.tag[1]) for node in root.all("h1", "h2", "h3", "h4", "h5")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_every_text_of_the_verdict_and_every_warning_is_there(shown):
    root, sources = shown
    text = words(root)
    for source in sources:
        told = source.report.recommendation
        warned = [part for caution in source.report.warnings for part in (caution.text, caution.remedy)]
        costs = told.cost_of_mps if told.mps else []
        lost = [candidate.why_not for candidate in source.report.candidates if candidate.why_not]
        for part in (told.sentence, *told.because, *costs, *warned, *lost):
            assert " ".join(part.split()) in text


def test_every_command_is_there_to_the_letter(shown):
    root, sources = shown
    written = [node.text for node in root.all("pre")]
    for source in sources:
        assert set(source.report.recommendation.commands) <= set(written)


# ---------------------------------------------------------------- numbers

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def looked_up(data, pointer):
    for key in pointer.removeprefix("/").split("/"):
        data = data[int(key)] if isinstance(data, list) else data[key.replace("~1", "/").replace("~0", "~")]
    return data


def carried(node):
    """The number that an element stands for, exactly."""
    return float(node["data-value" if node.inside("svg") else "value"])


def stands_for(text, number, field=""):
    """Whether a shown text is this number, rounded to the digits that it has."""
    if text == "<0.1 %":
        return 0 < number < 0.1
    (digits,) = NUMBER.findall(text)
    plain = digits.replace(",", "")
    last = 10.0 ** -len(plain.partition(".")[2]) if "e" not in plain else abs(float(plain)) * 1e-2
    if text.endswith("GiB"):
        number /= 2**30
    elif text.endswith(("TB/s", "TFLOP/s")):
        number /= 1e12
    elif text.endswith(" min"):
        number /= 60
    elif text.endswith(" s"):
        number /= 1000
    elif text.endswith(" ms") and field.endswith("_s"):
        number *= 1000
    return abs(float(plain) - number) <= 0.501 * last


def test_every_number_that_has_a_place_in_the_report_is_what_stands_there(shown):
    root, sources = shown
    data = json.loads(reporting.as_json(sources))
    found = [node for node in root.all() if node["data-field"]]
    assert len(found) > 100 * len(sources)
    for node in found:
        number = looked_up(data, node["data-field"])
        assert isinstance(number, int | float) and carried(node) == number
        if node.text:
            assert stands_for(node.text, number, node["data-field"]), (node.text, number, node["data-field"])


def leaves(data):
    match data:
        case dict():
            for key, inner in data.items():
                yield key
                yield from leaves(inner)
        case list():
            for inner in data:
                yield from leaves(inner)
        case _:
            yield data


# What stands in the texts of the page itself: 90 % intervals, percentiles, “1×” and the like.
OWN = {"90", "50", "95", "99", "1"}


def test_every_other_number_is_quoted_from_the_report(shown):
    root, sources = shown
    quoted, numbers = set(OWN), set()
    for leaf in leaves(json.loads(reporting.as_json(sources))):
        if isinstance(leaf, str):
            quoted |= set(NUMBER.findall(leaf))
        elif isinstance(leaf, int | float) and not isinstance(leaf, bool):
            numbers |= {leaf, leaf / 2**30}  # bytes are told in GiB as well
    for source in sources:
        quoted |= set(NUMBER.findall(f"{source.name} {source.run}"))
        numbers.add(source.report.question.min_gain * 100)  # --min-gain 10%
    for text, node in root.texts():
        if node["data-field"] or "tick" in node.classes or node.tag == "style":
            continue
        for token in NUMBER.findall(text):
            known = token in quoted or any(stands_for(token, number) for number in numbers)
            assert known, f"{token} in “{text}”"


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_every_rate_and_gain_of_the_report_is_on_the_page(folder):
    source = recorded(folder)
    fields = {node["data-field"] for node in tree(source).all() if node["data-field"]}
    for index, candidate in enumerate(source.report.candidates):
        for key in ("throughput_tok_per_s", "gain_vs_default", "gain_vs_best_without_mps"):
            if getattr(candidate, key) is not None:
                assert {f"/candidates/{index}/{key}/{end}" for end in ("value", "low", "high")} <= fields
        for key in ("gpu_idle_pct", "cpu_stall_pct", "sm_active_pct"):
            assert getattr(candidate, key) is None or f"/candidates/{index}/{key}" in fields


@given(reports)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_report_makes_a_page_whose_numbers_are_its_own(any_report):
    data = json.loads(dumps(any_report))
    for node in tree(Source(any_report, "any.json")).all():
        if node["data-field"]:
            assert carried(node) == looked_up(data, node["data-field"])
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width"):
            if node.inside("svg") and node[name]:
                assert -1000 < float(node[name]) < 10000


# ---------------------------------------------------------------- what is drawn


def centre(node):
    if node.tag == "circle":
        return float(node["cx"]), float(node["cy"])
    corners = [tuple(map(float, corner.split(","))) for corner in node["points"].split()]
    return tuple((min(c[axis] for c in corners) + max(c[axis] for c in corners)) / 2 for axis in (0, 1))


def drawing(root, name, kind="wide"):
    return next(svg for svg in root.all("svg") if svg.children[0]["id"] == f"{name}-{kind}-title")


def marks(svg):
    return [node for node in svg.all("circle", "polygon") if node["data-field"]]


@pytest.mark.parametrize("kind", ["wide", "narrow"])
@pytest.mark.parametrize("name", ["candidates", "gain", "latency-ttft-p95"])
def test_marks_stand_in_the_order_of_their_numbers(name, kind):
    found = marks(drawing(tree(recorded(CALL_2)), name, kind))
    axis = 0 if name == "candidates" else 1
    seen = sorted((float(node["data-value"]), centre(node)[axis]) for node in found)
    places = [place if axis == 0 else -place for _, place in seen]
    # The middle of a triangle's corners is not where it stands: by two pixels at most.
    assert len(seen) >= 15 and all(after >= before - 2 for before, after in pairwise(places))


def test_figures_beside_each_other_have_one_scale():
    root = tree(recorded(CALL_2), recorded(CALL_2_3B))
    for name in ("candidates", "waterfall", "gain", "latency-ttft-p95", "kernels-decode"):
        one, other = (
            [
                (words(node), node["x"])
                for node in drawing(root, f"{letter}-{name}").all("text")
                if "tick" in node.classes
            ]
            for letter in "ab"
        )
        assert one == other and len(one) >= 3


def test_sorts_of_candidates_differ_by_shape_and_not_by_colour_alone():
    shapes = {}
    for node in marks(drawing(tree(recorded(CALL_2)), "candidates")):
        corners = [tuple(map(float, corner.split(","))) for corner in (node["points"] or "").split()]
        upright = len({x for x, _ in corners}) == 2  # a square; a diamond's corners have three
        shapes.setdefault(node.classes[1], set()).add((len(corners), upright))
    assert shapes == {
        "single": {(4, False)},
        "several": {(4, True)},
        "mps": {(0, False)},
        "percentages": {(3, False)},
    }


def test_an_objective_is_a_line_with_all_that_keeps_to_it_on_its_left():
    source = under_objectives(CALL_2, "ttft_p95=150ms,itl_p95=25ms")
    root = tree(source)
    data = json.loads(dumps(source.report))
    for metric, limit in (("ttft", 150.0), ("itl", 25.0)):
        svg = drawing(root, f"latency-{metric}-p95")
        line = next(node for node in svg.all("line") if node["class"] == "limit")
        assert words(next(node for node in svg.all("text") if "limit" in node.classes)) == f"SLO {limit:.0f} ms"
        for node in marks(svg):
            point = looked_up(data, node["data-field"].removesuffix("/throughput_tok_per_s/value"))
            assert (centre(node)[0] <= float(line["x1"])) == (point[f"{metric}_ms"]["p95"] <= limit)
    assert "No objective was set" not in words(root)


def test_without_an_objective_the_page_says_so_and_draws_no_line():
    root = tree(recorded(CALL_2))
    assert "No objective was set" in words(root)
    assert not [node for node in root.all("line") if node["class"] == "limit"]


def test_the_waterfall_ends_at_the_gain_of_what_it_leads_to():
    svg = drawing(tree(recorded(CALL_2)), "waterfall")
    *_, together = marks(svg)
    assert together["data-field"].endswith("/gain_vs_default/value") and together["data-value"] == "3.01777"
    bars = list(svg.all("rect"))
    assert [bar["data-field"] for bar in bars] == [f"/waterfall/{n}/factor/value" for n in range(4)]
    ends = [float(bar["x"]) + float(bar["width"]) for bar in bars]
    assert ends == sorted(ends) and abs(ends[-1] - centre(together)[0]) < 1


def test_a_loss_is_drawn_as_one_and_called_one():
    def step(change, factor):
        return WaterfallStep(step="engines", change=change, factor=value(factor), trials=["a"])

    root = one(waterfall=[step("2 engines without MPS", 1.5), step("2 engines under MPS", 0.8)])
    gain, loss = drawing(root, "waterfall").all("rect")
    assert (gain["class"], loss["class"]) == ("bar gain", "bar loss")
    assert abs(float(gain["x"]) + float(gain["width"]) - float(loss["x"]) - float(loss["width"])) < 1
    assert words(by_id(root, "waterfall-data")).endswith("2 engines under MPS 0.80× (0.78× to 0.82×) loss")


def luminance(colour):
    """Relative luminance of “#rrggbb” by WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_texts_and_marks_stand_out_in_every_theme():
    style = (ROOT / "advisor" / "report" / "templates" / "style.css").read_text()
    themes = [
        dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(themes) == 3  # light, dark, on paper
    for theme in themes:
        for back in (theme["paper"], theme["panel"]):
            assert all(contrast(theme[name], back) >= 4.5 for name in ("ink", "quiet", "link", "good", "bad", "limit"))
        for name in ("single", "several", "mps", "percentages", "dark-bar"):
            assert contrast(theme[name], theme["paper"]) >= 3
        assert contrast(theme["light-bar"], theme["dark-bar"]) >= 3


# ---------------------------------------------------------------- what is said


def test_a_predicted_number_says_so_wherever_it_stands():
    guess = measured(3, True, 20000.0, source="predicted", gain_vs_default=value(2.2))
    root = one(candidates=[*report().candidates, guess])
    assert "3 engines under MPS: predicted, not measured." in words(root)
    (row,) = [row for row in by_id(root, "tried").all("tr") if words(row).startswith("3 engines under MPS")]
    assert [words(node) for node in row.all("em")] == ["predicted"] * 3
    for name, number in (("candidates", "20000.0"), ("gain", "2.2")):
        hollow = [node["data-value"] for node in drawing(root, name).all("circle") if "hollow" in node.classes]
        assert hollow == [number]
    assert "20,000 (19,600 to 20,400) predicted" in words(drawing(root, "candidates"))
    assert "Hollow marks were not measured." in words(root)


def test_gains_of_what_is_advised_without_a_measurement_say_so():
    guess = measured(4, True, 29776.0, source="predicted", trial="x")
    steps = [WaterfallStep(step="mps", change="4 engines under MPS", factor=guess.gain_vs_default, trials=["x"])]
    root = one(candidates=[measured(1, False, 9100.4), guess], waterfall=steps)
    told = next(node for node in root.all("dl"))
    assert len(list(told.all("em"))) == len(list(told.all("dd"))) == 3
    assert words(drawing(root, "waterfall")).count("predicted") == 2


def test_a_number_without_an_interval_says_so():
    bare = msgspec.structs.replace(value(12345.0), low=None, high=None)
    root = one(candidates=[measured(1, False, 1.0, throughput_tok_per_s=bare)])
    assert "12,345 (no interval)" in words(by_id(root, "tried"))
    assert "12,345 (no interval)" in words(drawing(root, "candidates"))


def test_a_gain_near_the_one_that_is_asked_has_more_digits_in_all_of_its_ends():
    near = msgspec.structs.replace(value(1.05), low=0.9, high=1.1004)
    root = one(candidates=[measured(2, True, 100.0, gain_vs_best_without_mps=near)])
    assert "1.050× (0.900× to 1.100×)" in words(by_id(root, "tried"))


def test_what_was_not_measured_is_listed_with_its_reason():
    text = words(by_id(one(), "unmeasured").parent)
    for told in (
        "4 engines under MPS at 42 % wrong results matrix product off by 0.37",
        "7 engines under MPS skipped --max-engines is 6",
        "where a decode step's time goes the report has no profile",
        "the waterfall of credit this run did not tune",
        "throughput and latency over the load this run measured one load only",
    ):
        assert told in text


def test_every_key_of_the_profile_that_is_null_has_a_reason():
    unknown = by_id(one(profile=Profile()), "unknown")
    # Beside its head, the waterfall and the load.
    assert len(list(unknown.all("tr"))) == 1 + len(Profile.__struct_fields__) + 2
    assert "this run did not repeat fixed steps on the GPU alone" in words(unknown)
    assert "the ceilings of this GPU were neither measured nor given by its vendor" in words(unknown)


@pytest.mark.parametrize(
    ("status", "word"), [("inconclusive", "Inconclusive"), ("infeasible", "Infeasible"), ("no_slo", "No SLO met")]
)
def test_a_report_without_a_verdict_says_which(status, word):
    told = msgspec.structs.replace(advice(), status=status, sentence="It is unknown.", mps=None, commands=[])
    root = one(recommendation=told)
    verdict = next(node for node in root.all("div") if node.classes[:1] == ["verdict"])
    assert words(verdict).endswith(f"{word} It is unknown.") and "undecided" in verdict.classes
    assert "►" not in words(root) and "What MPS costs" not in words(root)


def test_a_report_without_any_candidate_still_makes_a_page():
    root = one(candidates=[])
    assert "No candidate has a throughput." in words(root)


def test_environment_that_no_command_has_is_exported():
    told = msgspec.structs.replace(advice(), environment={"VLLM_THING": "a b"})
    assert "export VLLM_THING='a b'" in [node.text for node in one(recommendation=told).all("pre")]


def test_how_to_get_it_again_is_told():
    root = tree(recorded(CALL_2))
    text = [node.text for node in root.all("pre")]
    assert f"mps-advisor profile --replay {CALL_2}" in text
    assert f"mps-advisor report {CALL_2} --html page.html" in text
    versions = words(by_id(root, "machine"))
    for told in ("vLLM 0.26.0", "PyTorch 2.11.0", "driver 580.159", "GPU NVIDIA H200"):
        assert told in versions


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_the_command_that_measures_again_is_understood(folder):
    command = next(node.text for node in tree(recorded(folder)).all("pre") if "profile --model" in node.text)
    done = run(*shlex.split(command)[1:], "--dry-run")
    assert done.returncode == 0, done.stderr


def test_a_fast_profile_is_measured_again_as_one():
    commands = [node.text for node in one(protocol=FAST).all("pre")]
    assert sum("--protocol fast" in command for command in commands) == 1


# ---------------------------------------------------------------- what is not trusted

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}{% raw %}"


def test_texts_of_a_report_stay_texts():
    text = f"{EVIL}\u202e\x1b[31m\x00"
    plain = report()
    candidate = measured(2, True, 20000.0, why_not=text, limited_by=text, limit_evidence=text, trial=text)
    evil = report(
        created=text,
        model=msgspec.structs.replace(plain.model, name=text, dtype=text, quantization=text, kv_cache_dtype=text),
        gpu=msgspec.structs.replace(plain.gpu, name=text, driver=text, uuid=text),
        host=msgspec.structs.replace(plain.host, cpu=text, kernel=text),
        software=msgspec.structs.replace(plain.software, vllm=text, environment={text: text}),
        warnings=[Caution(code="drift", text=text, remedy=text)],
        candidates=[*plain.candidates, candidate, failed(3, "crash", text)],
        waterfall=[WaterfallStep(step=text, change=text, factor=value(2.0), trials=[text])],
        recommendation=advice(
            sentence=text, because=[text], cost_of_mps=[text], environment={text: text}, commands=[text]
        ),
    )
    for sources in ([Source(evil, text, text)], [Source(evil, text), Source(plain, "plain.json")]):
        written = page(sources)
        root = Tree(written).root
        assert not list(root.all("script", "img"))
        assert not [name for node in root.all() for name in node.attributes if name.startswith("on")]
        assert words(root).count(EVIL) >= 15 and "49" not in NUMBER.findall(words(root))
        assert not set("\x00\x1b\u202e") & set(written)


def test_a_file_with_odd_names_and_numbers_still_makes_a_page():
    plain = report()
    odd = report(
        question=msgspec.structs.replace(plain.question, slo={"speed": 1.0, "ttft_p95": -1.0}, min_gain=1e300),
        candidates=[measured(10**15, True, 1e300), measured(1, False, -5.0, ttft_ms=Percentiles(p50=0, p95=0, p99=0))],
        waterfall=[
            WaterfallStep(step="", change="", factor=value(number), trials=[]) for number in (1e300, 1e300, 0, -1)
        ],
    )
    tree(Source(odd, "odd.json"), Source(plain, "plain.json"))


# ---------------------------------------------------------------- several reports


def test_reports_stand_beside_each_other_and_their_differences_are_named():
    plain = report()
    gpu = msgspec.structs.replace(plain.gpu, driver="570.1")
    software = msgspec.structs.replace(plain.software, vllm="0.27.0", environment={"VLLM_X": "1"})
    other = report(gpu=gpu, software=software)
    root = tree(Source(plain, "a.json"), Source(other, "b.json"))
    told = next(node for node in root.all("p") if node["class"] == "differ")
    assert words(told).startswith("Not the same: GPU (driver) and software (vllm, environment VLLM_X).")
    rows = [[words(cell) for cell in row.children] for row in by_id(root, "differences").all("tr")][1:]
    assert rows == [
        ["GPU: driver", "580.159", "570.1"],
        ["software: vllm", "0.26.0", "0.27.0"],
        ["software: environment VLLM_X", "–", "1"],
    ]
    for row in (node for node in root.all("div") if node.classes == ["columns"]):
        assert [column.classes for column in row.children] == [["column"]] * 2


def test_the_compared_rates_are_those_that_the_gains_are_of():
    root = tree(recorded(CALL_2), recorded(CALL_2_3B))
    rows = {
        words(row.children[0]): [words(cell) for cell in row.children[1:]] for row in by_id(root, "compared").all("tr")
    }
    assert rows["best without MPS"] == ["4 engines without MPS", "2 engines without MPS"]
    assert rows["best under MPS"] == ["4 engines under MPS at 50 %", "2 engines under MPS"]
    assert rows["advised"] == ["4 engines under MPS at 50 %", "1 engine"]


def test_equal_reports_are_called_so():
    root = tree(Source(report(), "a.json"), Source(report(), "b.json"))
    assert "are the same in all reports" in words(root)
    assert not [node for node in root.all("table") if node["id"] == "differences"]


def test_one_report_is_compared_with_nothing():
    assert not [node for node in one().all() if node["id"] == "comparison"]


def test_more_reports_than_letters_have_names_of_their_own():
    names = [node["id"] for node in tree(*[Source(report(), "a.json")] * 28).all() if node["id"]]
    assert len(names) == len(set(names))


def test_other_workloads_and_loads_make_a_page():
    curve = [
        CurvePoint(
            concurrency=load, throughput_tok_per_s=value(load * 10.0), ttft_ms=None, itl_ms=None,
            e2e_ms=Percentiles(p50=1, p95=load, p99=3), trial="x",
        )
        for load in (1, 2)
    ]  # fmt: skip
    bare = {"ttft_ms": None, "itl_ms": None, "e2e_ms": None}
    load = msgspec.structs.replace(report().workload, kind="decode")
    asked = Question(workload=load, max_engines=2, thread_percentages=[40, 60], min_gain=0.05, slo={"e2e_p99": 20.0})
    root = one(candidates=[measured(1, False, 10.0, curve=curve, **bare)], workload=load, question=asked)
    assert words(by_id(root, "latency-e2e-p99-data")).endswith("2 20 (19.6 to 20.4) 3 ms")
    command = next(node.text for node in root.all("pre") if "profile --model" in node.text)
    assert "--workload decode" in command and "--thread-percentages 40,60 --min-gain 5% --slo e2e_p99=20ms" in command
    silent = one(candidates=[measured(1, False, 10.0, **bare)])
    assert "No latency was measured for any candidate." in words(silent)


# ---------------------------------------------------------------- the command


def run(*arguments, cwd=None):
    command = [sys.executable, "-m", "advisor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(dumps(recorded(CALL_2).report))
    return path


def test_the_command_writes_a_page_and_replaces_an_older_one(saved, tmp_path):
    html = tmp_path / "page.html"
    html.write_text("old")
    done = run("report", saved, CALL_2_3B, "--html", html)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"wrote {html}\n")
    assert "Run 4 engines under MPS" in words(Tree(html.read_text()).root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "report.json"]


def test_without_a_page_it_prints_what_profile_prints(saved):
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    render(loads(saved.read_bytes(), "report.json"), console)
    assert run("report", saved).stdout == run("report", CALL_2).stdout == console.file.getvalue()


def test_json_is_the_report_or_a_list_of_reports(saved, tmp_path):
    assert run("report", saved, "--format", "json").stdout == saved.read_text() + "\n"
    html = tmp_path / "page.html"
    several = run("report", saved, saved, "--format", "json", "--html", html)
    assert json.loads(several.stdout) == [json.loads(saved.read_text())] * 2 and html.exists()


def test_an_inconclusive_report_is_shown_all_the_same():
    done = run("report", ROOT / "data" / "studies" / "h200-qwen2.5-3b-serve-1024-first-full")
    assert done.returncode == 0 and "Inconclusive." in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.json"], 2, "missing.json does not exist"),
        ([], 2, "Missing argument"),
        (["report.json", "--html", "no/page.html"], 2, "the folder no does not exist"),
        (["report.json", "--html", "folder"], 2, "a folder"),
        (["report.json", "--html", "report.json"], 2, "the report itself"),
        (["report.json", "--html", "/dev/null"], 2, "no ordinary file"),
        (["report.json", "--html", "x" * 300], 3, "cannot be written"),
        (["cut.json"], 3, "cut.json"),
        (["huge.json", "--html", "page.html"], 3, "huge.json: int too large"),
        (["newer.json"], 3, "install a newer mps-advisor"),
        (["list.json"], 3, "expected an mps-advisor report"),
        (["folder"], 3, "no run folder"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_a_code(saved, arguments, code, words):
    folder = saved.parent
    (folder / "folder").mkdir()
    (folder / "cut.json").write_text(saved.read_text()[:1000])
    (folder / "huge.json").write_text(saved.read_text().replace('"engines": 4', f'"engines": {10**400}'))
    (folder / "newer.json").write_text('{"schema_version": 99}')
    (folder / "list.json").write_text("[]")
    before = sorted(path.name for path in folder.iterdir())
    done = run("report", *arguments, cwd=folder)
    assert (done.returncode, done.stdout) == (code, "") and words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_wheel_carries_the_templates():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = told["tool"]["setuptools"]["package-data"]["advisor"]
    carried = {path for pattern in patterns for path in (ROOT / "advisor").glob(pattern)}
    assert set((ROOT / "advisor" / "report" / "templates").iterdir()) <= carried


# ---------------------------------------------------------------- a real browser


@pytest.mark.parametrize("folders", [(CALL_2,), (CALL_2, CALL_2_3B)], ids=["one", "two"])
def test_a_browser_shows_it_whole_at_390_pixels_without_an_error(folders, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed here")
    inner = page([recorded(folder) for folder in folders])
    outer = tmp_path / "frame.html"
    # The page itself may run nothing: the one around it asks how wide it came out, and which drawings are shown.
    outer.write_text(
        f"""<!doctype html><pre></pre>
        <iframe style="width:390px;height:800px;border:0" srcdoc="{escape(inner)}"></iframe>
        <script>onload = () => {{
          const page = document.querySelector("iframe").contentDocument;
          const wide = [...page.querySelectorAll("svg")].map(one => one.getBoundingClientRect().width);
          document.querySelector("pre").textContent = JSON.stringify(
            [page.documentElement.clientWidth, page.documentElement.scrollWidth, wide]);
        }}</script>"""
    )
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom", outer.as_uri(),
        ],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    found = re.search(r"<pre>(\[.*?\])</pre>", done.stdout)
    assert found, done.stderr[-2000:]
    width, needed, drawings = json.loads(found[1])
    assert needed <= width <= 390
    assert sum(wide > 250 for wide in drawings) == len(drawings) / 2 and all(wide <= 390 for wide in drawings)
    assert "CONSOLE" not in done.stderr
