"""How many GPUs a demand needs, with what a report advises and without it, and what they cost. Pure.

    GPUs = demand / ((1 - headroom) × tokens/s of one GPU), rounded up to whole ones

The ends of the 90 % interval of a GPU's throughput give the ends of the interval of GPUs, and these give those of
what they cost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from advisor.core import slo
from advisor.core.advised import advised, named
from advisor.core.errors import BadQuestion, DamagedRecord, NoHonestAnswer
from advisor.core.records import Candidate, CurvePoint, Record, Report, Value, WorkloadKind
from advisor.core.workload import output_tokens

Counted = Literal["requests", "tokens"]
Role = Literal["advised", "best_without_mps", "tuned", "default"]

HOURS_PER_MONTH = 730.0  # 365 days in twelve parts
JOULES_PER_WH = 3600.0
DEFAULT_HEADROOM = 0.30
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "hour": 3600.0, "day": 86400.0}
# One a day and a trillion a second: what lies outside is a slip of the pen.
LEAST_PER_S, MOST_PER_S = 1.0 / 86400.0, 1e12
MOST_PER_HOUR = 1e6  # that a GPU may cost
LEAST_TOK_PER_S, LEAST_TOK_PER_J = 1e-3, 1e-6  # what is less is no measurement of a GPU
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of the demand, in the table over it
# Quotients that are whole numbers but for the last bits of floating point are not rounded up.
WHOLE = 1e-9


class Demand(Record, frozen=True):
    """What has to be served: requests or output tokens per second, and the words that it was asked with."""

    counted: Counted
    per_s: float
    text: str


class Count(Record, frozen=True):
    """Whole GPUs, with the ends of a 90 % interval where there is one."""

    value: int
    low: int | None
    high: int | None


class Bill(Record, frozen=True):
    """The GPUs for one demand, and what they cost in the currency of their price; None where no price was given.

    `cost_per_million` is of a million output tokens (of prompts where the report measures prefill).
    """

    gpus: Count
    cost_per_month: Value | None
    cost_per_million: Value | None


class Way(Record, frozen=True):
    """One way to serve: a candidate in one or several roles, with the throughput that is planned with (of one GPU, at
    `concurrency` requests in flight), and its bill. `why`: why there is none.
    """

    roles: list[Role]
    name: str
    throughput_tok_per_s: Value | None = None
    concurrency: int | None = None
    energy_wh_per_million: float | None = None
    bill: Bill | None = None
    why: str | None = None


class OverDemand(Record, frozen=True):
    """What another demand takes: a bill for each way, in their order."""

    times: float
    per_s: float  # of what the demand counts
    bills: list[Bill | None]


class Service(Record, frozen=True):
    """One report with its demand. `tokens_per_request` is the mean that was measured with; decode has no requests, and
    `tokens_in` is its context.
    """

    report: str
    model: str
    gpu: str
    unit: Literal["tokens", "prompts"]
    workload: WorkloadKind
    tokens_in: int
    tokens_per_request: int | None
    demand: Demand
    tokens_per_s: float
    gpu_hour: float | None
    objectives: dict[str, float]
    ways: list[Way]
    over_demand: list[OverDemand]


class Total(Record, frozen=True):
    """All services together, each run in the same role; None where one of them does not have it."""

    advised: Bill | None
    tuned: Bill | None
    default: Bill | None


class CapacityPlan(Record, frozen=True):
    headroom: float
    hours_per_month: float
    services: list[Service]
    total: Total
    notes: list[str]


# ---------------------------------------------------------------- what is asked


def read_demand(text: str, counted: Counted) -> Demand:
    """“400/s” or “2e9/day” as a demand. A rate of requests without a unit is per second; tokens need one.

    Raises ValueError that says what is expected.
    """
    expected = "a number above zero like 400/s" if counted == "requests" else "a number above zero like 2e9/day"
    number, slash, unit = (part.strip().lower() for part in text.partition("/"))
    if not slash and counted == "requests":
        unit = "s"
    if unit not in SECONDS:
        raise ValueError(f"“{text}” is no demand; {expected} is expected, per {', '.join(SECONDS)}")
    value = _number(number)
    if value is None or value <= 0:
        raise ValueError(f"“{text}” is no demand; {expected} is expected")
    per_s = value / SECONDS[unit]
    if not LEAST_PER_S * (1 - WHOLE) <= per_s <= MOST_PER_S:
        raise ValueError(
            f"“{text}” is no demand; from one {counted[:-1]} a day to {MOST_PER_S:g} a second can be asked"
        )
    return Demand(counted=counted, per_s=per_s, text=f"{number} {counted}/{unit}")


def read_price(text: str) -> float:
    """What one GPU costs an hour. Raises ValueError that says what is expected."""
    value = _number(text)
    if value is None or not 0 < value <= MOST_PER_HOUR:
        raise ValueError(
            f"“{text}” is no price; a number above zero like 3.50, of at most {MOST_PER_HOUR:,.0f}, is expected"
        )
    return value


def _number(text: str) -> float | None:
    """A plain number; None for whatever else Python would take for one (“nan”, “inf”, “1_0”)."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text.strip(), re.ASCII):
        return None
    return float(text)


