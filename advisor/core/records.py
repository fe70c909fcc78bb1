"""Every type that crosses a stage. Plain frozen data; units in names; what is missing is None, never 0.

Three families, in the order in which data flows:

* facts and questions: `ModelFacts` `GpuFacts` `HostFacts` `Software` `Workload` `Question` `Protocol`
* what a Runner takes and gives: `TrialSpec` -> `RawTrial` (raw evidence, never an aggregate)
* what is concluded: `Measurement` `Candidate` `Recommendation` `Report`

Times inside a trial are seconds on one monotonic clock, from the start of its engines (see `RawTrial`).
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

SCHEMA_VERSION = 1

WorkloadKind = Literal["serve", "prefill", "decode"]
Prompts = Literal["text", "token_ids"]
TrialKind = Literal["load", "numerics", "steps"]
Part = Literal["attention", "mlp", "both"]
Source = Literal["measured", "predicted", "bound", "vendor"]
Outcome = Literal["ok", "infeasible", "oom", "crash", "timeout", "not_attached", "wrong_results", "invalid", "skipped"]
# Outcomes that say nothing about a candidate: it may work the next time. The others are answers.
ACCIDENTS: tuple[Outcome, ...] = ("crash", "timeout", "invalid", "not_attached")
Ended = Literal["completed", "oom", "crash", "timeout", "not_attached", "refused"]
CautionCode = Literal[
    "coalesced", "coarse_stream", "cpu_contention", "drift", "dummy_weights", "load_busy", "memory_left",
    "mixed_starts", "not_measured", "power_capped", "preemptions", "processes_left", "repeated", "settings_unverified",
    "single_starts", "start_failed", "steal", "teardown_unproven", "throttled", "uneven_cores", "unequal_engines",
    "young_front_end",
]  # fmt: skip
Status = Literal["recommend", "inconclusive", "infeasible", "no_slo"]


class Record(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every record: immutable, and a field that nobody declared is an error, not a silent loss."""


# ---------------------------------------------------------------- facts and questions


class ModelFacts(Record, frozen=True):
    """A dense decoder's shape. Sizes are element counts; `config` is the config.json it was read from."""

    name: str
    architecture: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    max_context: int
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    weights: Literal["real", "dummy"]
    config: dict[str, Any]


class GpuFacts(Record, frozen=True):
    """One GPU as NVML describes it. `gpm` says whether per-window SM activity can be read (Hopper and newer)."""

    index: int
    uuid: str
    name: str
    sms: int
    memory_total_bytes: int
    compute_capability: str
    driver: str
    cuda: str
    compute_mode: str
    mig: bool
    gpm: bool
    power_limit_w: float | None


class Ceilings(Record, frozen=True):
    """What a GPU can do at best: device memory, read and written together, and dense bf16 matrix products."""

    copy_bytes_per_s: float
    bf16_flops_per_s: float
    source: Source


class HostFacts(Record, frozen=True):
    """The processor side. `cores` holds one logical CPU per physical core that this process may use."""

    cpu: str
    cores: list[int]
    threads_per_core: int
    memory_bytes: int
    kernel: str
    numa_node: int | None


class Software(Record, frozen=True):
    advisor: str
    python: str
    vllm: str | None
    torch: str | None
    environment: dict[str, str]  # the VLLM_* settings that the engines were started with


class Workload(Record, frozen=True):
    """What is asked of the engines. `isl` and `osl` in tokens; `concurrency` is requests in flight in total.

    Output lengths of "serve" are drawn evenly from `osl` ± `osl_spread`: `osl` is their mean. With `isl_range` or
    `osl_range` (least and most, inclusive) every request draws its own prompt or output length evenly from it, and
    `isl` or `osl` is the rounded mean. "serve" uses both ranges, "prefill" only `isl_range`, "decode" none.
    `prompts` are sent as text, which the engines have to tokenise, or as token ids.
    """

    kind: WorkloadKind
    isl: int
    osl: int
    concurrency: int
    osl_spread: int = 0
    temperature: float = 0.0
    seed: int = 0
    isl_range: tuple[int, int] | None = None
    osl_range: tuple[int, int] | None = None
    prompts: Prompts = "text"


