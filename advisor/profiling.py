"""What stands between the command line and the flow: turn options into a manifest, choose and prepare a Runner."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from advisor import __version__, flow
from advisor.core import cores, memory, settings, slo, specs
from advisor.core import plan as planning
from advisor.core.errors import BadQuestion, NoHonestAnswer, NotRecorded, Unfit
from advisor.core.model import check_context, facts
from advisor.core.records import (
    FAST,
    FULL,
    LIGHT_LOAD,
    SCHEMA_VERSION,
    Ceilings,
    EngineSettings,
    GpuFacts,
    HostFacts,
    Manifest,
    ModelFacts,
    Prompts,
    Protocol,
    Question,
    Report,
    Software,
    Workload,
    WorkloadKind,
)
from advisor.core.vocabulary import words_of
from advisor.core.weights import Tensor, tensors
from advisor.core.workload import as_served, spread
from advisor.report.as_json import dumps
from advisor.shell import hub, replay, weights
from advisor.shell.clock import now
from advisor.shell.processes import inherited
from advisor.shell.resources import load_yaml, profiles_directory
from advisor.shell.store import RunFolder, write

if TYPE_CHECKING:
    from rich.console import Console

    from advisor.shell.live import Live
    from advisor.shell.progress import Progress

DEFAULT_MIN_GAIN = 0.10
DEFAULT_MAX_ENGINES = 8
FIRST_LOAD = 256  # what --concurrency auto tunes the engine at before it looks for the load
DRY_RUN_GPU = "gpus/nvidia-h200.yaml"


@dataclass(frozen=True)
class Asked:
    """The options of `profile`, as given."""

    model: str | None
    ctx: tuple[int, tuple[int, int] | None] | None  # mean, and the range of mixed lengths
    osl: tuple[int, tuple[int, int] | None]
    workload: WorkloadKind
    concurrency: int | Literal["auto"]
    max_engines: int | None
    thread_percentages: Literal["auto", "none"] | list[int]
    min_gain: float | None
    slo: dict[str, float] | None
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    gpu: str | None
    weights: Literal["auto", "dummy"]
    out: Path | None
    resume: bool
    vllm: str | None
    protocol: Literal["fast", "full"] | None = None  # None: full, or in a replay what was recorded
    prompts: Prompts = "text"


def _workload(asked: Asked) -> Workload:
    if asked.ctx is None:
        raise BadQuestion("--ctx is missing; give the prompt length in tokens, for example --ctx 1024")
    (isl, isl_range), (osl, osl_range) = asked.ctx, asked.osl
    if asked.workload == "decode" and (isl_range or osl_range):
        raise BadQuestion("--workload decode holds every request at one context; give --ctx and --osl one length each")
    if asked.workload == "prefill":
        osl, osl_range = 1, None
    return Workload(
        kind=asked.workload,
        isl=isl,
        osl=osl,
        concurrency=FIRST_LOAD if asked.concurrency == "auto" else asked.concurrency,
        isl_range=isl_range,
        osl_range=osl_range,
        prompts=asked.prompts,
    )


def _question(asked: Asked, model: ModelFacts) -> Question:
    workload = _workload(asked)
    if name := slo.unseen(asked.slo or {}, workload.kind):
        raise BadQuestion(
            f"--slo: requests of --workload {workload.kind} show no {name.split('_')[0]}; leave out {name}"
        )
    if asked.protocol == "fast" and asked.concurrency == "auto":
        raise BadQuestion("--protocol fast looks for no load; give --concurrency a number, or use --protocol full")
    longest = as_served(workload)
    check_context(model, longest.isl, longest.osl)
    apart = 0 if workload.osl_range else spread(workload.kind, longest.isl, workload.osl, model.max_context)
    return Question(
        workload=msgspec.structs.replace(workload, osl_spread=apart),
        max_engines=DEFAULT_MAX_ENGINES if asked.max_engines is None else asked.max_engines,
        thread_percentages=asked.thread_percentages,
        min_gain=DEFAULT_MIN_GAIN if asked.min_gain is None else asked.min_gain,
        slo=asked.slo or {},
        concurrency_auto=asked.concurrency == "auto",
    )


def _refuse_unseen(asked: Asked, kind: str) -> None:
    if name := slo.unseen(asked.slo or {}, kind):
        raise BadQuestion(f"--slo: requests of --workload {kind} show no {name.split('_')[0]}; leave out {name}")


def _find_model(asked: Asked) -> tuple[ModelFacts, hub.Found]:
    if asked.model is None:
        raise BadQuestion("--model is missing; give a Hugging Face id, a folder with config.json, or a shipped name")
    found = hub.find_model(asked.model, asked.weights)
    kind: Literal["real", "dummy"] = "dummy" if found.folder is None else "real"
    model = facts(found.name, found.config, asked.dtype, asked.quantization, asked.kv_cache_dtype, kind)
    return model, found


def _settings(model: ModelFacts, gpu: GpuFacts, question: Question) -> EngineSettings:
    """The default engine's settings. Raises NoHonestAnswer with the sums when one engine does not fit."""
    defaults = settings.read_defaults(load_yaml("vllm.yaml"))
    batch = settings.default_batch(gpu, defaults)
    workload = as_served(question.workload)
    check_context(model, workload.isl, workload.osl)
    planned = memory.plan(
        gpu,
        model,
        max_num_batched_tokens=batch.max_num_batched_tokens,
        max_num_seqs=batch.max_num_seqs,
        workload=workload,
        engines=1,
    )
    if planned.kv_bytes is None:
        raise NoHonestAnswer(memory.explain(planned))
    return settings.default_settings(model, gpu, defaults, workload, planned.kv_bytes)


