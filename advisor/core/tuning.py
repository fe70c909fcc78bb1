"""What one engine can still be given before a second one is added. Pure.

Each rival is one change of settings; `search` tries them in turn, keeps what is worth it and goes on from there.
Sources: vLLM 0.26, `entrypoints/cli/serve.py`, `engine/arg_utils.py`, `config/vllm.py`.

`--performance-mode throughput` is no rival of its own: in 0.26 it doubles the token budget and `--max-num-seqs` where
they are not given, and nothing else; the doubled budget is tried here.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import structs

from advisor.core.records import EngineSettings, Record, Workload

# With the GPU idle for less than this, nothing that only spares the CPU can help.
GPU_BUSY_IDLE_PCT = 10.0
# With the GPU idle for more than this it waits for the CPU, and larger steps would not fill it: three times a doubled
# budget was tried on engines idle for 60 to 70 %, and brought +2, -12 and -20 % (docs/measurement.md).
GPU_WAITS_IDLE_PCT = 30.0
# An API server this far from what one process can do is not what throughput waits for. The first token does sooner: at
# 0.8 a second server brought 3B no throughput, but that token in 110 to 130 instead of 490 to 1,060 ms.
API_CALM_FULLNESS, API_CALM_FULLNESS_FOR_TTFT = 0.9, 0.6
STREAM_INTERVAL = 8
API_SERVERS = 2


class Seen(Record, frozen=True):
    """What was seen of the engine that a change starts from. None: not seen.

    `api_fullness` is that of the busiest API server; from 1 on it is the limit (see `limits`). `ttft_matters`: an
    objective is set for it.
    """

    gpu_idle_pct: float | None = None
    api_fullness: float | None = None
    ttft_matters: bool = False


class Rival(Record, frozen=True):
    """One change of an engine's settings: in words, and as the settings after it.

    `skipped` says why it is not worth a trial, else it is empty.
    """

    words: str
    settings: EngineSettings
    skipped: str = ""


def rival(number: int, base: EngineSettings, workload: Workload, seen: Seen) -> Rival | None:
    """The `number`-th of RIVALS (from 0), starting from the settings found so far; None where it changes nothing."""
    change, pointless = _RIVALS[number]
    found = change(base, workload)
    return None if found is None else structs.replace(found, skipped=pointless(seen))


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


def _batch(base: EngineSettings, workload: Workload) -> Rival | None:
    changed = for_batch(base, workload.concurrency)
    words = f"graphs up to batch {changed.max_cudagraph_capture_size}"
    return None if changed == base else Rival(words=words, settings=changed)


def _api_servers(base: EngineSettings, workload: Workload) -> Rival | None:
    if base.rust_front_end or base.api_server_count > 1:
        return None
    return Rival(words=f"{API_SERVERS} API servers", settings=structs.replace(base, api_server_count=API_SERVERS))


def _rust(base: EngineSettings, workload: Workload) -> Rival | None:
    if base.rust_front_end:
        return None
    return Rival(words="Rust front end", settings=structs.replace(base, rust_front_end=True, api_server_count=1))


def _streaming(base: EngineSettings, workload: Workload) -> Rival | None:
    if base.rust_front_end or base.stream_interval >= STREAM_INTERVAL or workload.kind == "prefill":
        return None  # the Rust front end of 0.26 knows no interval, and one token is no stream
    changed = structs.replace(base, stream_interval=STREAM_INTERVAL)
    return Rival(words=f"{STREAM_INTERVAL} tokens per streamed piece", settings=changed)


def _async(base: EngineSettings, workload: Workload) -> Rival | None:
    if base.async_scheduling:
        return None  # the default of 0.26
    return Rival(words="asynchronous scheduling", settings=structs.replace(base, async_scheduling=True))


def _budget(base: EngineSettings, workload: Workload) -> Rival | None:
    doubled = 2 * base.max_num_batched_tokens
    changed = structs.replace(base, max_num_batched_tokens=doubled)
    return Rival(words=f"token budget {doubled}", settings=changed)


def _worth_it(seen: Seen) -> str:
    return ""


def _cpu_is_not_the_limit(seen: Seen) -> str:
    if seen.gpu_idle_pct is None or seen.gpu_idle_pct >= GPU_BUSY_IDLE_PCT:
        return ""
    return f"the GPU is idle for {seen.gpu_idle_pct:.0f} % only, so the CPU is not the limit"


def _calmer_than(fullness: float, seen: Seen) -> str:
    if seen.api_fullness is not None and seen.api_fullness < fullness:
        return f"the API server is at {seen.api_fullness * 100:.0f} % of what it can do, so it is not the limit"
    return _cpu_is_not_the_limit(seen)


def _front_end_is_not_the_limit(seen: Seen) -> str:
    return _calmer_than(API_CALM_FULLNESS, seen)


def _second_server_is_pointless(seen: Seen) -> str:
    return _calmer_than(API_CALM_FULLNESS_FOR_TTFT if seen.ttft_matters else API_CALM_FULLNESS, seen)


def _gpu_waits(seen: Seen) -> str:
    if seen.gpu_idle_pct is None or seen.gpu_idle_pct <= GPU_WAITS_IDLE_PCT:
        return ""
    return f"the GPU is idle for {seen.gpu_idle_pct:.0f} %: it waits for the CPU, and larger steps would not fill it"


# Each change, and why it would be pointless after what was seen.
_RIVALS: tuple[tuple[Callable[[EngineSettings, Workload], Rival | None], Callable[[Seen], str]], ...] = (
    (_batch, _worth_it),
    (_api_servers, _second_server_is_pointless),
    (_rust, _front_end_is_not_the_limit),
    (_streaming, _front_end_is_not_the_limit),
    (_async, _cpu_is_not_the_limit),
    (_budget, _gpu_waits),
)
RIVALS = len(_RIVALS)


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


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number > 1 else "")


def _changes(settings: EngineSettings, default: EngineSettings) -> list[tuple[str, str]]:
    """What settings change of the default engine's: in words, and as a part of a file name."""
    rust, async_ = ("" if on else "no " for on in (settings.rust_front_end, settings.async_scheduling))
    told = {
        "rust_front_end": (f"{rust}Rust front end", f"{rust.strip()}rust"),
        "api_server_count": (_count(settings.api_server_count, "API server"), f"api{settings.api_server_count}"),
        "stream_interval": (
            f"{_count(settings.stream_interval, 'token')} per streamed piece",
            f"stream{settings.stream_interval}",
        ),
        "async_scheduling": (f"{async_}asynchronous scheduling", f"{async_.strip()}async"),
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
