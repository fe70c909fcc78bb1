"""What must a reader know about a trial that may count, and what is there to do about it?

What forbids using a trial is a fault (`validity`). Every code has one remedy, so that a report can gather the trials
in which the same thing was seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from advisor.core import contention
from advisor.core.measure import tokens_between
from advisor.core.records import Caution, CautionCode, Measurement, RawTrial, Workload
from advisor.core.validity import COMPARED_SETTINGS, pid_list
from advisor.core.workload import shares

LOAD_BUSY_PCT = 70.0
FAIR_SHARE_MIN = 0.7
STEAL_SHARE_MAX = 0.01
COALESCED_MAX = 1.05
MEMORY_LEFT_BYTES = 512 * 2**20
# NVML's clocks event reasons (nvml.h): the software power cap, and the four that mean overheating or a power fault.
POWER_CAP = 0x4
THROTTLES = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}

REMEDIES: dict[CautionCode, str] = {
    "coarse_stream": "If single tokens have to arrive as they are made, set an objective for ITL (--slo itl_p95=…).",
    "coalesced": "Give the API servers more cores, or try more of them (--api-server-count).",
    "cpu_contention": "Keep other work off these cores, then measure again.",
    "drift": "Keep other work off this machine and its host, then measure again.",
    "dummy_weights": "Download the model first to measure with its own weights and tokenizer.",
    "load_busy": "Give the load generators faster or more cores.",
    "memory_left": "Find the process that holds it (nvidia-smi) and end it before measuring again.",
    "mixed_starts": "Measure again with another --out where a gain between the two hangs on it.",
    "single_starts": "Use --protocol full before much hangs on a gain.",
    "not_measured": "Look at why, then measure again with another --out.",
    "power_capped": "Compare only with GPUs that have the same power limit.",
    "preemptions": "Lower --concurrency, or give each engine more KV cache.",
    "processes_left": "End what is left before measuring again: it takes memory and time from later trials.",
    "repeated": "Nothing, when it stays a rarity; else keep other work off this machine.",
    "settings_unverified": "Use a vLLM version that this mps-advisor knows, or check the engines' logs.",
    "start_failed": "Look at why its later start failed; what rests on one start is not advised.",
    "steal": "Measure on a machine whose cores are not shared.",
    "teardown_unproven": "Check with nvidia-smi that no process is left on the GPU.",
    "throttled": "Check cooling and power supply (nvidia-smi -q -d PERFORMANCE), then measure again.",
    "unequal_engines": "Look at its log and its cores; behind a router that deals in turn it would set the pace.",
    "uneven_cores": "Use cores of one kind and clock (taskset); on a virtual machine, cores that nobody shares.",
    "young_front_end": "Try your own requests on it before it serves them (VLLM_USE_RUST_FRONTEND=1).",
}


def caution(code: CautionCode, text: str) -> Caution:
    """A caution with its code's remedy."""
    return Caution(code=code, text=text, remedy=REMEDIES[code])


def cautions(raw: RawTrial, measurement: Measurement) -> list[Caution]:
    """What the reader of a trial that counts must know. Meant for trials without faults.

    Of all codes, those of `run_cautions` are about a whole run, and not given here; nor is that of `teardown_cautions`.
    """
    if raw.window is None or raw.spec.workload is None:
        return []
    return [
        *_clock_cautions(raw, raw.window),
        *_cpu_cautions(raw, measurement),
        *_core_cautions(raw),
        *_server_cautions(raw),
        *_unverified(raw),
        *_balance_cautions(raw, raw.spec.workload, raw.window),
        *_leftover_cautions(raw),
    ]


def _clock_cautions(raw: RawTrial, window: tuple[float, float]) -> Iterator[Caution]:
    if raw.gpu is None:
        return
    seen = [
        reasons
        for at, reasons in zip(raw.gpu.at_s, raw.gpu.throttle_reasons, strict=True)
        if reasons is not None and window[0] <= at <= window[1]
    ]
    found = [name for bit, name in THROTTLES.items() if any(reasons & bit for reasons in seen)]
    if found:
        yield caution(
            "throttled",
            f"The GPU lowered its clocks during the window ({', '.join(found)}); another run may be faster.",
        )
    capped = sum(1 for reasons in seen if reasons & POWER_CAP)
    if capped:
        yield caution(
            "power_capped",
            f"The GPU ran at its power limit in {capped / len(seen) * 100:.0f} % of the window's samples, "
            "as a busy GPU may.",
        )