class Question(Record, frozen=True):
    """What the user asked, as far as it decides which trials are run and how they are judged."""

    workload: Workload
    max_engines: int
    thread_percentages: Literal["auto", "none"] | list[int]
    min_gain: float  # 0.10 means that MPS has to bring at least 1.10 times
    slo: dict[str, float] = {}  # "ttft_p95" and the like -> ms; empty: throughput alone decides
    concurrency_auto: bool = False  # the workload's concurrency is found by the run, not asked for


class Protocol(Record, frozen=True):
    """How a trial is run, and which trials a profile consists of. One turnover is `concurrency` requests' worth of
    output tokens.

    Those from `tune` on say what a profile does beyond one start of each candidate. Their defaults are those of the
    first recorded runs, which did none of it; `FULL` is what a profile does today.
    """

    warmup_turnovers: float = 2.0
    measure_turnovers: float = 6.0
    warmup_min_s: float = 4.0
    measure_min_s: float = 15.0
    window_max_s: float = 150.0
    bin_s: float = 0.1
    gpm_interval_s: float = 0.5
    nvml_interval_s: float = 0.2
    engine_start_timeout_s: float = 420.0
    stall_timeout_s: float = 45.0
    drain_timeout_s: float = 60.0
    teardown_timeout_s: float = 40.0
    unsteady_log: float = 0.15  # the halves of a window are no further apart than this, as a logarithm
    tune: bool = False  # look for the best single engine before a second one is added
    confirm: bool = False  # start the default engine again before a setting beats it
    gpu_alone: bool = False  # measure fixed steps on the GPU alone, of the tuned engine and of the best several
    starts: int = 1  # of the default engine, of the tuned one, of the best without MPS and of the best under MPS
    other_settings: bool = False  # compare tuned and default settings also at the number of engines that won
    runner_up: bool = False  # start also what single starts may hide to be better than the best several
    equal_budget: bool = False  # try the winner also with the single engine's token budget divided among its engines
    curve: list[float] = []  # shares of the concurrency at which the finalists are measured too
    curve_min_s: float = 8.0  # shortest window of such a point
    precision: float = 0.0  # a quoted window goes on until its interval is at most ± this share; 0: it does not
    precise_max_s: float = 60.0  # but no longer than this for that reason alone
    more_starts: int = 0  # at most, of what is known too roughly
    gain_precision: float | None = None  # what half of a quoted gain's interval may be; None: whatever decides
    first_precision: float = 0.0  # the same for first starts, which only choose
    first_min_s: float | None = None  # their shortest window; None: as `measure_min_s`
    first_max_s: float = 20.0
    quick: bool = False  # few starts, each for several numbers of engines, and none twice (see `quick`)


FULL = Protocol(
    tune=True,
    confirm=True,
    gpu_alone=True,
    starts=2,
    other_settings=True,
    runner_up=True,
    equal_budget=True,
    curve=[0.25, 0.5],
    # Where starts differ by more than a window's blocks say, another start tells more than a longer window.
    measure_turnovers=4.0,
    precision=0.02,
    precise_max_s=20.0,
    first_precision=0.03,
    first_min_s=8.0,
    first_max_s=15.0,
    more_starts=8,
    gain_precision=0.05,
    # Where one engine waits for cores that change their speed, halves of 30 s windows were up to 0.25 apart (4 of 38
    # were above 0.15): rough, but the blocks' interval says so.
    unsteady_log=0.30,
)
# What `--protocol fast` does; windows that share a start are shorter than those that each pay for one.
FAST = Protocol(
    quick=True,
    tune=True,
    curve=[0.25, 0.5],
    curve_min_s=6.0,
    warmup_min_s=3.0,
    measure_turnovers=4.0,
    measure_min_s=8.0,
    first_precision=0.02,
    first_min_s=8.0,
    first_max_s=12.0,
    unsteady_log=0.30,
)
# The share of the load that only latency objectives ask for: without them a finalist's curve has three points.
LIGHT_LOAD = 0.125


