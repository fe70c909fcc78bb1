"""One report as the page's figures and tables read it, and what the figures of several reports share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup

from advisor.core.advised import named
from advisor.core.records import Candidate, CurvePoint, KernelPart, Percentiles, Report, Source, Value
from advisor.report import figures, naming
from advisor.report.fields import Fields, Interval, Key
from advisor.report.figures import Point, Sort, Text
from advisor.report.tables import Table

SORTS: dict[Sort, str] = {
    "single": "one engine, no MPS",
    "several": "several engines, no MPS",
    "mps": "under MPS",
    "percentages": "under MPS with thread percentages",
}


_METRIC = re.compile(r"(ttft|itl|e2e)_(p50|p95|p99)")


class Drawn(NamedTuple):
    """A figure in both widths with the table behind it; without drawings `missing` says why there is none."""

    name: str
    title: str
    caption: Text
    drawings: Sequence[Markup] = ()
    table: Table | None = None
    missing: str = ""


class Shared(NamedTuple):
    """What the scales of all reports on a page have room for, so that figures beside each other can be compared."""

    rate: dict[str, float]  # by its unit
    gain: float
    engines: int
    latencies: dict[str, tuple[float, float]]
    products: Sequence[float]  # of the waterfalls' factors, with the ends of their intervals
    share: float  # of the largest sort of kernels in a step, in %


class Sheet(NamedTuple):
    """One report, its numbers' places, and what its names on the page begin with (so that they are unique)."""

    report: Report
    fields: Fields
    prefix: str
    shared: Shared

    @property
    def unit(self) -> str:
        return unit(self.report)

    def gain(self, *path: Key, source: Source | None = None, against: float | None = None) -> Interval | None:
        """A gain, with more digits where two would hide on which side of `against` it or an end of it lies."""
        found = self.fields.interval(*path, form=times, source=source)
        ends = [] if found is None else [end.value for end in (found.middle, found.low, found.high) if end is not None]
        if against is not None and any(times(end) == times(against) for end in ends):
            return self.fields.interval(*path, form=closer, source=source)
        return found


def shared(reports: Sequence[Report]) -> Shared:
    """The largest of everything that is drawn."""
    candidates = [one for report in reports for one in report.candidates]
    rates: dict[str, float] = {}
    latencies: dict[str, tuple[float, float]] = {}
    for report in reports:
        seen = [one.throughput_tok_per_s for one in report.candidates]
        rates[unit(report)] = max(rates.get(unit(report), 0.0), _largest(seen))
        for metric in latencies_seen(report):
            ends = [at for one in report.candidates for point in loads(one) if (at := latency(point, metric))]
            ends += [limit for name, limit in objectives(report).items() if name == metric]
            ends += latencies.get(metric, ())
            latencies[metric] = min(ends), max(ends)
    return Shared(
        rate=rates,
        gain=_largest([one.gain_vs_default for one in candidates]),
        engines=max((one.engines for one in candidates if one.gain_vs_default), default=1),
        latencies=latencies,
        products=[end for report in reports for end in _products(report)],
        share=max((part.share.value for report in reports for part in _kernel_parts(report)), default=0.0),
    )


def unit(report: Report) -> str:
    """What throughput counts: with one token out, a token is a prompt."""
    return "prompts/s" if report.workload.kind == "prefill" else "tokens/s"


def _largest(values: Sequence[Value | None]) -> float:
    return max((value.value if value.high is None else value.high for value in values if value), default=1.0)


def _products(report: Report) -> Iterator[float]:
    whole = 1.0
    for step in report.waterfall or []:
        yield from (whole * end for end in (step.factor.low, step.factor.high) if end is not None)
        whole *= step.factor.value
        yield whole
    if (index := led_to(report)) is not None and (gain := report.candidates[index].gain_vs_default) is not None:
        yield from (end for end in (gain.low, gain.high) if end is not None)


def led_to(report: Report) -> int | None:
    """Which candidate the waterfall leads to: one of the last step's trials, whose gain the factors multiply to."""
    steps = report.waterfall or []
    whole = math.prod(step.factor.value for step in steps)
    for index, one in enumerate(report.candidates):
        last = bool(steps) and one.trial in steps[-1].trials
        if last and one.gain_vs_default is not None and math.isclose(one.gain_vs_default.value, whole, rel_tol=1e-3):
            return index
    return None


def _kernel_parts(report: Report) -> Iterator[KernelPart]:
    for step in (report.profile.decode, report.profile.prefill) if report.profile else ():
        yield from step.kernels.values() if step else ()


def sort_of(one: Candidate) -> Sort:
    if one.mps:
        return "percentages" if one.thread_percentages else "mps"
    return "several" if one.engines > 1 else "single"


def full_name(report: Report, one: Candidate) -> str:
    """The name, with what the settings change of the default engine's."""
    changed = naming.changes(report, one)
    return named(one) + (f", {changed}" if changed else "")


def predicted(one: Candidate) -> bool:
    return one.source not in ("measured", None)


def drawn(draw: Callable[..., Markup], what: object, name: str, title: str, told: str, **more: object) -> list[Markup]:
    """The wide and the narrow drawing of one figure."""
    return [
        draw(what, name=name, title=title, told=told, width=width, **more) for width in (figures.WIDE, figures.NARROW)
    ]


def ordered(report: Report) -> list[tuple[int, Candidate]]:
    """Candidates from the simplest on, each with its index in the report."""
    return sorted(enumerate(report.candidates), key=lambda pair: naming.simplicity(pair[1]))


def point_of(x: float, seen: Interval, guessed: bool, note: Text = ()) -> Point:
    return Point(
        x=x,
        y=seen.middle.value,
        shown=seen.middle,
        low=seen.low.value if seen.low else None,
        high=seen.high.value if seen.high else None,
        note=note,
        predicted=guessed,
    )


def objectives(report: Report) -> dict[str, float]:
    """Those latency objectives that a figure can be about: a file may hold any name."""
    return {name: limit for name, limit in report.question.slo.items() if _METRIC.fullmatch(name)}


def latencies_seen(report: Report) -> list[str]:
    """“ttft_p95” and the like: those of the objectives, else TTFT and ITL, else what there is."""
    asked = list(objectives(report)) or ["ttft_p95", "itl_p95"]
    seen = [name for name in asked if any(latency(p, name) for one in report.candidates for p in loads(one))]
    if seen or objectives(report):
        return seen
    e2e = any(latency(point, "e2e_p95") for one in report.candidates for point in loads(one))
    return ["e2e_p95"] if e2e else []


def loads(one: Candidate) -> Sequence[Candidate | CurvePoint]:
    return [one, *one.curve]


def latency(point: Candidate | CurvePoint, metric: str) -> float | None:
    """In ms; None where it was not seen, or cannot stand on a scale of logarithms."""
    what, percentile = metric.split("_")
    seen: Percentiles | None = getattr(point, f"{what}_ms")
    value = None if seen is None else float(getattr(seen, percentile))
    return value if value is not None and value > 0 else None


def times(value: float) -> str:
    """“1.19×”."""
    return f"{value:.2f}×"


def closer(value: float) -> str:
    """“1.097×”."""
    return f"{value:.3f}×"


def count(value: float) -> str:
    return f"{value:,.0f}"
