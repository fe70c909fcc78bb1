"""The Runner that stands in for a GPU: it looks recorded trials up and never makes one up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from advisor.core.errors import NotRecorded
from advisor.core.records import Manifest, ModelFacts, RawTrial, TrialSpec, Workload
from advisor.core.tried import key, slug
from advisor.shell.resources import data_directory
from advisor.shell.store import MANIFEST, RunFolder


class Replay:
    """Answers with the recorded trial whose spec is equal; raises NotRecorded when there is none."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._recorded = folder.own()

    def run(self, spec: TrialSpec) -> RawTrial:
        found = self._recorded.get(key(spec))
        if found is None:
            raise NotRecorded(
                f"{self.folder.path.name} holds no trial “{slug(spec)}” as this question needs it; it holds: "
                + ", ".join(slug(raw.spec) for raw in self._recorded.values())
            )
        return found

    def recorded(self) -> Iterable[RawTrial]:
        return self._recorded.values()


def shipped_runs() -> list[RunFolder]:
    """The recorded runs that come with the package, by name."""
    return [RunFolder(path.parent) for path in sorted(data_directory().glob(f"*/{MANIFEST}"))]


def describe(manifest: Manifest) -> str:
    workload = manifest.question.workload
    load = "auto" if manifest.question.concurrency_auto else workload.concurrency
    return (
        f"{manifest.model.name} --ctx {_length(workload.isl, workload.isl_range)} "
        f"--osl {_length(workload.osl, workload.osl_range)} --workload {workload.kind} --concurrency {load} "
        f"({manifest.gpu.name})"
    )


def _length(mean: int, between: tuple[int, int] | None) -> str:
    return f"{between[0]}:{between[1]}" if between else str(mean)


def protocol_of(manifest: Manifest) -> Literal["fast", "full"]:
    """By which of today's names a profile was recorded."""
    return "fast" if manifest.protocol.quick else "full"


def choose(
    model: str | None,
    workload: Workload | None,
    *,
    auto: bool = False,
    protocol: Literal["fast", "full"] | None = None,
) -> RunFolder:
    """The shipped run that fits a question exactly. Raises NotRecorded that lists what there is."""
    runs = [(folder, folder.manifest()) for folder in shipped_runs()]
    runs = [(folder, manifest) for folder, manifest in runs if manifest.ablation is None]
    if protocol is not None:
        runs = [(folder, manifest) for folder, manifest in runs if protocol_of(manifest) == protocol]
    fitting = [(folder, manifest) for folder, manifest in runs if fits(manifest, model, workload, auto=auto)]
    if fitting:
        # Among runs of the same question the one that was recorded as a live run would be now comes first.
        return max(fitting, key=lambda run: (run[1].question.workload.osl_spread, run[1].protocol.starts))[0]
    listing = "\n".join(dict.fromkeys(f"  {describe(manifest)}" for _, manifest in runs)) or "  none"
    raise NotRecorded(f"no recorded run fits this question; those that are shipped:\n{listing}")


def fits(manifest: Manifest, model: str | None, workload: Workload | None, *, auto: bool = False) -> bool:
    """Whether a recorded run answers this question. None leaves a side open; `auto`: the load is to be found."""
    same_model = model is None or _same_model(model, manifest.model)
    asked = manifest.question.workload
    return same_model and (
        workload is None
        or (
            auto == manifest.question.concurrency_auto
            and (
                workload.kind,
                workload.isl,
                workload.osl,
                workload.concurrency,
                workload.isl_range,
                workload.osl_range,
                workload.prompts,
            )
            == (asked.kind, asked.isl, asked.osl, asked.concurrency, asked.isl_range, asked.osl_range, asked.prompts)
        )
    )


def choose_ablation(model: str, contexts: Sequence[int] | None) -> RunFolder:
    """The shipped ablation of a model at these contexts. Raises NotRecorded that lists what there is."""
    runs = [(folder, folder.manifest()) for folder in shipped_runs()]
    runs = [(folder, manifest) for folder, manifest in runs if manifest.ablation is not None]
    for folder, manifest in runs:
        if fits_ablation(manifest, model, contexts):
            return folder
    listing = "\n".join(f"  {describe_ablation(manifest)}" for _, manifest in runs) or "  none"
    raise NotRecorded(f"no recorded ablation fits this question; those that are shipped:\n{listing}")


def fits_ablation(manifest: Manifest, model: str | None, contexts: Sequence[int] | None) -> bool:
    """Whether a recorded ablation answers this question. None leaves a side open."""
    asked = manifest.ablation
    same_model = model is None or _same_model(model, manifest.model)
    return asked is not None and same_model and (contexts is None or list(contexts) == asked.contexts)


def describe_ablation(manifest: Manifest) -> str:
    contexts = manifest.ablation.contexts if manifest.ablation else []
    return f"{manifest.model.name} --ctx {','.join(map(str, contexts))} ({manifest.gpu.name})"


def _same_model(asked: str, recorded: ModelFacts) -> bool:
    name = recorded.name.lower()
    return asked.lower() in (name, name.rpartition("/")[2])


def open_run(path: Path) -> RunFolder:
    """A run folder that the user names."""
    folder = RunFolder(path)
    if not folder.exists:
        raise NotRecorded(f"{path} is no run folder: it holds no {MANIFEST}")
    return folder