class EngineSettings(Record, frozen=True):
    """What every engine is told explicitly, so that nothing is resolved behind our back."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_cudagraph_capture_size: int
    enable_prefix_caching: bool
    async_scheduling: bool
    kv_cache_memory_bytes: int
    max_model_len: int
    gpu_memory_utilization: float
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    load_format: str
    api_server_count: int = 1
    stream_interval: int = 1  # tokens per streamed piece
    rust_front_end: bool = False


# ---------------------------------------------------------------- a trial: what is asked, what came back


class Step(Record, frozen=True):
    """One step of an engine: sequences that decode one token each, and sequences that read a piece of their prompt.

    `decode_context` counts the tokens that a decoding sequence attends to, its new one included; `prefill_context`
    those that were read before the piece of `prefill_tokens`.
    """

    decode: int = 0
    decode_context: int = 0
    prefill: int = 0
    prefill_tokens: int = 0
    prefill_context: int = 0

    @property
    def tokens(self) -> int:
        return self.decode + self.prefill * self.prefill_tokens


class TrialSpec(Record, frozen=True):
    """One trial. Two specs that are equal ask for the same evidence; that is how a replay finds it.

    kind "load": start `engines` engines, load them, record. `thread_percentage` None means unrestricted.
    kind "numerics": run the model's matrix products under each of `percentages` and record their errors.
    kind "steps": repeat each of `steps` on all engines at once, on the GPU alone, for `step_s`; then trace `traced`
    more repetitions of each on the first engine. Only such a trial may be of a model `without` a part.
    `repeat` numbers deliberate repetitions of the same trial (0 is the first).
    `engine_cores` are those of the engines in their order, idle ones last; one without any stays where it is.
    """

    kind: TrialKind
    engines: int = 0
    mps: bool = False
    thread_percentage: int | None = None
    settings: EngineSettings | None = None
    workload: Workload | None = None
    protocol: Protocol | None = None
    engine_cores: list[list[int]] = []
    load_cores: list[int] = []
    percentages: list[int] = []
    batch_sizes: list[int] = []
    idle_engines: int = 0  # further engines, after the others, that get no request
    split_cores: bool = False  # the engine core gets the first of its engine's cores, everything else the others
    repeat: int = 0
    label: str = ""  # what sets it apart in file names; no part of its identity
    steps: list[Step] = []
    step_s: float = 0.0
    traced: int = 0
    without: Part | None = None  # a part that every layer of the model passes by


class LogHistogram(Record, frozen=True):
    """Durations in logarithmic bins: count of bin i covers [floor_s * ratio**i, floor_s * ratio**(i+1))."""

    floor_s: float
    ratio: float
    counts: dict[int, int]


class RawLoad(Record, frozen=True):
    """What the load generators, or one of them, saw of one engine.

    Bins start at `bins_start_s` and are `bin_s` wide: `tokens` are output tokens by arrival, `first_tokens` and
    `completions` are requests per bin. A streamed chunk that carries several tokens (the server coalesced them) counts
    as that many; `chunks` counts events. The three histograms hold only what ended inside the window.
    """

    engine: int
    bins_start_s: float
    bin_s: float
    tokens: list[float]
    first_tokens: list[int]
    completions: list[int]
    sent: int
    completed: int
    failed: int
    errors: list[str]
    chunks: int
    output_tokens: int
    prompt_tokens_min: int | None
    prompt_tokens_max: int | None
    ttft: LogHistogram
    itl: LogHistogram
    e2e: LogHistogram


class CpuUse(Record, frozen=True):
    """CPU seconds that one process spent inside the window; `main_thread_s` is its busiest thread's share.

    An engine may have several rows "api_server": every process of it that is not the engine core.
    """

    role: Literal["api_server", "engine_core", "load", "advisor", "mps_server"]
    engine: int | None
    pid: int
    cpu_s: float
    main_thread_s: float | None
    waited_s: float | None = None  # longest time that one of its threads was ready to run and had no core


class Stranger(Record, frozen=True):
    """A process that is none of ours and used cores of ours: CPU seconds inside the window, and a core it ran on."""

    pid: int
    name: str
    cpu_s: float
    core: int


class CoreSpeed(Record, frozen=True):
    """How long a fixed piece of single-threaded work took on one core just before the window."""

    core: int
    seconds: float


class ServerCounters(Record, frozen=True):
    """vLLM's own counters, from its metrics endpoint, at one moment.

    `steps_by_tokens` counts engine steps by the tokens they computed: upper bound -> steps of at most so many,
    cumulative; empty where the front end has no such metric.
    """

    at_s: float
    generation_tokens: float
    prompt_tokens: float
    prefix_cache_hits: float
    preemptions: float
    engine_steps: float
    running: float
    waiting: float
    steps_by_tokens: dict[str, float] = {}


class RawEngine(Record, frozen=True):
    """One `vllm serve` process tree: what it resolved, how it ended. `exit_code` None means it never ended itself.

    `forked`: it was forked from a process that had vLLM imported, instead of started and importing it.
    """

    engine: int
    port: int
    api_server_pid: int | None
    engine_core_pid: int | None
    ready_s: float | None
    kv_cache_tokens: int | None
    num_gpu_blocks: int | None
    block_size: int | None
    resolved: dict[str, str]
    counters_start: ServerCounters | None
    counters_end: ServerCounters | None
    prompt_logprobs: list[list[float]]  # fixed prompts; one log-probability per prompt token after the first
    exit_code: int | None
    died_s: float | None
    log_tail: list[str]
    forked: bool = False


class RawStep(Record, frozen=True):
    """One of a trial's fixed steps on one engine: what was prepared there, and when how many were done.

    `graphed`: all of it ran as captured graphs; else `detail` says why it was launched kernel by kernel, and Python may
    have been the limit. `refused` says why the step could not be prepared, else it is empty. `marks` are pairs of a
    time and the steps that the GPU had finished by then.
    """

    step: int
    engine: int
    tokens: int = 0
    sequences: int = 0
    mode: str = ""
    graphed: bool = False
    detail: str = ""
    refused: str = ""
    marks: list[tuple[float, int]] = []


class RawKernel(Record, frozen=True, array_like=True):
    """One kernel of a trace: the index of its name, when it ran, in how many blocks (0: a copy or a fill)."""

    name: int
    start_s: float
    seconds: float
    blocks: int

    @property
    def end_s(self) -> float:
        return self.start_s + self.seconds


class RawTrace(Record, frozen=True):
    """The kernels of a few repetitions of one fixed step on one engine, each begun when the GPU was idle. `refused`
    says why there are none, else it is empty.
    """

    step: int
    engine: int
    names: list[str] = []
    kernels: list[RawKernel] = []
    refused: str = ""


class MpsEvidence(Record, frozen=True):
    """Who was attached to which daemon, read from the control program at the window's start and end."""

    daemon: bool
    servers_start: list[int]
    servers_end: list[int]
    clients_start: list[int]
    clients_end: list[int]