# ---------------------------------------------------------------- replay


def refuse_measuring(resume: bool, out: Path | None, gpu: str | None) -> None:
    """Refuse the options of a live run beside --replay."""
    if resume or out is not None or gpu is not None:
        raise BadQuestion("--replay measures nothing and records nothing; leave out --resume, --out and --gpu")


def replayed(asked: Asked, where: str, say: Callable[[str], None] = lambda text: None) -> Report:
    """The report of a recorded run, computed from its raw evidence alone. `say` is told which one was chosen."""
    refuse_measuring(asked.resume, asked.out, asked.gpu)
    workload = _workload(asked) if asked.ctx is not None else None
    if where == "auto":
        if asked.model is None or workload is None:
            raise BadQuestion("--replay auto needs --model and --ctx to choose a recorded run; or give --replay DIR")
        folder = replay.choose(asked.model, workload, auto=asked.concurrency == "auto", protocol=asked.protocol)
        manifest = folder.manifest()
    else:
        folder = replay.open_run(Path(where))
        manifest = folder.manifest()
        _refuse_ablation(manifest, where)
        if not replay.fits(manifest, asked.model, workload, auto=asked.concurrency == "auto"):
            raise NotRecorded(f"{where} answers another question: {replay.describe(manifest)}")
    for option, wanted, recorded in (
        ("--quantization", asked.quantization, manifest.model.quantization),
        ("--max-engines", asked.max_engines, manifest.question.max_engines),
        ("--protocol", asked.protocol, replay.protocol_of(manifest)),
        ("--dtype", None if asked.dtype == "auto" else asked.dtype, manifest.model.dtype),
        (
            "--kv-cache-dtype",
            None if asked.kv_cache_dtype == "auto" else asked.kv_cache_dtype,
            manifest.model.kv_cache_dtype,
        ),
        (
            "--thread-percentages",
            None if asked.thread_percentages == "auto" else asked.thread_percentages,
            manifest.question.thread_percentages,
        ),
    ):
        if wanted is not None and wanted != recorded:
            raise NotRecorded(f"{folder.path.name} was recorded with {option} {recorded or 'none'}, not {wanted}")
    # How the evidence is judged is today's question; which trials there are is the recorded one's.
    question = manifest.question
    if asked.min_gain is not None:
        question = msgspec.structs.replace(question, min_gain=asked.min_gain)
    if asked.slo is not None:
        _refuse_unseen(asked, question.workload.kind)
        question = msgspec.structs.replace(question, slo=asked.slo)
    report = _judged(folder, manifest, question)
    if where == "auto":
        say(f"replayed {folder.path.name}, recorded on {manifest.created[:10]}; --replay DIR names another run")
    return report


def as_recorded(where: Path) -> Report:
    """The report of a run folder, by the question that it was recorded with."""
    folder = replay.open_run(where)
    manifest = folder.manifest()
    _refuse_ablation(manifest, where)
    return _judged(folder, manifest, manifest.question)


