"""What stands between the command line and an ablation: as `profiling`, with contexts for a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from advisor import profiling
from advisor.core import scheduling
from advisor.core.ablation import conclude, largest, largest_batches, trials
from advisor.core.errors import BadQuestion, NotRecorded, Unfit
from advisor.core.records import ACCIDENTS, Ablation, AblationReport, Manifest, TrialSpec
from advisor.core.specs import asking
from advisor.core.tried import Tried, judge
from advisor.report.as_json import dumps
from advisor.shell import replay
from advisor.shell.clock import now

if TYPE_CHECKING:
    from rich.console import Console

ENGINES = 2
# vLLM 0.26 runs these by Transformers' own layers, whose attention returns more than hidden states.
NOT_TAKEN_APART = ("OlmoForCausalLM", "Olmo2ForCausalLM", "SmolLM3ForCausalLM")


def live(
    asked: profiling.Asked, contexts: Sequence[int], loads: Sequence[int], console: Console, *, parts: bool = True
) -> AblationReport:
    """Take the model apart on this machine. `asked.ctx` is the longest of the contexts, which memory is planned for;
    asynchronous scheduling is turned off and on at the `loads`, and without `parts` that is all.
    """

    def complete(manifest: Manifest) -> Manifest:
        if parts and manifest.model.architecture in NOT_TAKEN_APART:
            raise Unfit(
                f"{manifest.model.architecture} cannot be taken apart: vLLM runs it by the code of another library; "
                "choose a model of another architecture"
            )
        batches = largest_batches(manifest, contexts, ENGINES) if parts else []
        ablation = Ablation(contexts=list(contexts), batches=batches, engines=ENGINES, loads=list(loads), parts=parts)
        return msgspec.structs.replace(asking(manifest, largest(ablation)), ablation=ablation)

    with profiling.bench(asked, console, complete) as (manifest, runner, progress, folder):
        tried: list[Tried] = []
        for spec in _all_trials(manifest):
            for attempt in _attempts(spec):
                tried.append(judge(runner.run(attempt)))
                progress.trial(tried[-1])
                if tried[-1].outcome not in ACCIDENTS:
                    break
            # Where not even one engine with the whole model can be asked, nothing else needs to be tried.
            if len(tried) == 2 and not any(one.ok for one in tried):
                break
        runner.finish()
        # How the engines ended was put on record after the trials.
        tried = [judge(runner.run(one.spec)) for one in tried]
    report = conclude(manifest, tried, created=now(), replayed=False)
    profiling.keep(folder, dumps(report), console)
    return report


def _all_trials(manifest: Manifest) -> list[TrialSpec]:
    return [*trials(manifest), *scheduling.trials(manifest)]


def _attempts(spec: TrialSpec) -> tuple[TrialSpec, TrialSpec]:
    """A trial, and the one to make if it failed by accident."""
    return spec, msgspec.structs.replace(spec, repeat=1)


def replayed(
    model: str | None, contexts: Sequence[int] | None, where: str, say: Callable[[str], None]
) -> AblationReport:
    """The report of a recorded ablation, computed from its raw evidence alone. `say` is told which one was chosen."""
    if where == "auto":
        if model is None:
            raise BadQuestion("--replay auto needs --model to choose a recorded ablation; or give --replay DIR")
        folder = replay.choose_ablation(model, contexts)
    else:
        folder = replay.open_run(Path(where))
    manifest = folder.manifest()
    if manifest.ablation is None:
        raise NotRecorded(f"{where} holds no ablation; a profile is replayed with mps-advisor profile")
    if not replay.fits_ablation(manifest, model, contexts):
        raise NotRecorded(f"{where} answers another question: {replay.describe_ablation(manifest)}")
    runner = replay.Replay(folder)
    tried = []
    for spec in _all_trials(manifest):
        for attempt in _attempts(spec):
            try:
                tried.append(judge(runner.run(attempt)))
            except NotRecorded:
                continue  # it was cut short, or there was no need to; what is there is told
    if not tried:
        raise NotRecorded(f"{folder.path.name} holds no trial of the ablation that it was to be")
    if where == "auto":
        say(f"replayed {folder.path.name}, recorded on {manifest.created[:10]}; --replay DIR names another run")
    return conclude(manifest, tried, created=now(), replayed=True)