class GpuSamples(Record, frozen=True):
    """NVML over the trial. Lists run in parallel with `at_s`; GPM rows cover (at_s - interval, at_s]."""

    at_s: list[float]
    power_w: list[float | None]
    sm_clock_mhz: list[int | None]
    memory_used_bytes: list[int | None]
    throttle_reasons: list[int | None]
    gpm_at_s: list[float]
    gpm_interval_s: list[float]
    graphics_active_pct: list[float]
    sm_active_pct: list[float]
    sm_occupancy_pct: list[float]
    tensor_active_pct: list[float]
    dram_active_pct: list[float]
    energy_start_j: float | None
    energy_end_j: float | None


class Teardown(Record, frozen=True):
    """Proof that nothing was left. `steps` names what was done, in order, with its time."""

    seconds: float
    steps: list[str]
    left_pids: list[int]
    daemon_left: bool
    memory_before_bytes: int | None
    memory_after_bytes: int | None


class NumericsResult(Record, frozen=True):
    """One matrix product at one batch size under one percentage. `worst_error` is the worst tile's relative error.

    Relative error of a tile: Frobenius norm of (result - float64 reference) over that of the reference.
    """

    percentage: int
    sms: int
    product: str
    rows: int
    columns: int
    inner: int
    worst_error: float
    unstable: bool  # repeated graph launches on the same input differed