# ---------------------------------------------------------------- the plan


class Asked(Record, frozen=True):
    """One report with what is asked of it."""

    source: str  # a file's name, for messages
    report: Report
    demand: Demand
    gpu_hour: float | None


def plan(asked: Sequence[Asked], headroom: float, objectives: Mapping[str, float]) -> CapacityPlan:
    """GPUs, money and energy for each report's demand, and for all together.

    Without `objectives` those that a report was asked for hold. Raises NoHonestAnswer naming each report that
    recommends nothing or misses the objectives, BadQuestion for a demand that a report cannot speak of.
    """
    undecided = [
        f"{one.source} is {one.report.recommendation.status}: {one.report.recommendation.sentence}".rstrip(": ")
        for one in asked
        if one.report.recommendation.status != "recommend"
    ]
    if undecided:
        raise NoHonestAnswer(f"nothing is recommended that could be planned with; {'; '.join(undecided)}")
    services = [_service(one, headroom, objectives) for one in asked]
    return CapacityPlan(
        headroom=headroom,
        hours_per_month=HOURS_PER_MONTH,
        services=services,
        total=Total(
            advised=_sum(services, "advised"), tuned=_sum(services, "tuned"), default=_sum(services, "default")
        ),
        notes=list(_notes(asked, services)),
    )


def _service(asked: Asked, headroom: float, objectives: Mapping[str, float]) -> Service:
    report, load = asked.report, asked.report.workload
    kept = dict(objectives or report.question.slo)
    if name := slo.unseen(kept, load.kind):
        raise BadQuestion(f"--slo: {asked.source} measures {load.kind}, which shows no {name}; leave it out")
    each = output_tokens(load)
    if asked.demand.counted == "tokens" and load.kind == "prefill":
        raise BadQuestion(f"{asked.source} measures prefill, one token out a request: give --rate instead of --tokens")
    if asked.demand.counted == "requests" and load.kind == "decode":
        raise BadQuestion(f"{asked.source} measures decode, no whole requests: give --tokens instead of --rate")
    factor = each if asked.demand.counted == "requests" else 1
    tokens_per_s = asked.demand.per_s * factor

    def bill(rate: Value, wanted: float) -> Bill:
        return _bill(rate, wanted, headroom, asked.gpu_hour)

    ways = list(_ways(asked, kept, lambda rate: bill(rate, tokens_per_s)))
    return Service(
        report=asked.source,
        model=report.model.name,
        gpu=report.gpu.name,
        unit="prompts" if load.kind == "prefill" else "tokens",
        workload=load.kind,
        tokens_in=load.isl,
        tokens_per_request=None if load.kind == "decode" else each,
        demand=asked.demand,
        tokens_per_s=tokens_per_s,
        gpu_hour=asked.gpu_hour,
        objectives=kept,
        ways=ways,
        over_demand=[
            OverDemand(
                times=times,
                per_s=asked.demand.per_s * times,
                bills=[
                    None if way.throughput_tok_per_s is None else bill(way.throughput_tok_per_s, tokens_per_s * times)
                    for way in ways
                ],
            )
            for times in MULTIPLES
        ],
    )


