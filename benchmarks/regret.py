"""What `--protocol fast` would have lost: its way through recorded profiles, where every candidate was tried.

    python benchmarks/regret.py [DIR…]      (default: every profile in data/ and data/studies/)

The fast protocol is told the first starts of the candidates that it asks for, and chooses; what it chose is scored on
the later starts, where there are any, against the best recorded one that may be advised: without MPS, or with it where
that brings `--min-gain`. Nothing is measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from advisor.core.errors import NotRecorded
from advisor.core.quick import Quick
from advisor.core.recommend import conclude
from advisor.core.records import FAST, Manifest, Report, TrialSpec
from advisor.core.tried import Tried, candidate, judge
from advisor.shell.store import RunFolder

DATA = Path(__file__).parent.parent / "data"


def recorded(folder: RunFolder, manifest: Manifest) -> list[Tried]:
    """The judged trials at full load, and the check of percentages."""
    tried = [judge(raw) for raw in folder.trials()]
    load = manifest.question.workload.concurrency
    return [one for one in tried if one.spec.workload is None or one.spec.workload.concurrency == load]


def found(spec: TrialSpec, known: Sequence[Tried]) -> Tried | None:
    """The first start of what is asked for, as if it had been asked for so."""
    for one in known:
        same = candidate(one.spec) == candidate(spec) if spec.kind == "load" else one.spec.kind == spec.kind
        if same:
            return msgspec.structs.replace(one, spec=spec)
    return None


def fast(manifest: Manifest, known: Sequence[Tried]) -> Report:
    """The report of the fast protocol on these trials. Raises NotRecorded for what nobody tried."""
    asked = msgspec.structs.replace(manifest, protocol=FAST)
    tried: list[Tried] = []
    story = Quick(asked).story()
    spec = next(story)
    while True:
        one = found(spec, known)
        try:
            if one is None and spec.kind == "load" and spec.engines == 1 and not spec.mps and tried:
                # Settings of one engine were not tried in the first recorded runs: there is no verdict that needs them.
                one = msgspec.structs.replace(
                    tried[0], spec=spec, outcome="skipped", measurement=None, why="nobody tried it"
                )
            if one is None:
                spec = story.throw(NotRecorded(f"{spec.engines} engines, MPS {spec.mps}, {spec.label or 'default'}"))
                continue
            tried.append(one)
            spec = story.send(one)
        except StopIteration as end:
            return conclude(asked, tried, end.value, created="", replayed=True)


def scores(known: Sequence[Tried]) -> dict[tuple[int, bool, int | None, str], float]:
    """Tokens/s of each candidate over its later starts, or its only one."""
    starts: dict[tuple[int, bool, int | None, str], list[float]] = {}
    for one in known:
        if one.ok and one.spec.kind == "load":
            name = (one.spec.engines, one.spec.mps, one.spec.thread_percentage, settings(one.spec.settings))
            starts.setdefault(name, []).append(one.rate)
    return {name: statistics.mean(rates[1:] or rates) for name, rates in starts.items()}


def settings(one: object) -> str:
    assert isinstance(one, msgspec.Struct)
    shared = ("kv_cache_memory_bytes", "max_model_len")
    return str({key: value for key, value in msgspec.to_builtins(one).items() if key not in shared})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    folders = parser.parse_args().runs or sorted(path.parent for path in DATA.glob("**/manifest.json"))
    losses: list[float] = []
    for path in folders:
        folder = RunFolder(path)
        manifest = folder.manifest()
        if manifest.ablation is not None:
            continue
        known = recorded(folder, manifest)
        table = scores(known)
        if len({name[:2] for name in table}) < 4:
            continue  # no profile that got as far as several engines with MPS and without
        try:
            told = fast(manifest, known).recommendation
        except NotRecorded as missing:
            print(f"{path.name}: was not tried there: {missing}")
            continue
        # MPS has to bring what was asked over the best without it, or is no choice.
        without = max(rate for name, rate in table.items() if not name[1])
        allowed = [
            name for name, rate in table.items() if not name[1] or rate >= (1 + manifest.question.min_gain) * without
        ]
        best = max(allowed, key=lambda name: table[name])
        if told.status != "recommend":
            print(f"{path.name}: {told.status}; {told.sentence}")
            continue
        percentage = told.thread_percentages[0] if told.thread_percentages else None
        chosen = (told.engines or 0, bool(told.mps), percentage, settings(told.settings))
        loss = 1 - table[chosen] / table[best]
        losses.append(loss)
        print(f"{path.name}: {chosen[:3]} {table[chosen]:,.0f} of {table[best]:,.0f} ({best[:3]}): loses {loss:.1%}")
    if losses:
        print(f"{len(losses)} runs: median {statistics.median(losses):.1%}, worst {max(losses, default=math.nan):.1%}")


if __name__ == "__main__":
    main()
