"""What stands between the command line and an ablation: as `profiling`, with contexts for a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from advisor import profiling
from advisor.core import scheduling
from advisor.core.ablation import conclude, largest_batch, trials
from advisor.core.errors import BadQuestion, NotRecorded
from advisor.core.records import Ablation, AblationReport, Manifest, TrialSpec
from advisor.core.specs import asking
from advisor.core.tried import judge
from advisor.report.as_json import dumps
from advisor.shell import replay
from advisor.shell.clock import now

if TYPE_CHECKING:
    from rich.console import Console

ENGINES = 2


def live(asked: profiling.Asked, contexts: Sequence[int], loads: Sequence[int], console: Console) -> AblationReport:
    """Take the model apart on this machine. `asked.ctx` is the longest of the contexts, which memory is planned for;
    asynchronous scheduling is turned off and on at the `loads`.
    """

    def complete(manifest: Manifest) -> Manifest:
        batch = largest_batch(manifest, contexts, ENGINES)
        ablation = Ablation(contexts=list(contexts), batch=batch, engines=ENGINES, loads=list(loads))
        return msgspec.structs.replace(asking(manifest, batch), ablation=ablation)

    with profiling.bench(asked, console, complete) as (manifest, runner, progress, folder):
        tried = []
        for spec in _all_trials(manifest):
            tried.append(judge(runner.run(spec)))
            progress.trial(tried[-1])
        runner.finish()
        # How the engines ended was put on record after the trials.
        tried = [judge(runner.run(one.spec)) for one in tried]
    report = conclude(manifest, tried, created=now(), replayed=False)
    profiling.keep(folder, dumps(report), console)
    return report


def _all_trials(manifest: Manifest) -> list[TrialSpec]:
    return [*trials(manifest), *scheduling.trials(manifest)]


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
        raise NotRecorded(f"{where} holds a profile, not an ablation: replay it with mps-advisor profile")
    if not replay.fits_ablation(manifest, model, contexts):
        raise NotRecorded(f"{where} answers another question: {replay.describe_ablation(manifest)}")
    runner = replay.Replay(folder)
    tried = []
    for spec in _all_trials(manifest):
        try:
            tried.append(judge(runner.run(spec)))
        except NotRecorded:
            continue  # it was cut short; what is there is told
    if not tried:
        raise NotRecorded(f"{folder.path.name} holds no trial of the ablation that it was to be")
    if where == "auto":
        say(f"replayed {folder.path.name}, recorded on {manifest.created[:10]}; --replay DIR names another run")
    return conclude(manifest, tried, created=now(), replayed=True)