def _judged(folder: RunFolder, manifest: Manifest, question: Question) -> Report:
    if manifest.ceilings is None:
        manifest = msgspec.structs.replace(manifest, ceilings=_ceilings(manifest.gpu.name))
    return flow.profile(manifest, replay.Replay(folder), created=now(), replayed=True, judged_by=question)


def _refuse_ablation(manifest: Manifest, where: Path | str) -> None:
    if manifest.ablation is not None:
        raise NotRecorded(f"{where} holds an ablation, not a profile: replay it with mps-advisor ablate")


# ---------------------------------------------------------------- dry run


def plan(asked: Asked, *, as_json: bool) -> str:
    """What a live run would do: trials, memory, minutes. Touches no GPU."""
    from rich.console import Console

    from advisor.report import plan as text

    model, _ = _find_model(asked)
    question = _question(asked, model)
    gpu, host, assumed = _machine_for_plan(asked.gpu)
    base = _settings(model, gpu, question)
    manifest = _manifest(question, model, gpu, host, base, _software(None), protocol_for(question.slo, asked.protocol))
    most_by_cores = cores.most_engines(host.cores)
    sums, most_by_memory = [assumed] if assumed else [], 0
    for engines in range(1, max(1, min(question.max_engines, most_by_cores)) + 1):
        planned = specs.memory_plan(manifest, engines)
        sums.append(memory.explain(planned))
        if planned.kv_bytes is None:
            break
        most_by_memory = engines
    trials = planning.trial_plan(question, model, most_by_memory, most_by_cores, manifest.protocol, base)
    if as_json:
        return json.dumps(text.as_dict(trials, sums), indent=2, ensure_ascii=False) + "\n"
    page = io.StringIO()
    text.render(trials, sums, Console(file=page, width=80))
    return page.getvalue()


def _machine_for_plan(selector: str | None) -> tuple[GpuFacts, HostFacts, str]:
    """This machine where it has a GPU; else the H200 machine of the shipped facts, and a line that says so."""
    from advisor.shell import host
    from advisor.shell.gpu import Nvml

    try:
        with Nvml() as nvml:
            gpu = nvml.find(selector)
            return gpu, host.facts(nvml.numa_node(gpu.uuid)), ""
    except Unfit:
        known = load_yaml(DRY_RUN_GPU)
        gpu, machine = msgspec.convert(known["gpu"], GpuFacts), msgspec.convert(known["host"], HostFacts)
        return gpu, machine, f"No GPU here: planned for one {gpu.name} and {len(machine.cores)} cores."


# ---------------------------------------------------------------- live


class Bench(NamedTuple):
    """This machine, ready to measure what was asked: what it is, who measures, who tells, where it is kept."""

    manifest: Manifest
    runner: Live
    progress: Progress
    folder: RunFolder


def live(asked: Asked, console: Console) -> Report:
    """Measure on this machine. Everything that can be refused is refused before the first engine starts."""
    with bench(asked, console) as (manifest, runner, progress, folder):
        report = flow.profile(
            manifest, runner, created=now(), replayed=False, on_trial=progress.trial, finish=runner.finish
        )
    keep(folder, dumps(report), console)
    return report


def keep(folder: RunFolder, answer: str, console: Console) -> None:
    """Write the answer beside its evidence."""
    from advisor.shell import progress

    try:
        write(folder.path / "report.json", answer.encode())
    except OSError as error:
        # The verdict is known and the evidence is safe; only this copy of the answer is missing.
        progress.say(console, f"report.json could not be written: {error.strerror}")


