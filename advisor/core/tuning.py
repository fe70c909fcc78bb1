"""What one engine can still be given before a second one is added. Pure.

Each rival is one change of settings. Those of a step exclude each other; `search` tries them in turn and keeps the
fastest if it is worth it, then goes on from there. Sources: vLLM 0.26, `entrypoints/cli/serve.py`,
`engine/arg_utils.py`, `config/vllm.py`.

`--performance-mode throughput` is no rival of its own: in 0.26 it doubles the token budget and `--max-num-seqs` where
they are not given, and nothing else; the doubled budget is tried here.
"""

from __future__ import annotations

from msgspec import structs

from advisor.core.records import EngineSettings, Record, Workload

# With the GPU idle for less than this, nothing that only spares the CPU can help.
GPU_BUSY_IDLE_PCT = 10.0
STREAM_INTERVAL = 8
API_SERVERS = 2


class Rival(Record, frozen=True):
    """One change of an engine's settings: in words, and as the settings after it."""

    words: str
    settings: EngineSettings


class Step(Record, frozen=True):
    """Rivals that exclude each other. `skipped` says why none of them is worth a trial, else it is empty."""

    rivals: list[Rival]
    skipped: str = ""


def steps(base: EngineSettings, workload: Workload, gpu_idle_pct: float | None, number: int) -> Step | None:
    """The `number`-th step (from 0) from the settings found so far; None after the last.

    `gpu_idle_pct` is what was seen of the engine with these settings.
    """
    makers = (_batch, _front_end, _streaming, _async, _budget)
    if number >= len(makers):
        return None
    rivals = makers[number](base, workload)
    spares_cpu = makers[number] in (_front_end, _streaming, _async)
    if rivals and spares_cpu and gpu_idle_pct is not None and gpu_idle_pct < GPU_BUSY_IDLE_PCT:
        return Step(
            rivals=rivals, skipped=f"the GPU is idle for {gpu_idle_pct:.0f} % only, so the CPU is not the limit"
        )
    return Step(rivals=rivals)


def for_batch(base: EngineSettings, concurrency: int) -> EngineSettings:
    """As many sequences and as large graphs as the load needs, where `base` stops short of it."""
    seqs = max(base.max_num_seqs, concurrency)
    budget = max(base.max_num_batched_tokens, seqs)
    capture = max(base.max_cudagraph_capture_size, min(-(-concurrency // 16) * 16, budget))
    return structs.replace(base, max_num_seqs=seqs, max_cudagraph_capture_size=capture, max_num_batched_tokens=budget)


def for_share(tuned: EngineSettings, default: EngineSettings, concurrency: int, engines: int) -> EngineSettings:
    """The tuned settings with sequences and graphs for one engine's share of the load, and a tenth more.

    They cost memory in every engine: what one engine needs for the whole load, several do not need each.
    """
    if engines == 1:
        return tuned
    least = structs.replace(
        tuned,
        max_num_seqs=min(tuned.max_num_seqs, default.max_num_seqs),
        max_cudagraph_capture_size=min(tuned.max_cudagraph_capture_size, default.max_cudagraph_capture_size),
    )
    return for_batch(least, -(-concurrency * 11 // (10 * engines)))


def _batch(base: EngineSettings, workload: Workload) -> list[Rival]:
    changed = for_batch(base, workload.concurrency)
    if changed == base:
        return []
    return [Rival(words=f"graphs up to batch {changed.max_cudagraph_capture_size}", settings=changed)]


def _front_end(base: EngineSettings, workload: Workload) -> list[Rival]:
    if base.rust_front_end or base.api_server_count > 1:
        return []
    return [
        Rival(words=f"{API_SERVERS} API servers", settings=structs.replace(base, api_server_count=API_SERVERS)),
        Rival(words="Rust front end", settings=structs.replace(base, rust_front_end=True)),
    ]


def _streaming(base: EngineSettings, workload: Workload) -> list[Rival]:
    if base.rust_front_end or base.stream_interval >= STREAM_INTERVAL or workload.kind == "prefill":
        return []  # the Rust front end of 0.26 knows no interval, and one token is no stream
    changed = structs.replace(base, stream_interval=STREAM_INTERVAL)
    return [Rival(words=f"{STREAM_INTERVAL} tokens per streamed piece", settings=changed)]


def _async(base: EngineSettings, workload: Workload) -> list[Rival]:
    if base.async_scheduling:
        return []  # the default of 0.26
    return [Rival(words="asynchronous scheduling", settings=structs.replace(base, async_scheduling=True))]


def _budget(base: EngineSettings, workload: Workload) -> list[Rival]:
    doubled = 2 * base.max_num_batched_tokens
    changed = structs.replace(base, max_num_batched_tokens=doubled)
    return [Rival(words=f"token budget {doubled}", settings=changed)]


def shared_budget(settings: EngineSettings, engines: int) -> EngineSettings | None:
    """The settings with one engine's token budget divided among `engines`; None where that is the same or too small.

    A budget has to hold one token of every sequence, and the largest captured graph.
    """
    each = settings.max_num_batched_tokens // engines // 16 * 16
    if engines < 2 or each < 256:
        return None
    return structs.replace(
        settings,
        max_num_batched_tokens=each,
        max_num_seqs=min(settings.max_num_seqs, each),
        max_cudagraph_capture_size=min(settings.max_cudagraph_capture_size, each),
    )


def _changes(settings: EngineSettings, default: EngineSettings) -> list[tuple[str, str]]:
    """What settings change of the default engine's: in words, and as a part of a file name."""
    no = "" if settings.async_scheduling else "no"
    told = {
        "rust_front_end": ("Rust front end", "rust"),
        "api_server_count": (f"{settings.api_server_count} API servers", f"api{settings.api_server_count}"),
        "stream_interval": (
            f"{settings.stream_interval} tokens per streamed piece",
            f"stream{settings.stream_interval}",
        ),
        "async_scheduling": (f"{no} asynchronous scheduling".strip(), f"{no}async"),
        "max_num_batched_tokens": (
            f"token budget {settings.max_num_batched_tokens}",
            f"budget{settings.max_num_batched_tokens}",
        ),
        "max_num_seqs": (f"{settings.max_num_seqs} sequences", f"seqs{settings.max_num_seqs}"),
        "max_cudagraph_capture_size": (
            f"graphs up to batch {settings.max_cudagraph_capture_size}",
            f"graphs{settings.max_cudagraph_capture_size}",
        ),
    }
    return [both for field, both in told.items() if getattr(settings, field) != getattr(default, field)]


def words(settings: EngineSettings, default: EngineSettings) -> list[str]:
    """How settings differ from the default engine's, in words; memory shares and the context apart."""
    return [said for said, _ in _changes(settings, default)]


def label(settings: EngineSettings, default: EngineSettings) -> str:
    """How settings differ from the default engine's, for a file name; empty where they do not."""
    return "-".join(part for _, part in _changes(settings, default))


def bare(settings: EngineSettings) -> EngineSettings:
    """The settings without what only the division of memory decides, to tell whether two are the same choice."""
    return structs.replace(settings, kv_cache_memory_bytes=0, max_model_len=0)
