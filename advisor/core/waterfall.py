"""Where a gain comes from: each change credited by itself. Pure.

default engine -> tuned engine -> N engines without MPS -> N engines under MPS -> thread percentages

Every factor is the ratio of two quoted rates, so that the factors multiply to the gain of the last over the first.
"""

from __future__ import annotations

from collections.abc import Sequence

from advisor.core import tuning
from advisor.core.contenders import Contender
from advisor.core.estimate import gain
from advisor.core.records import WaterfallStep
from advisor.core.tried import slug


def waterfall(
    default: Contender | None, tuned: Contender | None, everyone: Sequence[Contender], choice: Contender | None
) -> list[WaterfallStep] | None:
    """The steps to the `choice`, or, where no MPS is advised, to the best that MPS gives: a step may well be a loss.

    None where the default or the tuned engine has no rate, or no number of engines was measured both under MPS and
    without it. A step that changed nothing is left out.
    """
    if default is None or tuned is None or not default.ok or not tuned.ok:
        return None
    last = choice if choice is not None and choice.mps else _best_with_a_rival(everyone)
    if last is None:
        return None
    # Where percentages were tried at once, they and MPS are one step.
    unrestricted = last if last.percentage is None else _like(everyone, last, mps=True) or last
    without = _like(everyone, last, mps=False)
    if without is None:
        return None
    at = "" if unrestricted.percentage is None else f", {unrestricted.percentage} % of the threads each"
    several = f"{last.engines} engines without MPS"
    if last.settings is not None and tuned.settings is not None and last.settings != tuned.settings:
        said = tuning.words(last.settings, tuned.settings)
        several += f", {', '.join(said)}" if said else ""
    changes = ", ".join(tuning.words(tuned.settings, default.settings)) if tuned.settings and default.settings else ""
    chain = [
        ("tuned", changes or "no setting helped", default, tuned),
        ("engines", several, tuned, without),
        ("mps", f"{last.engines} engines under MPS{at}", without, unrestricted),
        ("thread_percentages", f"{last.percentage} % of the threads each", unrestricted, last),
    ]
    return [_step(*link) for link in chain if link[2] is not link[3]]


def _step(step: str, change: str, before: Contender, after: Contender) -> WaterfallStep:
    assert before.estimate is not None and after.estimate is not None
    trials = [slug(one.spec) for contender in (before, after) for one in contender.starts]
    return WaterfallStep(step=step, change=change, factor=gain(after.estimate, before.estimate), trials=trials)


def _best_with_a_rival(everyone: Sequence[Contender]) -> Contender | None:
    """The fastest under MPS of those that were also measured without it; what was started twice goes first."""
    several = [one for one in everyone if one.ok and one.mps and one.engines > 1]
    with_rival = [one for one in several if _like(everyone, one, mps=False) is not None]
    return max(with_rival, key=lambda one: (len(one.starts), one.rate), default=None)


def _like(everyone: Sequence[Contender], last: Contender, *, mps: bool) -> Contender | None:
    """As many engines of the same settings, unrestricted, with or without MPS."""
    wanted = tuning.bare(last.settings) if last.settings else None
    for one in everyone:
        same = one.engines == last.engines and one.mps == mps and one.percentage is None
        if one.ok and same and one.settings and tuning.bare(one.settings) == wanted:
            return one
    return None