class RawNumerics(Record, frozen=True):
    results: list[NumericsResult]
    failed: dict[str, str]  # percentage -> why its check could not be done
    seconds: float


class Stage(Record, frozen=True):
    name: str
    start_s: float
    end_s: float


class RawTrial(Record, frozen=True):
    """Everything one trial left behind. `window` is (start, end) of the measured part, None if never reached.

    Several trials may be windows of one start of the engines: `started` names it (when it began), None where every
    trial had its own. All times count from that beginning, so a later window has later times, and no stage "start
    engines". How the start was cleared away stands in its last trial: the others have no `teardown`, no such stage,
    and no exit codes.
    """

    schema_version: int
    spec: TrialSpec
    created: str
    ended: Ended
    detail: str
    gpu_uuid: str
    window: tuple[float, float] | None
    engines: list[RawEngine]
    loads: list[RawLoad]
    cpu: list[CpuUse]
    steal_s: float | None
    gpu: GpuSamples | None
    mps: MpsEvidence | None
    foreign_pids: list[int]  # other processes seen on the GPU at the end of the window
    teardown: Teardown | None
    numerics: RawNumerics | None
    timeline: list[Stage]
    strangers: list[Stranger] = []
    core_speeds: list[CoreSpeed] = []
    started: str | None = None
    steps: list[RawStep] = []
    traces: list[RawTrace] = []


class Ablation(Record, frozen=True):
    """What `ablate` asks: these contexts, at each so many sequences that decode in all, one engine against `engines`.

    `batches` run in parallel with `contexts`. `loads` are the requests in flight at which asynchronous scheduling is
    turned off and on, under load; empty: it is not. Without `parts` that is all, and there are no batches.
    """

    contexts: list[int]
    batches: list[int]
    engines: int = 2
    loads: list[int] = []
    parts: bool = True


class Manifest(Record, frozen=True):
    """The head of a run folder: what was asked, of which model, on which machine. `ablation` is there in runs of
    `ablate` only, whose question then gives the longest context and the largest batch.
    """

    schema_version: int
    created: str
    question: Question
    protocol: Protocol
    model: ModelFacts
    gpu: GpuFacts
    host: HostFacts
    software: Software
    settings: EngineSettings  # of the default engine; with more engines only the memory shares change
    ceilings: Ceilings | None = None
    ablation: Ablation | None = None


# ---------------------------------------------------------------- conclusions


class Value(Record, frozen=True):
    """A number with its 90 % interval. `low` and `high` are None where no interval can be given."""

    value: float
    low: float | None = None
    high: float | None = None


class Percentiles(Record, frozen=True):
    p50: float
    p95: float
    p99: float


class Caution(Record, frozen=True):
    """Something the reader must know, with what to do about it."""

    code: CautionCode
    text: str
    remedy: str


class Measurement(Record, frozen=True):
    """What one load trial says, computed from its raw evidence alone.

    `blocks_tok_per_s` are the mean rates of consecutive blocks of the window, each of whole turnovers by count;
    `log_mean` and `log_se` are the mean and standard error of their logarithms, with `dof` degrees of freedom.
    """

    throughput_tok_per_s: Value
    requests_per_s: float
    blocks_tok_per_s: list[float]
    log_mean: float
    log_se: float
    dof: int
    turnovers: float
    window_s: float
    ttft_ms: Percentiles | None
    itl_ms: Percentiles | None
    e2e_ms: Percentiles | None
    sm_active_pct: float | None
    gpu_idle_pct: float | None
    tokens_per_joule: float | None
    power_w: float | None
    load_cpu_pct: float | None  # busiest load process, share of one core
    engine_core_cpu_pct: float | None  # busiest engine core's main thread, share of one core
    api_server_cpu_pct: float | None