def _ways(asked: Asked, objectives: Mapping[str, float], bill: Callable[[Value], Bill]) -> Iterator[Way]:
    """What is advised and what it is compared with, each candidate once, with all of its roles."""
    report = asked.report
    chosen = advised(report)
    if chosen is None:
        raise DamagedRecord(
            f"{asked.source} recommends {named(report.recommendation)}, which is not among its candidates; "
            "take an undamaged copy or measure again"
        )
    roles: dict[Role, Candidate | None] = {"advised": chosen}
    if chosen.mps:
        roles["best_without_mps"] = _base(report, "gain_vs_best_without_mps")
    first = report.candidates[0]
    roles["tuned"] = _base(report, "gain_vs_tuned")
    # Where it misses the objectives nothing was compared with it.
    roles["default"] = _base(report, "gain_vs_default") or (first if first.engines == 1 and not first.mps else None)
    told: list[Candidate] = []
    for role, one in roles.items():
        if one is None:
            if role != "best_without_mps":
                yield Way(roles=[role], name=f"{role} engine", why=_missing(report, role))
        elif not any(one is other for other in told):
            told.append(one)
            yield _way(asked, one, [name for name, other in roles.items() if other is one], objectives, bill)


def _base(report: Report, gain: str) -> Candidate | None:
    """The candidate without MPS that a gain is over: its own is exactly 1."""
    same = Value(value=1.0, low=1.0, high=1.0)
    return next((one for one in report.candidates if not one.mps and getattr(one, gain) == same), None)


def _missing(report: Report, role: Role) -> str:
    if role == "tuned" and not report.protocol.tune:
        return "the report looked for none"
    return "the report has no valid trial of it that keeps to its objectives"


def _way(
    asked: Asked, one: Candidate, roles: list[Role], objectives: Mapping[str, float], bill: Callable[[Value], Bill]
) -> Way:
    name = named(one)
    points: Sequence[Candidate | CurvePoint] = one.curve or [one]
    kept = [point for point in points if slo.meets(point, objectives) and point.throughput_tok_per_s is not None]
    point = max(kept, key=_rate, default=None) if objectives else one  # without them what the report quotes
    if point is None or point.throughput_tok_per_s is None:
        told = f"{slo.shown(objectives)} is kept to at no load that was measured" if objectives else "no throughput"
        if "advised" in roles:
            raise NoHonestAnswer(
                f"{asked.source}: {name} is advised, but {told}; ask for less or measure smaller loads"
            )
        return Way(roles=roles, name=name, why=told)
    rate = _checked(asked.source, name, point.throughput_tok_per_s)
    load = point.concurrency or asked.report.workload.concurrency
    # Energy was measured at the load that a candidate is quoted at, and only there.
    same_load = load == (one.concurrency or asked.report.workload.concurrency)
    return Way(
        roles=roles,
        name=name,
        throughput_tok_per_s=rate,
        concurrency=load,
        energy_wh_per_million=_energy(one.tokens_per_joule) if same_load else None,
        bill=bill(rate),
    )


def _energy(tokens_per_joule: float | None) -> float | None:
    """Wh for a million tokens; None where it was not measured, or is nothing that a GPU could do."""
    if tokens_per_joule is None or tokens_per_joule < LEAST_TOK_PER_J:
        return None
    return 1e6 / tokens_per_joule / JOULES_PER_WH


def _rate(point: Candidate | CurvePoint) -> float:
    return point.throughput_tok_per_s.value if point.throughput_tok_per_s else 0.0


