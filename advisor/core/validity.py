"""May a trial count, and if not, why?

A fault makes a trial worthless for a verdict: the numbers would be about something else than what was asked. What
leaves it standing is a caution (`cautions`). Evidence that should be there and is not is a fault: a
trial proves itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from advisor.core.damage import impossible
from advisor.core.measure import block_edges, cpu_pct, rates_between, tokens_between
from advisor.core.records import (
    EngineSettings,
    MpsEvidence,
    Protocol,
    RawEngine,
    RawLoad,
    RawTrial,
    Record,
    ServerCounters,
    Workload,
)
from advisor.core.workload import prompt_range, turnover_tokens

FAILED_SHARE_MAX = 0.001
PREFIX_HIT_SHARE_MAX = 0.005
TOKEN_MISMATCH_MAX = 0.05
LOAD_BOUND_PCT = 90.0
_SLACK_S = 1e-6  # times that differ by less are the same time: sums of bin widths are not exact
COMPARED_SETTINGS = (
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_cudagraph_capture_size",
    "enable_prefix_caching",
    "max_model_len",
    "async_scheduling",
)


class Fault(Record, frozen=True):
    """Why a trial may not count: a stable code, and one line for the reader."""

    code: str
    text: str


def judge(raw: RawTrial) -> list[Fault]:
    """Everything that forbids using the trial; empty when it may count.

    Codes: the trial's own ending (`oom` `crash` `timeout` `not_attached` `refused`) · `damaged` `no_window`
    `no_evidence` · `not_attached` `foreign_client` `no_daemon` `server_changed` `mps_present` `foreign_process` ·
    `missing_engine` `engine_died` `kv_unknown` `unequal_kv` `settings_differ` · `prompt_length` `failed_requests`
    `bins_short` `short_window` `short_warmup` `unsteady` `not_steady` `stalled` `prefix_hits` `tokens_disagree`
    `load_bound`.
    A trial that did not complete, or whose evidence is damaged, gets that one fault: nothing else could be trusted.
    """
    if raw.ended != "completed":
        return [Fault(code=raw.ended, text=raw.detail or f"the trial ended early ({raw.ended})")]
    damage = list(impossible(raw))
    if damage:
        return [Fault(code="damaged", text="damaged evidence: " + "; ".join(damage[:3]))]
    if raw.spec.kind == "numerics":
        return [] if raw.numerics is not None else [_no_evidence("numerics results")]
    if raw.spec.kind == "steps":
        if raw.window is None:
            return [Fault(code="no_window", text="the trial completed but ran no step")]
        return [*_mps_faults(raw), *_foreign_faults(raw), *_engine_faults(raw, raw.window)]
    workload, protocol = raw.spec.workload, raw.spec.protocol
    if workload is None or protocol is None or raw.spec.engines < 1:
        return [Fault(code="damaged", text="damaged evidence: a load trial needs engines, a workload and a protocol")]
    if raw.window is None:
        return [Fault(code="no_window", text="the trial completed but recorded no measuring window")]
    return [
        *_mps_faults(raw),
        *_foreign_faults(raw),
        *_engine_faults(raw, raw.window),
        *_load_faults(raw, workload, protocol, raw.window),
        *_counter_faults(raw, workload),
    ]


def _no_evidence(what: str) -> Fault:
    return Fault(code="no_evidence", text=f"{what} were not recorded, so the trial proves nothing")


# ---------------------------------------------------------------- MPS


def _mps_faults(raw: RawTrial) -> Iterator[Fault]:
    if raw.mps is None:
        yield _no_evidence("the MPS clients, or their absence,")
    elif raw.spec.mps:
        yield from _attachment_faults(raw, raw.mps)
    elif raw.mps.daemon or _pids(raw.mps):
        found = f"PIDs {pid_list(_pids(raw.mps))}" if _pids(raw.mps) else "a daemon"
        yield Fault(code="mps_present", text=f"the trial was to run without MPS, but MPS answered ({found})")


def _foreign_faults(raw: RawTrial) -> Iterator[Fault]:
    if raw.foreign_pids:
        yield Fault(
            code="foreign_process",
            text=f"PID {pid_list(set(raw.foreign_pids))} used the GPU during the window but is no part of the trial",
        )


def _pids(mps: MpsEvidence) -> set[int]:
    return {*mps.servers_start, *mps.servers_end, *mps.clients_start, *mps.clients_end}


def _attachment_faults(raw: RawTrial, mps: MpsEvidence) -> Iterator[Fault]:
    if not mps.daemon:
        yield Fault(code="no_daemon", text="the trial was to run under MPS, but no daemon answered")
    first, last = set(mps.servers_start), set(mps.servers_end)
    if len(first) != 1 or first != last:
        yield Fault(
            code="server_changed",
            text=f"expected one MPS server throughout; at the window's start {pid_list(first)}, "
            f"at its end {pid_list(last)}",
        )
    cores = {engine.engine_core_pid for engine in raw.engines if engine.engine_core_pid is not None}
    for when, clients in (("start", set(mps.clients_start)), ("end", set(mps.clients_end))):
        if cores - clients:
            yield Fault(
                code="not_attached",
                text=f"at the window's {when}, engine core PID {pid_list(cores - clients)} was not attached to MPS",
            )
        if clients - cores:
            yield Fault(
                code="foreign_client",
                text=f"at the window's {when}, PID {pid_list(clients - cores)} was attached to MPS "
                "but is no engine core",
            )


def pid_list(pids: set[int]) -> str:
    """PIDs for a reader, in order."""
    return ", ".join(str(pid) for pid in sorted(pids)) or "none"


# ---------------------------------------------------------------- engines


def _engine_faults(raw: RawTrial, window: tuple[float, float]) -> Iterator[Fault]:
    expected = raw.spec.engines + raw.spec.idle_engines
    if sorted(engine.engine for engine in raw.engines) != list(range(expected)):
        yield Fault(code="missing_engine", text=f"{expected} engines were asked for, {len(raw.engines)} recorded")
    pids = [engine.engine_core_pid for engine in raw.engines if engine.engine_core_pid is not None]
    for engine in raw.engines:
        if engine.engine_core_pid is None:
            yield Fault(code="missing_engine", text=f"engine {engine.engine}: no engine core process was found")
    if len(set(pids)) != len(pids):
        yield Fault(code="missing_engine", text=f"several engines share an engine core process ({pid_list(set(pids))})")
    teardown_s = min((stage.start_s for stage in raw.timeline if stage.name == "teardown"), default=window[1])
    for engine in raw.engines:
        # An engine that ends at teardown does as it is told; `died_s` dates the others.
        if engine.died_s is not None and engine.died_s < teardown_s:
            code = "" if engine.exit_code is None else f" with exit code {engine.exit_code}"
            yield Fault(code="engine_died", text=f"engine {engine.engine} died at {engine.died_s:.1f} s{code}")
    yield from _kv_faults(raw.engines)
    if raw.spec.settings is not None:
        for engine in raw.engines:
            yield from _settings_faults(engine, raw.spec.settings)


def _kv_faults(engines: Sequence[RawEngine]) -> Iterator[Fault]:
    sizes = {engine.engine: engine.kv_cache_tokens for engine in engines}
    for number, size in sizes.items():
        if size is None:
            yield Fault(code="kv_unknown", text=f"engine {number}: the size of its KV cache was not found")
    known = [size for size in sizes.values() if size is not None]
    if len(set(known)) > 1:
        told = ", ".join(f"engine {number}: {size}" for number, size in sizes.items() if size is not None)
        yield Fault(code="unequal_kv", text=f"the engines resolved to different KV cache sizes, in tokens ({told})")


def _settings_faults(engine: RawEngine, settings: EngineSettings) -> Iterator[Fault]:
    for name in COMPARED_SETTINGS:
        asked, got = str(getattr(settings, name)), engine.resolved.get(name)
        if got is not None and got.strip().lower() != asked.lower():
            yield Fault(
                code="settings_differ", text=f"engine {engine.engine}: asked for {name}={asked}, vLLM resolved {got}"
            )


# ---------------------------------------------------------------- load


def _load_faults(raw: RawTrial, workload: Workload, protocol: Protocol, window: tuple[float, float]) -> Iterator[Fault]:
    if sorted(load.engine for load in raw.loads) != list(range(raw.spec.engines)):
        yield _no_evidence("one load per engine")
        return
    yield from _request_faults(raw.loads, workload)
    busy = cpu_pct(raw, "load")
    if busy is not None and busy >= LOAD_BOUND_PCT:
        yield Fault(code="load_bound", text=f"a load generator used {busy:.0f} % of its core: it was the limit itself")
    uncovered = [load for load in raw.loads if not _covers(load, *window)]
    for load in uncovered:
        yield Fault(
            code="bins_short",
            text=f"load {load.engine}: its bins cover {load.bins_start_s:.1f} to {_bins_end_s(load):.1f} s, "
            f"the window is {window[0]:.1f} to {window[1]:.1f} s",
        )
    if uncovered:
        return
    edges = block_edges(raw)
    rates = rates_between(raw.loads, edges)
    yield from _length_faults(raw, workload, protocol, window, edges, rates)
    if min(rates) <= 0:
        yield Fault(code="stalled", text="no output token arrived during a whole block of the window")


def _request_faults(loads: Sequence[RawLoad], workload: Workload) -> Iterator[Fault]:
    sent, failed = sum(load.sent for load in loads), sum(load.failed for load in loads)
    if failed and (sent < 1000 or failed / sent > FAILED_SHARE_MAX):
        why = next((error for load in loads for error in load.errors), "no error text")
        yield Fault(code="failed_requests", text=f"{failed} of {sent} requests failed ({why})")
    low, high = prompt_range(workload)
    wanted = f"{low}" if low == high else f"{low} to {high}"
    for load in loads:
        least, most = load.prompt_tokens_min, load.prompt_tokens_max
        # A decode wave is cut off in mid-answer, before the server says how long its prompts were.
        if least is None and most is None and workload.kind == "decode" and load.completed == 0:
            continue
        if least is None or most is None or not low <= least <= most <= high:
            yield Fault(
                code="prompt_length",
                text=f"load {load.engine}: prompts should hold {wanted} tokens, the server counted {least} to {most}",
            )


def _bins_end_s(load: RawLoad) -> float:
    return load.bins_start_s + load.bin_s * len(load.tokens)


def _covers(load: RawLoad, low_s: float, high_s: float) -> bool:
    return load.bins_start_s <= low_s + _SLACK_S and _bins_end_s(load) >= high_s - _SLACK_S


def _length_faults(
    raw: RawTrial,
    workload: Workload,
    protocol: Protocol,
    window: tuple[float, float],
    edges: Sequence[float],
    rates: Sequence[float],
) -> Iterator[Fault]:
    start, end = window
    if workload.kind == "decode":
        yield from _decode_faults(raw.loads, workload, window)
        return
    turnover = turnover_tokens(workload)
    # Binned counts place a token to within one bin, so the last bin's worth is not counted against the trial.
    measured = tokens_between(raw.loads, start, end) / turnover
    slack = max(load.bin_s for load in raw.loads) * measured / (end - start)
    if measured + slack < protocol.measure_turnovers:
        yield Fault(
            code="short_window",
            text=f"the window holds {measured:.2f} turnovers of the requests in flight, "
            f"{protocol.measure_turnovers:g} are needed",
        )
    yield from _steadiness(raw, window, edges, rates, protocol.unsteady_log)
    first_s = min(load.bins_start_s for load in raw.loads)
    warm = tokens_between(raw.loads, first_s, start) / turnover
    if warm + slack < protocol.warmup_turnovers:
        yield Fault(
            code="short_warmup",
            text=f"the warm-up before the window holds {warm:.2f} turnovers, {protocol.warmup_turnovers:g} are needed",
        )


def _steadiness(
    raw: RawTrial, window: tuple[float, float], edges: Sequence[float], rates: Sequence[float], unsteady_log: float
) -> Iterator[Fault]:
    """A level shift: the blocks of the window's first half against those of its second, or all blocks against all of
    the window. Blocks leave out what is no whole turnover, so that only the latter shows a stall at either end.
    """
    half = len(rates) // 2
    first, second = math.fsum(rates[:half]) / half, math.fsum(rates[-half:]) / half
    inside = tokens_between(raw.loads, edges[0], edges[-1]) / (edges[-1] - edges[0])
    whole = tokens_between(raw.loads, *window) / (window[1] - window[0])
    if _shift(first, second) > unsteady_log:
        change = second / first - 1 if first > 0 else math.inf
        yield Fault(
            code="unsteady",
            text=f"throughput changed by {change:+.0%} from the first half of the window's blocks to the "
            "second: this was no steady state",
        )
    elif _shift(inside, whole) > unsteady_log:
        yield Fault(
            code="unsteady",
            text=f"throughput was {inside:.0f} tokens/s over whole turnovers, but {whole:.0f} over the whole window, "
            "its ends included: this was no steady state",
        )


def _shift(before: float, after: float) -> float:
    """How far apart two rates are, as a logarithm; a rate of zero is infinitely far from any."""
    return abs(math.log(after / before)) if min(before, after) > 0 else math.inf


def _decode_faults(loads: Sequence[RawLoad], workload: Workload, window: tuple[float, float]) -> Iterator[Fault]:
    """Steady decode: every request streams before the window starts, and none is finished before it ends."""
    start, end = window
    streaming = finished = 0
    for load in loads:
        for index, (began, done) in enumerate(zip(load.first_tokens, load.completions, strict=True)):
            left = load.bins_start_s + index * load.bin_s
            streaming += began if left + load.bin_s <= start + _SLACK_S else 0
            finished += done if left < end - _SLACK_S else 0
    if streaming != workload.concurrency:
        yield Fault(
            code="not_steady",
            text=f"{streaming} of {workload.concurrency} requests were streaming when the window started",
        )
    if finished:
        yield Fault(code="not_steady", text=f"{finished} requests were finished before the window ended")


# ---------------------------------------------------------------- the server's own counters


def _counter_faults(raw: RawTrial, workload: Workload) -> Iterator[Fault]:
    loads = {load.engine: load for load in raw.loads}
    for engine in raw.engines:
        before, after = engine.counters_start, engine.counters_end
        if before is None or after is None:
            yield _no_evidence(f"engine {engine.engine}'s own counters")
            continue
        prompts = after.prompt_tokens - before.prompt_tokens
        hits = after.prefix_cache_hits - before.prefix_cache_hits
        # In steady decode the KV connector that stands in for prefill reports its tokens as hits.
        if workload.kind != "decode" and hits > PREFIX_HIT_SHARE_MAX * prompts:
            share = f"{hits / prompts * 100:.1f} % of the" if prompts else "uncounted"
            yield Fault(
                code="prefix_hits",
                text=f"engine {engine.engine}: {share} prompt tokens came from the prefix cache",
            )
        if engine.engine in loads:
            yield from _token_faults(engine.engine, loads[engine.engine], before, after)


def _token_faults(number: int, load: RawLoad, before: ServerCounters, after: ServerCounters) -> Iterator[Fault]:
    """Client and server must count the same tokens. Both as rates, over what the bins cover of the counters' span."""
    low, high = max(before.at_s, load.bins_start_s), min(after.at_s, _bins_end_s(load))
    if low >= high:
        yield _no_evidence(f"engine {number}'s counters during the load")
        return
    server = (after.generation_tokens - before.generation_tokens) / (after.at_s - before.at_s)
    client = tokens_between([load], low, high) / (high - low)
    if abs(client - server) > TOKEN_MISMATCH_MAX * max(server, client):
        yield Fault(
            code="tokens_disagree",
            text=f"engine {number}: the client counted {client:.0f} output tokens/s, the server {server:.0f}",
        )