class CurvePoint(Record, frozen=True):
    """A candidate at one load: requests in flight in total, and what came of them."""

    concurrency: int
    throughput_tok_per_s: Value
    ttft_ms: Percentiles | None
    itl_ms: Percentiles | None
    e2e_ms: Percentiles | None
    trial: str


class StepShares(Record, frozen=True):
    """Engine steps of a window by size: shares of those that can run as a captured graph, and of larger ones, and the
    mean of prompt and output tokens in a step.
    """

    graphed: float
    ungraphed: float
    mean_tokens: float


class WaterfallStep(Record, frozen=True):
    """What one change brought by itself: the rate after it over the rate before it. Factors multiply to the gain."""

    step: str
    change: str
    factor: Value
    trials: list[str]


class Candidate(Record, frozen=True):
    """One way to run, and what became of it."""

    engines: int
    mps: bool
    thread_percentages: list[int] | None
    sms_each: int | None
    settings: EngineSettings | None
    outcome: Outcome
    source: Source | None
    throughput_tok_per_s: Value | None = None
    requests_per_s: float | None = None
    ttft_ms: Percentiles | None = None
    itl_ms: Percentiles | None = None
    e2e_ms: Percentiles | None = None
    gain_vs_default: Value | None = None
    gain_vs_tuned: Value | None = None
    gain_vs_best_without_mps: Value | None = None
    sm_active_pct: float | None = None
    gpu_idle_pct: float | None = None
    cpu_stall_pct: float | None = None
    tokens_per_joule: float | None = None
    limited_by: str | None = None
    limit_evidence: str | None = None
    steps: StepShares | None = None
    starts: int | None = None
    curve: list[CurvePoint] = []
    worst_product_error: float | None = None
    worst_logprob_error: float | None = None
    why_not: str | None = None
    trial: str | None = None
    concurrency: int | None = None  # requests in flight at which its figures were measured


class Recommendation(Record, frozen=True):
    status: Status
    engines: int | None = None
    mps: bool | None = None
    thread_percentages: list[int] | None = None
    settings: EngineSettings | None = None
    concurrency: int | None = None
    gain_vs_default: Value | None = None
    gain_vs_tuned: Value | None = None
    gain_vs_best_without_mps: Value | None = None
    sentence: str = ""
    because: list[str] = []
    cost_of_mps: list[str] = []
    environment: dict[str, str] = {}
    commands: list[str] = []


class Figure(Record, frozen=True):
    """One number of the profile, with its unit, where it comes from, and its 90 % interval where it has one."""

    value: float
    unit: str
    source: Source
    low: float | None = None
    high: float | None = None


class KernelPart(Record, frozen=True):
    """One sort of kernel in a fixed step, all in %: its share of the time in which any ran; the time that the GPU's
    ceilings allow over the time that it took; and the multiprocessors that had a block, None for kernels that fetch
    their work themselves.
    """

    share: Figure
    of_roofline: Figure | None = None
    sms: Figure | None = None


class StepProfile(Record, frozen=True):
    """One fixed step of the tuned engine, repeated on the GPU alone: what it holds, how long it takes, where that goes.

    `kernels` are by label (see `saturation`); empty, with `why`, where they were not traced or could not be told.
    """

    step: Step
    step_ms: Figure
    kernels: dict[str, KernelPart] = {}
    why: str | None = None
    trial: str | None = None


class Overlap(Record, frozen=True):
    """How a gain over the tuned engine divides: gain = overlap × host, and host = busy × rest.

    `overlap` is what these engines reach together of one engine's rate by the GPU's work alone, their smaller batches
    included; `host` what their gain under load has beyond that. Of this, `busy` is measured by itself: how many times
    as long the GPU was at work under load. `rest` is neither: steps under load that are not the fixed ones. It would be
    1 if they were. None: not known.
    """

    engines: int
    mps: bool
    thread_percentage: int | None
    overlap: Figure
    host: Figure | None
    trial: str
    busy: Figure | None = None  # came later, like `rest`: reports that were written before have neither
    rest: Figure | None = None


