"""An answer in minutes: what a profile can leave out when every start of engines is used for all that it can show.

A full profile starts every candidate by itself, and what decides at least twice. Here several engines are started
together and serve as one engine, as two, …: those that get no requests rest. How many are worth trying is read from the
time that the GPU waits for one, and thread percentages are tried at once where the model's products are right at them.
Every candidate is started once, so that how far starts differ is taken from recorded runs (`estimate.assumed`). Pure.
"""

from __future__ import annotations

import math
from collections.abc import Generator

from advisor.core import limits, memory, specs, tuning
from advisor.core.contenders import judge_logprobs
from advisor.core.outline import Outline
from advisor.core.records import TrialSpec
from advisor.core.search import WORTH_IT, Chapter, Search, Told
from advisor.core.tried import Tried

MOST_TOGETHER = 4
# Where the GPU idles for more, another engine may still fill it.
STILL_WAITS_IDLE_PCT = 10.0
# From three engines on the largest percentages that computed correctly gave -5 to +14 % in the recorded runs, mostly a
# gain; with two engines they cost 2 to 4 %.
PERCENTAGES_FROM, LEAST_SHARE = 3, 1.5
# No setting of one engine has brought more than 1.48 times the default's rate, in single starts.
BEYOND_TUNING = 1.5


class Quick(Search):
    """The short way through the candidates. `Search` has what trials and refusals need."""

    def story(self) -> Generator[TrialSpec, Tried, Outline]:
        """one engine · as many without MPS as its idle GPU asks for · the same under MPS · one setting of one engine"""
        together = self._together()
        single = yield from self._measured(self._of(1, together))
        self._single = single
        yield from self._smaller_loads(single)
        if refusal := self._refusal(2):
            for mps in (False, True):
                self._leave_out(2, mps, None, *refusal)
        else:
            without = yield from self._without(single, together)
            yield from self._smaller_loads(without)
            under = yield from self._under(without)
            yield from self._smaller_loads(under)
        yield from self._one_setting(single)
        return self._outline()

    # -- chapters

    def _without(self, single: Tried, together: int) -> Told:
        """As many engines without MPS as should fill the GPU, and one more while it still waits and that helps."""
        engines = self._wanted(single)
        best = yield from self._measured(self._of(engines, together))
        while best.ok and _idle_pct(best) > STILL_WAITS_IDLE_PCT and engines < together:
            engines += 1
            more = yield from self._measured(self._of(engines, together))
            if not more.ok or more.rate < WORTH_IT * best.rate:
                break
            best = more
        return best

    def _under(self, without: Tried) -> Told:
        """As many under MPS, at a thread percentage where that is worth it."""
        engines = without.spec.engines
        percentage = yield from self._percentage(without)
        if percentage is not None:
            under = yield from self._measured(self._spec(engines, mps=True, percentage=percentage))
            if under.ok and judge_logprobs([without, under])[1].ok:
                why = f"--protocol fast tries {percentage} % at once, where the model's products are right"
                self._leave_out(engines, True, None, "skipped", why)
                return under
        # Never more than were measured without MPS: it would be credited with what only another engine brings.
        return (yield from self._measured(self._spec(engines, mps=True)))

    def _percentage(self, without: Tried) -> Generator[TrialSpec, Tried, int | None]:
        """The largest percentage worth trying at which the model's products are right."""
        engines = without.spec.engines
        wanted = specs.percentages(self._manifest, engines)
        least = 100 if engines < PERCENTAGES_FROM else math.floor(100 * LEAST_SHARE / engines)
        for percentage in (one for one in wanted if one < least):
            # Engines under MPS are started once: at a small share they would say nothing of MPS.
            why = "--protocol fast tries only percentages from 150/N on, and none for two engines"
            self._leave_out(engines, True, percentage, "skipped", why)
        wanted = [one for one in wanted if one >= least]
        right = yield from self._right(engines, wanted, without.spec.settings or self._for(engines))
        for percentage in right[:-1]:
            why = f"--protocol fast tries only the largest percentage that computes correctly, {right[-1]} %"
            self._leave_out(engines, True, percentage, "skipped", why)
        return right[-1] if right else None

    def _one_setting(self, single: Tried) -> Chapter:
        """The first setting that may help one engine, unless several without MPS are beyond what any setting gives."""
        if not single.ok or single.measurement is None:
            return
        several = max((one.rate for one in self._several_tried if not one.spec.mps), default=0.0)
        seen = tuning.Seen(
            gpu_idle_pct=single.measurement.gpu_idle_pct,
            api_fullness=limits.api_fullness(single.raw),
            ttft_matters=any(name.startswith("ttft") for name in self._manifest.question.slo),
        )
        tried = False
        for number in range(tuning.RIVALS):
            rival = tuning.rival(number, self._tuned, self._manifest.question.workload, seen)
            if rival is None:
                continue
            why = rival.skipped or self._no_room(1, rival.settings)
            if not why and several >= BEYOND_TUNING * single.rate:
                why = f"several engines without MPS give {several / single.rate:.1f} times what one does"
            if not why and rival.settings.max_num_batched_tokens != self._tuned.max_num_batched_tokens:
                why = "--protocol fast tries nothing that the model has to be compiled anew for"
            if not why and tried:
                why = "--protocol fast tries one setting of one engine"
            if why:
                self._leave_out(1, False, None, "skipped", f"{rival.words}: {why}", base=rival.settings)
                continue
            result, tried = (yield from self._rival(rival)), True
            if self._is_better(result, single):
                self._single, self._tuned = result, rival.settings
                yield from self._smaller_loads(result)

    def _smaller_loads(self, one: Tried) -> Chapter:
        """The loads that objectives may be kept at, in the same start."""
        if not self._manifest.question.slo or not one.ok:
            return
        points = {self._concurrency: one}
        for share in sorted(self._protocol.curve, reverse=True):
            yield from self._at_smaller(one, round(share * self._concurrency), points)

    # -- how many

    def _wanted(self, single: Tried) -> int:
        """As many engines as should fill the GPU, if each keeps it as busy as one does; two where that is not known."""
        most = next((engines for engines in range(MOST_TOGETHER, 2, -1) if self._refusal(engines) is None), 2)
        if not single.ok:
            return 2
        return max(2, min(most, math.ceil(100 / max(1.0, 100 - _idle_pct(single)))))

    def _together(self) -> int:
        """How many engines can be started at once so that any number of them can take the whole load: each is to have
        the same settings as one alone, and a KV cache for all requests in flight.
        """
        for engines in range(MOST_TOGETHER, 1, -1):
            same = tuning.bare(self._for(engines)) == tuning.bare(self._manifest.settings)
            if same and self._refusal(engines) is None and self._holds_the_load(engines):
                return engines
        return 1

    def _holds_the_load(self, engines: int) -> bool:
        planned = specs.memory_plan(self._manifest, engines, self._for(engines))
        block = memory.BLOCK_TOKENS * memory.kv_bytes_per_token(self._manifest.model)
        return planned.kv_bytes is not None and (
            planned.kv_bytes >= self._concurrency * planned.request_kv_bytes + block
        )

    def _of(self, working: int, together: int) -> TrialSpec:
        """So many engines without MPS: of those that are started together if these are enough."""
        if working >= together:
            return self._spec(working, mps=False)
        return specs.among(self._manifest, self._spec(together, mps=False), working)


def _idle_pct(one: Tried) -> float:
    """0.0 where it is not known: then nothing says that more engines would help."""
    seen = one.measurement.gpu_idle_pct if one.measurement else None
    return seen or 0.0
