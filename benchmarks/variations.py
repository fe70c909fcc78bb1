"""Measure named variations of a candidate, one after another, and record them like the trials of a profile.

    python benchmarks/variations.py --model Qwen/Qwen2.5-0.5B --out DIR [--gpu N] [--limit-s 600] NAME...

A NAME is a number of engines, `m` for MPS, and changes joined by +: `1`, `1+api2`, `2m+budget4096`.
A name given again is another start of the same.

    rust  apiN  streamN  budgetN  graphsN  noasync     engine settings
    coresN  unpinned  loadN                            cores an engine may use, all for all, load cores
    split                                              the engine core alone on its engine's first core
    warmupX  windowS                                   turnovers of warm-up, seconds of window
    loadedN                                            requests in flight
    ids                                                prompts as token ids, not as text
    spreadP                                            output lengths drawn from osl ± P %
    idleN                                              N more engines that get no request
    again                                              another window of the start before, not another start

Figures from it stand in docs/measurement.md. It takes the same care as `profile`; it only chooses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import asking
import msgspec

from advisor import flow
from advisor.core import specs
from advisor.core.estimate import half_width
from advisor.core.records import Manifest, TrialSpec
from advisor.core.starts import same_start
from advisor.core.tried import Tried, judge

SETTINGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "rust": lambda _: {"rust_front_end": True},
    "noasync": lambda _: {"async_scheduling": False},
    "api": lambda n: {"api_server_count": int(n)},
    "stream": lambda n: {"stream_interval": int(n)},
    "budget": lambda n: {"max_num_batched_tokens": int(n)},
    "graphs": lambda n: {"max_cudagraph_capture_size": int(n)},
}


def variation(manifest: Manifest, name: str, number: int, last: TrialSpec | None = None) -> TrialSpec:
    """The spec of a NAME, the `number`-th of all, after `last`. Raises ValueError for what cannot be done."""
    first, *words = name.split("+")
    told, base = [_split(word) for word in words], manifest.settings
    for word, amount in told:
        if word in SETTINGS:
            base = msgspec.structs.replace(base, **SETTINGS[word](amount))
    engines, idle = int(first.rstrip("m")), sum(int(amount) for word, amount in told if word == "idle")
    spec = specs.load_spec(manifest, engines + idle, mps=first.endswith("m"), base=base)
    spec = msgspec.structs.replace(spec, engines=engines, idle_engines=idle)
    assert spec.workload is not None and spec.protocol is not None
    workload, protocol = spec.workload, spec.protocol
    changes: dict[str, Any] = {}
    for word, amount in told:
        match word:
            case "cores":
                changes["engine_cores"] = [cores[: int(amount)] for cores in spec.engine_cores]
            case "unpinned":
                everything = sorted({core for cores in spec.engine_cores for core in cores} | set(spec.load_cores))
                changes["engine_cores"] = [everything] * spec.engines
            case "split":
                changes["split_cores"] = True
            case "load":
                # More load cores than usual are taken from the engines, from the last one's end.
                every = sorted({core for cores in spec.engine_cores for core in cores} | set(spec.load_cores))
                wanted = int(amount)
                usual = len(spec.load_cores)
                changes["load_cores"] = every[-wanted:] if wanted > usual else spec.load_cores[:wanted]
                free = set(every) - set(changes["load_cores"])
                changes["engine_cores"] = [sorted(free & set(cores)) for cores in spec.engine_cores]
                if not all(changes["engine_cores"]):
                    raise ValueError(f"“{name}” leaves an engine without a core")
            case "warmup":
                protocol = msgspec.structs.replace(protocol, warmup_turnovers=float(amount))
            case "window":
                protocol = msgspec.structs.replace(protocol, measure_min_s=float(amount))
            case "loaded":
                workload = msgspec.structs.replace(workload, concurrency=int(amount))
            case "ids":
                workload = msgspec.structs.replace(workload, prompts="token_ids")
            case "spread":
                workload = msgspec.structs.replace(workload, osl_spread=round(workload.osl * float(amount) / 100))
            case "again":
                if last is None:
                    raise ValueError(f"“{name}” is the first: there is no start before it to be measured again")
                # A prompt drawn once more would be found in the prefix cache.
                workload, number = msgspec.structs.replace(workload, seed=workload.seed + 1000 + number), last.repeat
            case _ if word not in SETTINGS and word != "idle":
                raise ValueError(f"“{word}{amount}” in “{name}” is no variation; see --help")
    told_spec = msgspec.structs.replace(
        spec, workload=workload, protocol=protocol, label=name.replace("+", "-"), repeat=number, **changes
    )
    if last is not None and number == last.repeat and not same_start(told_spec, last):
        raise ValueError(f"“{name}” asks for other engines than the start before it, so it cannot be measured again")
    return told_spec


def _split(word: str) -> tuple[str, str]:
    letters = word.rstrip("0123456789.")
    return letters, word[len(letters) :]


def told(name: str, one: Tried) -> str:
    seen = one.measurement
    if seen is None:
        return f"{name}: {one.outcome} ({one.why})"
    ttft = f", TTFT p50 {seen.ttft_ms.p50:.0f} ms" if seen.ttft_ms else ""
    itl = f", ITL p50 {seen.itl_ms.p50:.1f} ms" if seen.itl_ms else ""
    shares = {
        "GPU idle": seen.gpu_idle_pct,
        "engine core": seen.engine_core_cpu_pct,
        "API server": seen.api_server_cpu_pct,
        "load generator": seen.load_cpu_pct,
    }
    busy = "".join(f", {what} {share:.0f} %" for what, share in shares.items() if share is not None)
    rate = seen.throughput_tok_per_s
    return f"{name}: {rate.value:,.0f} tokens/s ±{half_width(rate) * 100:.1f} %{ttft}{itl}{busy}"


def main() -> None:
    parser = asking.parser(__doc__)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--workload", default="serve")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start nothing after so many seconds")
    parser.add_argument("names", nargs="+", metavar="NAME")
    options = parser.parse_args()
    began = time.monotonic()

    def story(manifest: Manifest, runner: flow.Runner) -> None:
        last = None
        for number, name in enumerate(options.names):
            if time.monotonic() - began > options.limit_s:
                print(f"out of time before {name}", flush=True)
                break
            last = variation(manifest, name, number, last)
            print(told(name, judge(runner.run(last))), flush=True)

    asking.run(options, story, ctx=options.ctx, concurrency=options.concurrency, workload=options.workload)


if __name__ == "__main__":
    main()