@contextmanager
def bench(
    asked: Asked, console: Console, complete: Callable[[Manifest], Manifest] = lambda manifest: manifest
) -> Iterator[Bench]:
    """Refuse what is unfit, then prepare this machine; `complete` adds to the manifest before anything is written."""
    from advisor.shell import ceilings, host, mps, progress
    from advisor.shell.company import refuse_company
    from advisor.shell.gpu import Nvml
    from advisor.shell.inspect import torch_version, vllm_version
    from advisor.shell.live import Live, refuse_unfit
    from advisor.shell.lock import GpuLock
    from advisor.shell.patience import DRIVER_FORGETS_S
    from advisor.shell.place import Place, default_vllm_command
    from advisor.shell.progress import Progress
    from advisor.shell.remains import Ledger, clear, scratch_directory

    def say(text: str) -> None:
        progress.say(console, text)

    model, found = _find_model(asked)
    question = _question(asked, model)
    with Nvml() as nvml:
        gpu = nvml.find(asked.gpu)
        machine = host.facts(nvml.numa_node(gpu.uuid))
        control = mps.binaries().control
        # Held by another run? Say so before anything else, and name it; `Live` takes the lock for the whole run.
        with GpuLock(gpu.uuid):
            cleared = clear(gpu.uuid, control, say)
        refuse_company(nvml, gpu.uuid, patience_s=DRIVER_FORGETS_S if cleared else 0.0)
    if gpu.mig:
        raise Unfit(f"MIG is on for {gpu.name} ({gpu.uuid}); MPS is measured on a whole GPU: choose another by --gpu")
    if gpu.compute_mode != "Default":
        raise Unfit(
            f"{gpu.name} is in compute mode {gpu.compute_mode}; the comparison without MPS needs mode Default "
            "(nvidia-smi -c DEFAULT, by its administrator)"
        )
    refuse_unfit(control, mps.foreign_daemons(gpu.uuid))
    command = _vllm_command(asked.vllm) if asked.vllm else default_vllm_command()
    vllm = vllm_version()
    if vllm is None and not asked.vllm:
        raise Unfit("vLLM is not installed here; pip install 'mps-advisor[gpu]', or see --replay auto")
    _refuse_unfit_machine(asked)
    base = _settings(model, gpu, question)
    scratch = scratch_directory()
    ledger: Ledger | None = None
    try:
        ledger = Ledger(gpu.uuid, scratch)
        stand_ins = _stand_ins(model, scratch)
        if stand_ins is not None:
            base = msgspec.structs.replace(base, load_format="auto")
        protocol = protocol_for(question.slo, asked.protocol)
        manifest = _manifest(question, model, gpu, machine, base, _software(vllm, torch_version()), protocol)
        with GpuLock(gpu.uuid):
            found_here = ceilings.measured(gpu, ceilings.cache_folder())
            with Nvml() as nvml:
                refuse_company(nvml, gpu.uuid, patience_s=DRIVER_FORGETS_S)
        manifest = complete(msgspec.structs.replace(manifest, ceilings=found_here or manifest.ceilings))
        model_folder = found.folder or hub.prepare_folder(model, found.tokenizer, scratch / "model")
        tokenizer = model_folder / hub.TOKENIZER
        words = _words(tokenizer)
        folder = RunFolder(asked.out or _default_folder(manifest))
        if asked.resume:
            manifest = _resumed(folder, manifest, asked.out)
        else:
            folder.create(manifest)
        if stand_ins is not None:
            _write_weights(stand_ins, model.dtype, model_folder)
        place = Place(
            manifest=manifest,
            model_folder=model_folder,
            tokenizer=tokenizer,
            words=words,
            vllm_command=command,
            scratch=scratch,
            control=control,
            scrub=_scrub(model_folder, scratch),
            note=ledger.note,
        )
        say(f"recording in {folder.path}")
        with Progress(console) as told, Live(place, folder, told.say) as runner:
            yield Bench(manifest, runner, told, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if ledger is not None:
            ledger.close()


def _refuse_unfit_machine(asked: Asked) -> None:
    """Raise Unfit for what `doctor` calls a failure. vLLM is not looked for here when --vllm names one elsewhere."""
    from advisor.core.doctor import judge
    from advisor.shell.inspect import inspect

    for check in judge(inspect(asked.gpu)):
        if check.state == "fail" and not (asked.vllm and check.name == "vLLM"):
            raise Unfit(f"{check.name}: {check.found}; {check.remedy} (mps-advisor doctor shows all that is amiss)")


def _vllm_command(text: str) -> list[str]:
    """The words of --vllm. Raises BadQuestion when its program is not there."""
    try:
        command = shlex.split(text)
    except ValueError as error:
        raise BadQuestion(f"--vllm is “{text}”: {error}; a command like /opt/venv/bin/vllm is expected") from None
    if not command or shutil.which(command[0]) is None:
        raise BadQuestion(f"--vllm is “{text}”, but no such program was found; give the path of a vllm executable")
    return command


def _scrub(model_folder: Path, scratch: Path) -> dict[str, str]:
    """Paths of this machine and what a record says in their place, longest first."""
    names = {str(model_folder): "<model>", str(scratch): "<scratch>", sys.prefix: "<python>", str(Path.home()): "~"}
    if cache := os.environ.get("VLLM_CACHE_ROOT"):
        names[cache] = "<vllm cache>"
    for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        names.setdefault(entry, "<packages>")
    return {path: names[path] for path in sorted(names, key=len, reverse=True) if len(path) > 1}


def _write_weights(stand_ins: list[Tensor], dtype: str, folder: Path) -> None:
    try:
        weights.write(stand_ins, dtype, folder)
    except OSError as error:
        raise Unfit(f"stand-in weights could not be written to {folder}: {error.strerror}; free some space") from error


def _stand_ins(model: ModelFacts, scratch: Path) -> list[Tensor] | None:
    """The stand-in weights to write for a model that has none here; None where vLLM has to make its own."""
    if model.weights == "real":
        return None
    wanted = tensors(model)
    return wanted if wanted is not None and weights.room_for(wanted, scratch) else None


def _resumed(folder: RunFolder, fresh: Manifest, out: Path | None) -> Manifest:
    """The recorded manifest, if it asks the same question of the same machine."""
    if out is None:
        raise BadQuestion("--resume needs --out: the run folder to go on with")
    if not folder.exists:
        folder.create(fresh)
        return fresh
    recorded = folder.manifest()
    for name in ("question", "ablation", "model", "gpu", "software", "settings", "protocol"):
        if getattr(recorded, name) != getattr(fresh, name):
            raise Unfit(f"{folder.path} was recorded with another {name}; ask exactly as then, or choose another --out")
    if recorded.host.cores != fresh.host.cores:
        raise Unfit(f"{folder.path} was recorded on other CPU cores ({recorded.host.cores}); allow the same ones again")
    return recorded


def _manifest(
    question: Question,
    model: ModelFacts,
    gpu: GpuFacts,
    host: HostFacts,
    base: EngineSettings,
    software: Software,
    protocol: Protocol,
) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created=now(),
        question=question,
        protocol=protocol,
        model=model,
        gpu=gpu,
        host=host,
        software=software,
        settings=base,
        ceilings=_ceilings(gpu.name),
    )