class Profile(Record, frozen=True):
    """What was found out about the model on this GPU, beside the trials. None: not found out.

    `throughput_bound` is what no number of engines exceeds, by the GPU's `ceilings` (see `roofline`). `gpu_idle_pct`
    and `cpu_stall_pct` are of the best single engine: how long the GPU idles, and for how much of that the host is
    shown to work (see `stall`). `gpu_throughput` is what that engine would give if the GPU never waited. `attention`
    and `mlp` are those of the decode step where there is one; `decode` and `prefill` have all kernels.
    `overlap` and `host` are of the best several under MPS, `overlaps` of all that were measured.
    """

    ceilings: Ceilings | None = None
    throughput_bound: Figure | None = None
    gpu_idle_pct: Figure | None = None
    cpu_stall_pct: Figure | None = None
    gpu_throughput: Figure | None = None
    attention: KernelPart | None = None
    mlp: KernelPart | None = None
    decode: StepProfile | None = None
    prefill: StepProfile | None = None
    overlap: Figure | None = None
    host: Figure | None = None
    overlaps: list[Overlap] = []


class Report(Record, frozen=True):
    """What `profile` answers, and what every later verb reads. Keys as in the contract with users."""

    schema_version: int
    created: str
    replayed: bool
    model: ModelFacts
    gpu: GpuFacts
    host: HostFacts
    software: Software
    workload: Workload
    protocol: Protocol
    candidates: list[Candidate]
    profile: Profile | None
    waterfall: list[WaterfallStep] | None
    warnings: list[Caution]
    recommendation: Recommendation
    timeline: list[Stage]
    question: Question
    core_s: float | None = None  # CPU seconds of a fixed piece of work at a core's full speed
    cores_slowed_pct: float | None = None  # share of probes of a core that took at least half as long again


class Variant(Record, frozen=True):
    """A model, whole or without a part, in one step: how long that takes one engine, and how many times one engine's
    rate several reach under MPS, each with its share of the batch. `overlap` is how many times the rate of one engine
    with such a share they reach: 1 if their kernels only take turns, without what smaller batches cost. Of decode only:
    a prefill step is full whatever the number of engines, so that both are the same. `why`: why something is not known.
    """

    step_ms: Figure | None = None
    gain: Figure | None = None
    overlap: Figure | None = None
    why: str | None = None


class AblatedStep(Record, frozen=True):
    """One fixed step of a model and of its parts, on the GPU alone.

    Every variant has embedding, norms, output head and sampling; `rest_only` has nothing else. Times add up, if nothing
    but the parts counts: attention only + MLP only − rest only = whole. `closure` is that sum over the whole's time
    with one engine.
    `expected` is the gain that the times of the parts so added let expect, `weighted_mean` the mean of the two parts'
    gains, each weighted by its share of their time (`attention_share` and the rest).
    """

    kind: Literal["decode", "prefill"]
    context: int
    sequences: int  # of one engine
    whole: Variant
    attention_only: Variant
    mlp_only: Variant
    rest_only: Variant
    attention_share: Figure | None = None
    closure: Figure | None = None
    weighted_mean: Figure | None = None
    expected: Figure | None = None
    expected_over_whole: Figure | None = None


class Scheduled(Record, frozen=True):
    """Engines with or without asynchronous scheduling at one load. `gain` is over one engine without it."""

    engines: int
    mps: bool
    async_scheduling: bool
    concurrency: int
    throughput_tok_per_s: Value | None = None
    gain: Value | None = None
    e2e_ms: Percentiles | None = None
    gpu_idle_pct: float | None = None
    cpu_stall_pct: float | None = None
    trial: str | None = None
    why: str | None = None


class AblationReport(Record, frozen=True):
    """What `ablate` answers."""

    schema_version: int
    created: str
    replayed: bool
    model: ModelFacts
    gpu: GpuFacts
    host: HostFacts
    software: Software
    settings: EngineSettings
    ablation: Ablation
    steps: list[AblatedStep]
    scheduling: list[Scheduled]
    warnings: list[Caution]
    sentence: str
