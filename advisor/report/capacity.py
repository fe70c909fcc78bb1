"""A capacity plan as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import msgspec

from advisor.core import slo
from advisor.core.capacity import CapacityPlan, Count, OverDemand, Role, Service, Way
from advisor.core.records import Value
from advisor.report.formats import clean
from advisor.report.naming import MISSING
from advisor.report.terminal import NARROWEST, Line, wrap

ROLES: dict[Role, str] = {
    "advised": "advised",
    "best_without_mps": "best without MPS",
    "tuned": "tuned",
    "default": "default",
}
SHORT_ROLES: dict[Role, str] = {**ROLES, "best_without_mps": "no MPS"}


def as_json(plan: CapacityPlan) -> str:
    return json.dumps(msgspec.to_builtins(plan), indent=2, ensure_ascii=False, allow_nan=False)


def lines(plan: CapacityPlan, width: int) -> Iterator[Line]:
    """One part a service, the total where there are several, the notes."""
    for service in plan.services:
        yield from _service(service, width)
        yield "", ""
    if len(plan.services) > 1:
        yield from _total(plan)
        yield "", ""
    for note in [_loaded(plan), *plan.notes]:
        yield from ((line, "dim") for line in wrap(f"  {note}", width, "  "))


def _loaded(plan: CapacityPlan) -> str:
    months = f" A month has {plan.hours_per_month:g} hours." if any(one.gpu_hour for one in plan.services) else ""
    return (
        f"GPUs are loaded to at most {(1 - plan.headroom) * 100:g} % of the measured throughput. Ranges in brackets "
        f"are 90 % intervals.{months}"
    )


def _service(service: Service, width: int) -> Iterator[Line]:
    demand = clean(service.demand.text)
    if service.demand.counted == "requests" and service.unit == "tokens":
        demand += f" of {service.tokens_per_request:,} tokens out, {_number(service.tokens_per_s)} tokens/s"
    elif not service.demand.text.endswith("/s"):
        demand += f", {_number(service.tokens_per_s)} {service.unit}/s"
    title = f"{clean(service.model)} on {clean(service.gpu)}: {demand}, {_in(service)}"
    if service.objectives:
        title += f", {slo.shown(service.objectives)}"
    yield from ((line, "bold") for line in wrap(title, width, "  "))
    yield from _narrow(lambda ends: _bills(service, ends), width)
    for way in service.ways:
        if way.bill is None:
            yield from ((line, "dim") for line in wrap(f" {_name(way).strip()}: {way.why}", width, "   "))
    yield from ((line, "bold") for line in wrap(_sentence(service), width))
    yield "", ""
    saved = _compared(service)
    over = f", and what the advice saves a month over the {saved[1]} engine" if saved and service.gpu_hour else ""
    yield f"GPUs over the demand{over}:", "bold"
    yield from _narrow(lambda ends: _over_demand(service, ends), width)


def _in(service: Service) -> str:
    return f"decode at {service.tokens_in:,}" if service.workload == "decode" else f"{service.tokens_in:,} tokens in"


def _narrow(table: Callable[[bool], Sequence[Line]], width: int) -> Sequence[Line]:
    """A table with the ends of its intervals, or without them where they are too wide: the JSON has them."""
    with_ends = table(True)
    return with_ends if max(len(line) for line, _ in with_ends) <= width else table(False)


def _bills(service: Service, ends: bool) -> Sequence[Line]:
    load, money = bool(service.objectives), service.gpu_hour is not None
    header = ["", f"{service.unit}/s", "load", "GPUs", "a month", "per 1M", "Wh/1M"]
    kept = [True, True, load, True, money, money, True]
    rows, styles = [header], ["dim"]
    for way in service.ways:
        if way.bill is None or way.throughput_tok_per_s is None:
            continue
        energy = way.energy_wh_per_million
        rows.append(
            [
                _name(way),
                _number(way.throughput_tok_per_s.value),
                str(way.concurrency or MISSING),
                _gpus(way.bill.gpus, ends),
                _money(way.bill.cost_per_month),
                _money(way.bill.cost_per_million),
                MISSING if energy is None else _number(energy),
            ]
        )
        styles.append("bold green" if "advised" in way.roles else "")
    shown = [[cell for cell, keep in zip(row, kept, strict=True) if keep] for row in rows]
    return list(_table(shown, styles))


def _over_demand(service: Service, ends: bool) -> Sequence[Line]:
    ways = [(index, way) for index, way in enumerate(service.ways) if way.bill is not None]
    rows = [[f"{service.demand.counted}/s", *(", ".join(SHORT_ROLES[role] for role in way.roles) for _, way in ways)]]
    compared = _compared(service) if service.gpu_hour is not None else None
    if compared:
        rows[0].append("saved")
    for one in service.over_demand:
        bills = [one.bills[index] for index, _ in ways]
        cells = [_number(one.per_s), *(MISSING if bill is None else _gpus(bill.gpus, ends) for bill in bills)]
        rows.append([*cells, _saved(one, compared[0])] if compared else cells)
    return list(_table(rows, ["dim"]))


def _compared(service: Service) -> tuple[int, str] | None:
    """What the advice is compared with: the index of the tuned engine, or else of the default one, and its role."""
    roles: tuple[Role, Role] = ("tuned", "default")
    for role in roles:
        for index, way in enumerate(service.ways):
            if role in way.roles and "advised" not in way.roles and way.bill is not None:
                return index, role
    return None


def _saved(one: OverDemand, other: int) -> str:
    before, after = one.bills[other], one.bills[0]
    if before is None or after is None or before.cost_per_month is None or after.cost_per_month is None:
        return MISSING
    saved = before.cost_per_month.value - after.cost_per_month.value
    return f"{saved:,.0f}" if abs(saved) < 1e9 else f"{saved:.3g}"


def _total(plan: CapacityPlan) -> Iterator[Line]:
    yield "All together:", "bold"
    rows, total = [["", "GPUs", "a month", "per 1M"]], plan.total
    for name, bill in (("advised", total.advised), ("tuned", total.tuned), ("default", total.default)):
        told = (
            [MISSING] * 3
            if bill is None
            else [_gpus(bill.gpus), _money(bill.cost_per_month), _money(bill.cost_per_million)]
        )
        rows.append([f" {name}", *told])
    priced = any(one.gpu_hour is not None for one in plan.services)
    yield from _table(rows if priced else [row[:2] for row in rows], ["dim"])


def _table(rows: Sequence[Sequence[str]], styles: Sequence[str]) -> Iterator[Line]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    between = "  " if sum(widths) + 2 * (len(widths) - 1) <= NARROWEST else " "
    for index, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(wide) for cell, wide in zip(row[1:], widths[1:], strict=True))]
        yield between.join(cells).rstrip(), styles[index] if index < len(styles) else ""


def _name(way: Way) -> str:
    if way.bill is None and len(way.roles) == 1 and way.name.startswith(way.roles[0]):
        return way.name
    others = [ROLES[role] for role in way.roles if role not in ("advised", "best_without_mps")]
    mark = "►" if "advised" in way.roles else " "
    return f"{mark}{way.name}" + (f", {' and '.join(others)}" if others else "")


def _sentence(service: Service) -> str:
    """“3 GPUs as advised, 7 (7 to 8) with the tuned engine, 8 (7 to 8) with the default one.”"""
    told = {role: way.bill for way in service.ways for role in way.roles if way.bill is not None}
    first = told["advised"].gpus
    parts = [f"{_gpus(first)} GPU{'s' if first.value != 1 else ''} as advised"]
    if "tuned" in told:
        parts.append(f"{_gpus(told['tuned'].gpus)} with the tuned engine")
    if "default" in told:
        parts.append(f"{_gpus(told['default'].gpus)} with the default one")
    return ", ".join(parts) + "."


def _gpus(count: Count, ends: bool = True) -> str:
    text = _number(count.value)
    if not ends or (count.low == count.high and count.low is not None):
        return text
    if count.low is None or count.high is None:
        return f"{text} (no interval)"
    return f"{text} ({_number(count.low)}–{_number(count.high)})"


def _number(value: float) -> str:
    """A count or a rate; short where it is large."""
    if value >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _money(cost: Value | None) -> str:
    if cost is None:
        return MISSING
    if cost.value >= 1e9:
        return f"{cost.value:.3g}"
    return f"{cost.value:,.0f}" if cost.value >= 1000 else f"{cost.value:.3g}"
