"""Synthetic trials that look like real ones: everything in them agrees with everything else.

`trial()` is a trial that may count. A test takes one and breaks one thing with `changed`. Same arguments, same trial.
"""

import itertools
import math
import random

import msgspec

from advisor.core.histogram import add, empty
from advisor.core.records import (
    CpuUse,
    EngineSettings,
    GpuSamples,
    MpsEvidence,
    NumericsResult,
    Protocol,
    RawEngine,
    RawLoad,
    RawNumerics,
    RawTrial,
    ServerCounters,
    Stage,
    Teardown,
    TrialSpec,
    Workload,
)
from advisor.core.workload import output_tokens, prompt_range, prompt_tokens, shares, turnover_tokens

GPU_UUID = "GPU-00000000-0000-0000-0000-000000000001"
GIB = 2**30
READY_S = 60.0  # engines are up and the load starts
FIRST_REQUEST_TOKENS = 6.0  # what the readiness probe generated before the load
_MARGIN = 1.05  # the window and the warm-up hold a little more than the protocol's turnovers

WORKLOAD = Workload(kind="serve", isl=1024, osl=128, concurrency=256)
PROTOCOL = Protocol(measure_turnovers=3.0, measure_min_s=12.0)


def settings(**changes):
    """What `vllm serve` resolves for a small model."""
    default = EngineSettings(
        max_num_batched_tokens=8192,
        max_num_seqs=1024,
        max_cudagraph_capture_size=512,
        enable_prefix_caching=False,
        async_scheduling=True,
        kv_cache_memory_bytes=24 * GIB,
        max_model_len=2048,
        gpu_memory_utilization=0.05,
        dtype="bfloat16",
        quantization=None,
        kv_cache_dtype="auto",
        load_format="auto",
    )
    return msgspec.structs.replace(default, **changes)


def spec(engines=2, mps=True, *, workload=WORKLOAD, protocol=PROTOCOL, cores_each=3, **changes):
    """A load trial's question: `cores_each` cores for every engine, two after them for the load generators."""
    used = engines * cores_each
    default = TrialSpec(
        kind="load",
        engines=engines,
        mps=mps,
        settings=settings(),
        workload=workload,
        protocol=protocol,
        engine_cores=[list(range(i * cores_each, (i + 1) * cores_each)) for i in range(engines)],
        load_cores=[used, used + 1],
    )
    return msgspec.structs.replace(default, **changes)


def api_server_pid(engine):
    return 1000 + 10 * engine


def engine_core_pid(engine):
    return 1001 + 10 * engine


def load_pid(worker):
    return 2000 + worker


MPS_SERVER_PID = 900


def trial(
    engines=2,
    mps=True,
    rate=20000.0,
    noise=0.01,
    seed=1,
    *,
    workload=WORKLOAD,
    protocol=PROTOCOL,
    trial_spec=None,
    sm_active_pct=60.0,
    graphics_active_pct=70.0,
    power_w=400.0,
    load_core_share=0.3,
    engine_core_share=0.8,
    logprobs=None,
    **changes,
):
    """A complete load trial of `rate` output tokens/s over all engines.

    `noise` is the relative standard deviation of the rate's one-second means. The window is as long as the protocol
    asks for (and at most its `window_max_s`: a rate too low for its turnovers gives a trial that may not count).
    `trial_spec` (see `spec`) overrides `engines`, `mps`, `workload` and `protocol`. `changes` replace fields of the
    RawTrial itself, last of all.
    """
    asked = trial_spec or spec(engines, mps, workload=workload, protocol=protocol)
    engines, mps, workload, protocol = asked.engines, asked.mps, asked.workload, asked.protocol
    chance = random.Random(seed)
    turnover_s = turnover_tokens(workload) / rate
    warmup_s = max(protocol.warmup_min_s, protocol.warmup_turnovers * turnover_s * _MARGIN)
    window_s = max(protocol.measure_min_s, protocol.measure_turnovers * turnover_s * _MARGIN)
    if workload.kind == "decode":
        wave_s = output_tokens(workload) * workload.concurrency / rate
        warmup_s, window_s = min(warmup_s, 0.3 * wave_s), min(window_s, 0.5 * wave_s)
    window = (READY_S + warmup_s, READY_S + warmup_s + min(window_s, protocol.window_max_s))
    stop = window[1] + (0.1 * wave_s if workload.kind == "decode" else 1.0)

    seconds = [1.0 + noise * chance.gauss(0, 1) for _ in range(math.ceil(stop - READY_S) + 1)]
    loads = [
        _load(i, asked, share, rate * share / workload.concurrency, seconds, window, stop)
        for i, share in enumerate(shares(workload.concurrency, engines))
    ]
    cores = [engine_core_pid(i) for i in range(engines)]
    servers = [MPS_SERVER_PID] if mps else []
    clients = cores if mps else []
    raw = RawTrial(
        schema_version=1,
        spec=asked,
        created="2026-01-01T00:00:00Z",
        ended="completed",
        detail="",
        gpu_uuid=GPU_UUID,
        window=window,
        engines=[_engine(load, asked, window, logprobs) for load in loads],
        loads=loads,
        cpu=_cpu(asked, window[1] - window[0], load_core_share, engine_core_share),
        steal_s=0.0,
        gpu=_gpu(chance, protocol, window, stop, engines, sm_active_pct, graphics_active_pct, power_w),
        mps=MpsEvidence(
            daemon=mps,
            servers_start=servers,
            servers_end=servers,
            clients_start=clients,
            clients_end=list(reversed(clients)),
        ),
        foreign_pids=[],
        teardown=Teardown(
            seconds=6.0,
            steps=["stop engines 0.0 s", "quit daemon 5.0 s"] if mps else ["stop engines 0.0 s"],
            left_pids=[],
            daemon_left=False,
            memory_before_bytes=0,
            memory_after_bytes=0,
        ),
        numerics=None,
        timeline=[
            Stage(name="start", start_s=0.0, end_s=READY_S),
            Stage(name="warmup", start_s=READY_S, end_s=window[0]),
            Stage(name="measure", start_s=window[0], end_s=window[1]),
            Stage(name="drain", start_s=window[1], end_s=stop),
            Stage(name="teardown", start_s=stop, end_s=stop + 6.0),
        ],
    )
    return msgspec.structs.replace(raw, **changes)