def _ceilings(gpu: str) -> Ceilings | None:
    """What the shipped facts say of a GPU by this name, which is their file's; None where they know none."""
    known = f"gpus/{re.sub(r'[^a-z0-9]+', '-', gpu.lower())}.yaml"
    if not (profiles_directory() / known).is_file():
        return None
    return msgspec.convert(load_yaml(known)["ceilings"], Ceilings)


def protocol_for(objectives: Mapping[str, float], name: Literal["fast", "full"] | None = None) -> Protocol:
    """Today's protocol; under latency objectives with one more load, for they are often kept at small ones only."""
    protocol = FAST if name == "fast" else FULL
    return msgspec.structs.replace(protocol, curve=[LIGHT_LOAD, *protocol.curve]) if objectives else protocol


def _software(vllm: str | None, torch: str | None = None) -> Software:
    shown = {name: value for name, value in inherited().items() if name.startswith("VLLM_") and "/" not in value}
    return Software(advisor=__version__, python=platform.python_version(), vllm=vllm, torch=torch, environment=shown)


def _default_folder(manifest: Manifest) -> Path:
    workload = manifest.question.workload
    name = re.sub(r"[^a-z0-9.]+", "-", manifest.model.name.lower().rpartition("/")[2]).strip("-")
    stamp = re.sub(r"\D", "", manifest.created)[:14]
    return Path("mps-advisor-runs") / f"{name}-{workload.kind}-{workload.isl}-{stamp}"


def _words(tokenizer: Path) -> list[str]:
    """The words to write prompts with. Raises Unfit when this tokenizer.json is missing, damaged or of another form."""
    try:
        return words_of(json.loads(tokenizer.read_bytes()))
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, LookupError) as error:
        raise Unfit(
            f"{tokenizer.name} of this model cannot be used ({error}); a fast tokenizer with plain words is needed"
        ) from error