def _checked(source: str, name: str, rate: Value) -> Value:
    """A throughput that can be divided by; without ends where they make no interval."""
    if not LEAST_TOK_PER_S <= rate.value < math.inf:
        raise DamagedRecord(f"{source}: the throughput of {name} is {rate.value:g} tokens/s; measure again")
    if rate.low is None or rate.high is None or not LEAST_TOK_PER_S <= rate.low <= rate.value <= rate.high:
        return Value(value=rate.value)
    return rate


def _bill(rate: Value, tokens_per_s: float, headroom: float, gpu_hour: float | None) -> Bill:
    def gpus(one: float) -> int:
        return max(1, math.ceil(tokens_per_s / ((1.0 - headroom) * one) * (1 - WHOLE)))

    # The faster a GPU is, the fewer there have to be.
    count = Count(
        value=gpus(rate.value),
        low=None if rate.high is None else gpus(rate.high),
        high=None if rate.low is None else gpus(rate.low),
    )
    month = None if gpu_hour is None else _scaled(count, gpu_hour * HOURS_PER_MONTH)
    return Bill(gpus=count, cost_per_month=month, cost_per_million=_per_million(month, tokens_per_s))


def _scaled(one: Count | Value, factor: float) -> Value:
    low, high = (None if end is None else end * factor for end in (one.low, one.high))
    return Value(value=one.value * factor, low=low, high=high)


def _per_million(month: Value | None, tokens_per_s: float) -> Value | None:
    return None if month is None else _scaled(month, 1e6 / (tokens_per_s * 3600.0 * HOURS_PER_MONTH))


# ---------------------------------------------------------------- all services together


def _sum(services: Sequence[Service], role: Role) -> Bill | None:
    """The bills of all services in one role. The ends of an interval add up to more than one of 90 %: on the safe side.

    A million tokens of all together is given only where all count the same.
    """
    bills = [next((way.bill for way in one.ways if role in way.roles), None) for one in services]
    known = [one for one in bills if one is not None]
    if len(known) < len(bills):
        return None
    low, high = _added([one.gpus.low for one in known]), _added([one.gpus.high for one in known])
    count = Count(
        value=sum(one.gpus.value for one in known),
        low=None if low is None else round(low),
        high=None if high is None else round(high),
    )
    months = [one.cost_per_month for one in known if one.cost_per_month is not None]
    month = None
    if len(months) == len(known):
        month = Value(
            value=math.fsum(one.value for one in months),
            low=_added([one.low for one in months]),
            high=_added([one.high for one in months]),
        )
    alike = len({one.unit for one in services}) == 1
    tokens_per_s = math.fsum(one.tokens_per_s for one in services)
    return Bill(gpus=count, cost_per_month=month, cost_per_million=_per_million(month, tokens_per_s) if alike else None)


def _added(ends: Sequence[float | None]) -> float | None:
    known = [one for one in ends if one is not None]
    return sum(known) if len(known) == len(ends) else None


def _notes(asked: Sequence[Asked], services: Sequence[Service]) -> Iterator[str]:
    """What a reader of the figures has to know."""
    yield (
        "GPUs are whole, one model each. They hold for hosts like those measured on; spare GPUs for failures are not "
        "in them."
    )
    if any(one.demand.text.rpartition("/")[2] in ("h", "hour", "day") for one in asked):
        yield (
            "A demand per hour or day is taken as even over it. For a peak give the rate that it has, "
            "or more --headroom."
        )
    if any(one.report.workload.kind == "decode" for one in asked):
        yield "Reports of decode hold no prefill: real requests need more GPUs."
    if any(way.energy_wh_per_million is not None for one in services for way in one.ways):
        yield "Energy is the GPU's alone, measured at the load in flight; a GPU that is loaded less was not measured."
    loads = [(one.report.model.name, one.report.workload) for one in asked]
    if any(loads[index] in loads[:index] for index in range(len(loads))):
        yield "Two reports are of one model under one load; in the total both are counted, as two services."