def numerics_trial(percentages=(25, 50), *, errors=None, sms=132, batch_sizes=(1, 512), **changes):
    """A complete numerics trial. `errors` gives a percentage's worst error (default 0.0017, as without one)."""
    shape = {"qkv_proj": (1152, 896), "o_proj": (896, 896), "down_proj": (896, 4864), "lm_head": (151936, 896)}
    results = [
        NumericsResult(
            percentage=percentage,
            sms=max(2, sms * percentage // 100 // 2 * 2),
            product=product,
            rows=rows,
            columns=columns,
            inner=inner,
            worst_error=(errors or {}).get(percentage, 0.0017),
            unstable=False,
        )
        for percentage in percentages
        for product, (columns, inner) in shape.items()
        for rows in batch_sizes
    ]
    raw = RawTrial(
        schema_version=1,
        spec=TrialSpec(
            kind="numerics", mps=True, percentages=list(percentages), batch_sizes=list(batch_sizes), settings=settings()
        ),
        created="2026-01-01T00:00:00Z",
        ended="completed",
        detail="",
        gpu_uuid=GPU_UUID,
        window=None,
        engines=[],
        loads=[],
        cpu=[],
        steal_s=None,
        gpu=None,
        mps=None,
        foreign_pids=[],
        teardown=None,
        numerics=RawNumerics(results=results, failed={}, seconds=20.0),
        timeline=[Stage(name="numerics", start_s=0.0, end_s=20.0)],
    )
    return msgspec.structs.replace(raw, **changes)


def failed(ended="oom", detail="engine 1: CUDA out of memory", engines=2, mps=True, **changes):
    """A trial that never reached its window: the engines did not come up."""
    whole = trial(engines, mps, **changes)
    return msgspec.structs.replace(
        whole, ended=ended, detail=detail, window=None, loads=[], cpu=[], steal_s=None, gpu=None, mps=None
    )


def changed(record, path, value):
    """A copy of `record` with the field at `path` ("engines.0.kv_cache_tokens") set to `value`.

    A callable `value` is given the old one. Steps name a record's field, a list's index or a dictionary's key.
    """
    head, _, rest = path.partition(".")
    is_list = isinstance(record, list | tuple)
    key = int(head) if is_list or (isinstance(record, dict) and head.isdigit()) else head
    old = record[key] if is_list or isinstance(record, dict) else getattr(record, key)
    new = changed(old, rest, value) if rest else value(old) if callable(value) else value
    if is_list:
        return type(record)([*record[:key], new, *record[key + 1 :]])
    if isinstance(record, dict):
        return {**record, key: new}
    return msgspec.structs.replace(record, **{key: new})


def reshaped(raw, tokens_in):
    """The same trial with other tokens in its bins, and server counters that agree.

    `tokens_in(load, low_s, high_s, tokens)` says how many arrive at a load in a bin that held `tokens`.
    """
    loads = []
    for load in raw.loads:
        edges = [load.bins_start_s + i * load.bin_s for i in range(len(load.tokens) + 1)]
        tokens = [
            float(tokens_in(load, *edge, n)) for edge, n in zip(itertools.pairwise(edges), load.tokens, strict=True)
        ]
        output = round(sum(tokens))
        loads.append(msgspec.structs.replace(load, tokens=tokens, chunks=output, output_tokens=output))
    parts = shares(raw.spec.workload.concurrency, raw.spec.engines)
    engines = [
        msgspec.structs.replace(
            engine,
            counters_start=_counters(load, raw.spec, parts[load.engine], raw.window[0]),
            counters_end=_counters(load, raw.spec, parts[load.engine], raw.window[1]),
        )
        for engine, load in zip(raw.engines, loads, strict=True)
    ]
    return msgspec.structs.replace(raw, loads=loads, engines=engines)


SWING_S = 4.1  # not a whole number of half seconds, so that no edge of a swing stays on one of a bin


def swinging(phase_s):
    """One engine that decodes in one half of each turnover, twice as fast, and only prefills in the other.

    `phase_s` is how far into a swing the load starts, in seconds. Over whole turnovers the rate is steady.
    """
    rate = turnover_tokens(WORKLOAD) / SWING_S
    whole = trial(1, mps=False, rate=rate, noise=0.0, protocol=Protocol())

    def decoded_s(until_s):
        swings, within_s = divmod(until_s - READY_S + phase_s, SWING_S)
        return swings * SWING_S / 2 + min(within_s, SWING_S / 2)

    return reshaped(whole, lambda _, low_s, high_s, __: 2 * rate * max(0.0, decoded_s(high_s) - decoded_s(low_s)))


def shifted(raw, by_s):
    """The same trial, with its clock `by_s` seconds ahead."""

    def later(values):
        return [value + by_s for value in values]

    def counted(counters):
        return counters and msgspec.structs.replace(counters, at_s=counters.at_s + by_s)

    return msgspec.structs.replace(
        raw,
        window=raw.window and tuple(later(raw.window)),
        loads=[msgspec.structs.replace(x, bins_start_s=x.bins_start_s + by_s) for x in raw.loads],
        engines=[
            msgspec.structs.replace(
                x,
                ready_s=x.ready_s and x.ready_s + by_s,
                counters_start=counted(x.counters_start),
                counters_end=counted(x.counters_end),
            )
            for x in raw.engines
        ],
        gpu=raw.gpu and msgspec.structs.replace(raw.gpu, at_s=later(raw.gpu.at_s), gpm_at_s=later(raw.gpu.gpm_at_s)),
        timeline=[msgspec.structs.replace(x, start_s=x.start_s + by_s, end_s=x.end_s + by_s) for x in raw.timeline],
    )


# ---------------------------------------------------------------- the parts


def _steps(total):
    """Running totals as whole events per bin."""
    return [math.floor(after) - math.floor(before) for before, after in zip([0.0, *total], total, strict=False)]


def _spread(histogram, mean_s, events):
    """`events` durations around `mean_s`, a fifth wide."""
    points = 41
    for i in range(points):
        n = events // points + (1 if i < events % points else 0)
        if n:
            add(histogram.counts, mean_s * math.exp(0.2 * (i - points // 2) / (points / 4)), n)
    return histogram


def _load(engine, asked, share, rate, seconds, window, stop):
    workload, bin_s = asked.workload, asked.protocol.bin_s
    answer = output_tokens(workload)
    bins = math.ceil((stop - READY_S) / bin_s)
    so_far, total = [], 0.0
    for i in range(bins):
        total += rate * bin_s * seconds[int(i * bin_s)]
        so_far.append(total)
    tokens = _steps(so_far)
    if workload.kind == "decode":
        first = [share] + [0] * (bins - 1)
        completions = [0] * bins
    else:
        # Starts are staggered, so from the first moment on requests end at the steady pace.
        completions = _steps([x / answer for x in so_far])
        first = completions.copy()
        first[0] += share
    low, high = (round((edge - READY_S) / bin_s) for edge in window)
    ended = sum(completions[low:high])
    in_window = sum(tokens[low:high])
    e2e_s = share * answer / rate
    ttft_s = e2e_s if answer == 1 else 0.1 * e2e_s
    itl_s = (e2e_s - ttft_s) / (answer - 1) if answer > 1 else None
    output = sum(tokens)
    shortest, longest = prompt_range(workload)
    return RawLoad(
        engine=engine,
        bins_start_s=READY_S,
        bin_s=bin_s,
        tokens=[float(x) for x in tokens],
        first_tokens=first,
        completions=completions,
        sent=sum(first),
        completed=sum(completions),
        failed=0,
        errors=[],
        chunks=output,
        output_tokens=output,
        prompt_tokens_min=shortest,
        prompt_tokens_max=longest,
        ttft=_spread(empty(), ttft_s, ended),
        itl=_spread(empty(), itl_s, in_window - ended) if itl_s else empty(),
        e2e=_spread(empty(), e2e_s, ended),
    )


def _counters(load, asked, share, at_s):
    until = round((at_s - load.bins_start_s) / load.bin_s)
    tokens = sum(load.tokens[:until])
    prompts = sum(load.first_tokens[:until]) * prompt_tokens(asked.workload)
    return ServerCounters(
        at_s=load.bins_start_s + until * load.bin_s,
        generation_tokens=FIRST_REQUEST_TOKENS + tokens,
        prompt_tokens=float(prompts),
        prefix_cache_hits=0.0,
        preemptions=0.0,
        engine_steps=float(math.ceil(tokens / share)),
        running=float(share),
        waiting=0.0,
    )


def _engine(load, asked, window, logprobs):
    engine = load.engine
    share = shares(asked.workload.concurrency, asked.engines)[engine]
    told = asked.settings
    kv_tokens = told.kv_cache_memory_bytes // 12288 // 16 * 16
    names = ("max_num_batched_tokens", "max_num_seqs", "max_cudagraph_capture_size", "enable_prefix_caching")
    return RawEngine(
        engine=engine,
        port=8100 + engine,
        api_server_pid=api_server_pid(engine),
        engine_core_pid=engine_core_pid(engine),
        ready_s=READY_S - 5.0 + 0.5 * engine,
        kv_cache_tokens=kv_tokens,
        num_gpu_blocks=kv_tokens // 16,
        block_size=16,
        resolved={name: str(getattr(told, name)) for name in (*names, "max_model_len", "async_scheduling")},
        counters_start=_counters(load, asked, share, window[0]),
        counters_end=_counters(load, asked, share, window[1]),
        prompt_logprobs=[[-11.9, -12.1, -11.8], [-12.0, -11.7, -12.2]] if logprobs is None else logprobs,
        exit_code=0,
        died_s=None,
        log_tail=[f"(EngineCore pid={engine_core_pid(engine)}) INFO GPU KV cache size: {kv_tokens:,} tokens"],
    )


def _cpu(asked, window_s, load_share, core_share):
    uses = [CpuUse(role="advisor", engine=None, pid=800, cpu_s=0.02 * window_s, main_thread_s=0.02 * window_s)]
    if asked.mps:
        uses.append(CpuUse(role="mps_server", engine=None, pid=MPS_SERVER_PID, cpu_s=0.0, main_thread_s=0.0))
    for i in range(asked.engines):
        uses += [
            CpuUse(
                role="api_server",
                engine=i,
                pid=api_server_pid(i),
                cpu_s=0.6 * window_s,
                main_thread_s=0.55 * window_s,
            ),
            CpuUse(
                role="engine_core",
                engine=i,
                pid=engine_core_pid(i),
                cpu_s=1.2 * core_share * window_s,
                main_thread_s=core_share * window_s,
            ),
        ]
    # Every load generator sends to every engine.
    return uses + [
        CpuUse(
            role="load",
            engine=None,
            pid=load_pid(worker),
            cpu_s=load_share * window_s,
            main_thread_s=load_share * window_s,
        )
        for worker in range(len(asked.load_cores))
    ]


def _gpu(chance, protocol, window, stop, engines, sm_pct, graphics_pct, power_w):
    at = [i * protocol.nvml_interval_s for i in range(math.ceil((stop + 6.0) / protocol.nvml_interval_s))]
    rows = [READY_S + (i + 1) * protocol.gpm_interval_s for i in range(int((stop - READY_S) / protocol.gpm_interval_s))]
    loaded = [READY_S <= t <= stop for t in at]
    power = [power_w + chance.uniform(-2, 2) if busy else 76.0 for busy in loaded]

    def near(pct):
        return [min(100.0, max(0.0, pct + chance.uniform(-1, 1))) for _ in rows]

    return GpuSamples(
        at_s=at,
        power_w=power,
        sm_clock_mhz=[1980 if busy else 345 for busy in loaded],
        memory_used_bytes=[engines * 26 * GIB if busy else 0 for busy in loaded],
        throttle_reasons=[0x0 if busy else 0x1 for busy in loaded],
        gpm_at_s=rows,
        gpm_interval_s=[protocol.gpm_interval_s for _ in rows],
        graphics_active_pct=near(graphics_pct),
        sm_active_pct=near(sm_pct),
        sm_occupancy_pct=near(sm_pct / 4),
        tensor_active_pct=near(sm_pct / 6),
        dram_active_pct=near(sm_pct / 2),
        energy_start_j=1000.0,
        energy_end_j=1000.0 + power_w * (window[1] - window[0]),
    )