def _cpu_cautions(raw: RawTrial, measurement: Measurement) -> Iterator[Caution]:
    if measurement.load_cpu_pct is not None and measurement.load_cpu_pct > LOAD_BUSY_PCT:
        yield caution(
            "load_busy",
            f"A load generator used {measurement.load_cpu_pct:.0f} % of its core and may have added latency.",
        )
    cores = {core for group in raw.spec.engine_cores for core in group} | set(raw.spec.load_cores)
    if raw.steal_s is not None and cores:
        stolen = raw.steal_s / (measurement.window_s * len(cores))
        if stolen > STEAL_SHARE_MAX:
            yield caution("steal", f"The hypervisor took {stolen * 100:.1f} % of the cores' time during the window.")


def _core_cautions(raw: RawTrial) -> Iterator[Caution]:
    if text := contention.contention(raw):
        yield caution("cpu_contention", text)
    if text := contention.unevenness(raw):
        yield caution("uneven_cores", text)


def _server_cautions(raw: RawTrial) -> Iterator[Caution]:
    preempted = sum(
        engine.counters_end.preemptions - engine.counters_start.preemptions
        for engine in raw.engines
        if engine.counters_start is not None and engine.counters_end is not None
    )
    if preempted > 0:
        yield caution(
            "preemptions",
            f"vLLM preempted {preempted:.0f} requests during the window: the KV cache was too small for the load.",
        )
    chunks, tokens = sum(load.chunks for load in raw.loads), sum(sum(load.tokens) for load in raw.loads)
    told = raw.spec.settings.stream_interval if raw.spec.settings else 1
    if chunks and tokens / chunks > COALESCED_MAX * told:
        yield caution(
            "coalesced",
            f"Streamed chunks held {tokens / chunks:.2f} tokens on average: an API server was behind its engine, "
            "so latencies between tokens are coarser than they look.",
        )


def _unverified(raw: RawTrial) -> Iterator[Caution]:
    missing = sorted({name for engine in raw.engines for name in COMPARED_SETTINGS if name not in engine.resolved})
    if missing:
        yield caution(
            "settings_unverified",
            f"vLLM's log does not tell what it resolved for {', '.join(missing)}; what was asked for is assumed.",
        )


def _balance_cautions(raw: RawTrial, workload: Workload, window: tuple[float, float]) -> Iterator[Caution]:
    # Every engine may take new requests as fast as it answers old ones, so fair is the same of the output for each. A
    # decode wave is dealt once: there it is as much as the requests that the engine was dealt.
    total = tokens_between(raw.loads, *window)
    engines = raw.spec.engines
    parts = shares(workload.concurrency, engines) if workload.kind == "decode" else [1] * engines
    for load in raw.loads:
        fair = total * parts[load.engine] / sum(parts)
        got = tokens_between([load], *window)
        if got < FAIR_SHARE_MIN * fair:
            yield caution(
                "unequal_engines",
                f"Engine {load.engine} gave {got / fair * 100:.0f} % of its fair share of the output tokens.",
            )


def teardown_cautions(raw: RawTrial, proven: Set[str]) -> Iterator[Caution]:
    """What is missing about a trial's end. `proven` are the starts of engines whose end is on record."""
    if raw.teardown is None and raw.started not in proven:
        yield caution("teardown_unproven", "Nothing was recorded about how the trial was cleared away.")


def _leftover_cautions(raw: RawTrial) -> Iterator[Caution]:
    done = raw.teardown
    if done is None:
        return
    if done.left_pids or done.daemon_left:
        left = [f"PID {pid_list(set(done.left_pids))}"] if done.left_pids else []
        left += ["the MPS daemon"] if done.daemon_left else []
        yield caution("processes_left", f"After the trial {' and '.join(left)} was still there.")
    before, after = done.memory_before_bytes, done.memory_after_bytes
    if before is not None and after is not None and after - before > MEMORY_LEFT_BYTES:
        yield caution(
            "memory_left", f"{(after - before) / 2**20:.0f} MiB of GPU memory were not given back after the trial."
        )
