"""Which trial to run next, and when to stop. Pure: decided from the question and from what has been measured.

`Search.story` is a generator that tells the whole profile in order. It yields a `TrialSpec`, is sent the judged trial,
and returns the `Outline` of what it did. A live run, a resumed run and a replay all walk the same generator; which of
its chapters there are stands in the manifest's protocol, so that older recorded runs are walked as they were made.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import msgspec

from advisor.core import cores, limits, memory, numerics, slo, specs, tuning
from advisor.core.contenders import Contender, judge_logprobs
from advisor.core.errors import NotRecorded
from advisor.core.estimate import half_width, ratio_of_windows
from advisor.core.outline import LeftOut, Outline
from advisor.core.recommend import FEWEST_DOF, unsure
from advisor.core.records import ACCIDENTS, EngineSettings, Manifest, Outcome, TrialSpec
from advisor.core.tried import Tried, candidate, first_key, key

# Another engine, or another setting, has to add this much to be worth it.
WORTH_IT = 1.03
# By so much two starts of one candidate may differ: where the GPU is busy, and where it waits (docs/measurement.md).
APART_BUSY, APART_WAITING, BUSY_IDLE_PCT = 1.01, 1.07, 1.0
# Where the protocol does not say how well a rate has to be known.
ENOUGH = 0.05
# Another doubling of the load has to add this much (`--concurrency auto`).
STILL_GROWS = 1.05
LOADS, LOADS_OF_ONE_START = (32, 64, 128, 256, 512, 1024, 2048, 4096), 512
# The first engine of a bare machine takes up to 120 s; one with another setting finds most of that done.
RIVAL_START_TIMEOUT_S = 180.0
# MPS plans with 48 clients at most; one engine is one client.
MPS_CLIENTS = 48


Story = Generator[TrialSpec, Tried, Outline]
Told = Generator[TrialSpec, Tried, Tried]
Chapter = Generator[TrialSpec, Tried, None]


class Search:
    """One profile's way through its candidates."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._protocol = manifest.protocol
        self._tuned = manifest.settings
        self._several_from = manifest.settings  # what the settings of several engines are made from
        self._shown_by = 2  # engines that showed whether that is to be the tuned ones
        self._single: Tried | None = None  # the tuned engine's first start at full load
        self._left_out: list[LeftOut] = []
        self._results: dict[str, Tried] = {}  # by trial
        self._finalists: list[Tried] = []  # first starts of the best several, with MPS and without
        self._runners_up: dict[str, Tried] = {}  # those that may be better, by the name of the finalist
        self._several_tried: list[Tried] = []  # first starts of several engines at full load
        self._tried: list[Tried] = []

    def story(self) -> Story:
        """default · tuning · 2 without MPS · tuned settings for 2? · 2, 3, 4 … under MPS · the winner's variants · one
        under MPS · second starts · more starts of what is known too roughly · the GPU alone, in this order.
        """
        default = yield from self._measured(self._spec(1, mps=False))
        self._single = default
        if self._protocol.tune:
            default = yield from self._tune(default)
        if self._manifest.question.concurrency_auto:
            yield from self._find_load()
            default = yield from self._measured(self._spec(1, mps=False, base=self._manifest.settings))
            self._single = yield from self._measured(self._spec(1, mps=False))
        yield from self._several(self._single)
        # What MPS itself costs: no verdict waits for it.
        yield from self._measured(self._spec(1, mps=True))
        yield from self._again(default)
        yield from self._until_sure()
        yield from self._on_the_gpu_alone()
        return self._outline()

    def _outline(self) -> Outline:
        return Outline(
            concurrency=self._concurrency,
            tuned=self._tuned,
            several=self._several_from,
            shown_by=self._shown_by,
            left_out=self._left_out,
        )

    @property
    def _concurrency(self) -> int:
        return self._manifest.question.workload.concurrency

    # -- chapters

    def _tune(self, default: Tried) -> Told:
        """The best single engine, one change at a time, each kept if it brings 3 %. Returns the default engine's last
        start.
        """
        best, last = default, default
        for number in range(tuning.RIVALS):
            if not best.ok or best.measurement is None:
                break
            seen = tuning.Seen(
                gpu_idle_pct=best.measurement.gpu_idle_pct,
                api_fullness=limits.api_fullness(best.raw),
                ttft_matters=any(name.startswith("ttft") for name in self._manifest.question.slo),
            )
            rival = tuning.rival(number, self._tuned, self._manifest.question.workload, seen)
            if rival is None:
                continue
            if why := rival.skipped or self._no_room(1, rival.settings):
                self._leave_out(1, False, None, "skipped", f"{rival.words}: {why}", base=rival.settings)
                continue
            result = yield from self._rival(rival)
            if last is default and self._protocol.confirm and self._is_better(result, best):
                # Two starts of one engine that waits for the CPU were up to 1.3 times apart (docs/measurement.md): a
                # setting has to beat both, or it is credited with the mood of the cores.
                last = yield from self._measured(msgspec.structs.replace(default.spec, repeat=default.spec.repeat + 1))
                if not last.ok:
                    break  # whether settings or cores make the difference cannot be told
                best = max(best, last, key=lambda one: one.rate)
            if self._is_better(result, best):
                best, self._tuned = result, rival.settings
        self._single = best
        return last

    def _rival(self, rival: tuning.Rival) -> Told:
        """A setting, tried once and with less patience: no verdict waits for one that does not start."""
        spec = self._spec(1, mps=False, base=rival.settings)
        patience_s = min(RIVAL_START_TIMEOUT_S, self._protocol.engine_start_timeout_s)
        protocol = msgspec.structs.replace(spec.protocol or self._protocol, engine_start_timeout_s=patience_s)
        return (yield from self._measured(msgspec.structs.replace(spec, protocol=protocol), again=False))

    def _is_better(self, one: Tried, best: Tried) -> bool:
        """3 % faster, by more than noise, and no further from the objectives; or the first to keep to them."""
        if one.measurement is None or best.measurement is None:
            return False
        objectives = self._manifest.question.slo
        if objectives:
            now, then = (slo.worst(seen.measurement, objectives)[0] for seen in (one, best) if seen.measurement)
            if now > max(1.0, then):
                return False
            if now <= 1.0 < then:
                return True
        sure = ratio_of_windows(one.measurement, best.measurement).low or 0.0
        return one.rate >= WORTH_IT * best.rate and sure > 1.0

    def _keeps(self, one: Tried) -> bool:
        return one.measurement is not None and slo.meets(one.measurement, self._manifest.question.slo)

    def _find_load(self) -> Chapter:
        """Double the load of the tuned engine until that brings under 5 %; loads of equal settings share one start."""
        asked, best = self._manifest, 0.0
        for load in LOADS:
            base = tuning.for_batch(self._tuned, load)
            # The memory for the largest of these loads, so that a larger one needs no other engine.
            roomy = specs.asking(asked, max(load, LOADS_OF_ONE_START))
            if specs.memory_plan(roomy, 1, base).kv_bytes is None:
                break
            spec = specs.load_spec(roomy, 1, mps=False, base=base)
            result = yield from self._measured(specs.at_load(spec, load))
            if not result.ok or result.rate < STILL_GROWS * best:
                break
            best, self._tuned, self._manifest = result.rate, base, specs.asking(asked, load)

    def _several(self, single: Tried) -> Chapter:
        """Several engines: without MPS, under MPS until another one adds too little, then the winner's variants."""
        if refusal := self._refusal(2):
            for mps in (False, True):
                self._leave_out(2, mps, None, *refusal)
            return
        rival = self._share(self._tuned, 2)
        tuned = self._protocol.tune and tuning.bare(rival) != tuning.bare(self._for(2)) and not self._no_room(2, rival)
        if tuned:
            yield from self._measured(self._spec(2, mps=False, base=rival))
            yield from self._tune_several(rival)
        else:
            yield from self._measured(self._spec(2, mps=False))
        winner = yield from self._grow(single)
        if winner is None:
            return
        engines = winner.spec.engines
        yield from self._measured(self._spec(engines, mps=False))
        if tuned:
            # What was chosen under MPS need not be the best without it, and that is what MPS is compared with.
            for base in (self._tuned, self._manifest.settings):
                share = self._share(base, engines)
                if not self._no_room(engines, share):
                    yield from self._measured(self._spec(engines, mps=False, base=share))
            if self._protocol.other_settings:
                winner = yield from self._with_other_settings(winner)
        if self._protocol.equal_budget and (shared := tuning.shared_budget(self._for(engines), engines)):
            yield from self._measured(self._spec(engines, mps=False, base=shared))
            divided = yield from self._measured(self._spec(engines, mps=True, base=shared))
            if divided.ok and divided.rate >= WORTH_IT * winner.rate:
                winner = divided
        yield from self._thread_percentages(winner)

    def _tune_several(self, rival: EngineSettings) -> Chapter:
        """What helps one engine need not help several, which share the same cores: keep it only if it helps two."""
        tuned = yield from self._measured(self._spec(2, mps=True, base=rival))
        plain = yield from self._measured(self._spec(2, mps=True))
        if tuned.ok and (not plain.ok or self._is_better(tuned, plain)):
            self._several_from = self._tuned

    def _with_other_settings(self, winner: Tried) -> Told:
        """Whether the winner does better with the settings that it does not have: tuned or default ones.

        What helps two engines need not help more of them, and which help two is seen within the noise of single starts:
        without this, profiles of one machine differ in settings that make no difference. Tuned settings that are first
        seen to help without MPS have to be tried under it as well.
        """
        engines, default = winner.spec.engines, self._manifest.settings
        plain, tuned = (self._share(base, engines) for base in (default, self._tuned))
        if engines == 2:  # seen just now
            return winner
        if self._several_from != default:
            if self._no_room(engines, plain):
                return winner
            result = yield from self._measured(self._spec(engines, mps=True, base=plain))
            if not result.ok or self._is_better(winner, result):
                return winner
            self._several_from, self._shown_by = default, engines
            return result
        without, usual = (self._results.get(key(self._spec(engines, mps=False, base=base))) for base in (tuned, plain))
        if without is None or usual is None or not self._is_better(without, usual):
            return winner
        result = yield from self._measured(self._spec(engines, mps=True, base=tuned))
        if not self._is_better(result, winner):
            return winner
        self._several_from = self._tuned
        return result

    def _grow(self, single: Tried) -> Generator[TrialSpec, Tried, Tried | None]:
        """2, 3, 4 … engines under MPS until another one adds too little, fails for lack of room, or cannot be placed.

        `single` is the best single engine, which the second one has to beat. One more is tried where noise may hide
        that another engine did add enough. Returns the simplest within 3 % of the best.
        """
        tried: list[Tried] = []
        best, failures, doubts, engines = single, 0, 0, 2
        while True:
            if refusal := self._refusal(engines):
                self._leave_out(engines, True, None, *refusal)
                return simplest_best(tried, self._manifest.settings)
            result = yield from self._measured(self._spec(engines, mps=True))
            tried.append(result)
            why = ""
            if result.outcome == "oom":
                why = f"{engines} engines already ran out of memory"
            elif not result.ok:
                # One failure may be an accident; the next count is still worth a look. Two in a row are a pattern.
                failures += 1
                why = f"{failures} trials in a row failed" if failures == 2 else ""
            else:
                failures = 0
                gained = result.rate / best.rate if best.rate else None
                if gained is not None and gained < WORTH_IT:
                    doubts += 1
                    if doubts == 2 or not self._may_have_gained(result, best):
                        change = f"{(gained - 1) * 100:+.1f} %"
                        why = f"a {_ordinal(engines)} engine changed throughput by {change}, less than +3 %"
                best = max(best, result, key=lambda one: one.rate)
            if why:
                self._leave_out(engines + 1, True, None, "skipped", why)
                return simplest_best(tried, self._manifest.settings)
            engines += 1

    def _may_have_gained(self, one: Tried, base: Tried) -> bool:
        """Whether noise may hide a gain of 3 %; runs without second starts took the figures as they were."""
        if self._protocol.starts < 2 or one.measurement is None or base.measurement is None:
            return False
        high = ratio_of_windows(one.measurement, base.measurement).high
        return high is None or high >= WORTH_IT

    def _thread_percentages(self, winner: Tried) -> Chapter:
        """Check the model's products at each percentage first; only what computes correctly becomes a candidate."""
        engines, base = winner.spec.engines, winner.spec.settings or self._for(winner.spec.engines)
        for percentage in (yield from self._right(engines, specs.percentages(self._manifest, engines), base)):
            restricted = yield from self._measured(self._spec(engines, mps=True, percentage=percentage, base=base))
            # What gives other log-probabilities is no candidate, and must not take the second start of one.
            if restricted.ok and not judge_logprobs([winner, restricted])[1].ok:
                self._several_tried.remove(restricted)

    def _right(
        self, engines: int, wanted: Sequence[int], base: EngineSettings
    ) -> Generator[TrialSpec, Tried, list[int]]:
        """Those of the percentages at which the model's own products are right; the others are left out."""
        if not wanted:
            return []
        if why := _cannot_check(self._manifest):
            for percentage in wanted:
                self._leave_out(engines, True, percentage, "skipped", why, base=base)
            return []
        checked = yield specs.numerics_spec(self._manifest, list(wanted), base)
        right = []
        for percentage in wanted:
            if not checked.ok or checked.raw.numerics is None:
                why = f"numerics check failed: {checked.why}"
                self._leave_out(engines, True, percentage, "skipped", why, base=base)
                continue
            verdict = numerics.judge_products(checked.raw.numerics, percentage, sms_total=self._manifest.gpu.sms)
            if not verdict.ok:
                # Without an error figure nothing was shown to be wrong, but nothing was shown to be right either.
                outcome: Outcome = "skipped" if verdict.worst_error is None else "wrong_results"
                self._leave_out(engines, True, percentage, outcome, verdict.why or "", verdict.worst_error, base=base)
                continue
            right.append(percentage)
        return right

    def _again(self, default: Tried) -> Chapter:
        """Second starts of what the verdict is made of, each with the loads of its curve; the default engine last, so
        that a drift of the machine shows between its first start and this one.
        """
        objectives = self._manifest.question.slo
        several: dict[str, Tried] = {}
        for mps in (False, True):
            family = [one for one in self._several_tried if one.spec.mps == mps]
            keeping = [one for one in family if one.measurement and slo.meets(one.measurement, objectives)]
            for found in (family, keeping):
                if best := simplest_best(found, self._manifest.settings):
                    several[candidate(best.spec)] = best
                    # Not of what MPS is compared with: the better one of two by what is quoted would be a lucky one.
                    if mps and self._protocol.runner_up and (other := runner_up(found, best)):
                        self._runners_up[candidate(best.spec)] = other
        self._finalists = list(several.values())
        single = self._single or default
        rivals = [one.rate for one in several.values() if not one.spec.mps]
        # Where several leave one engine behind without MPS, only its rate is of interest.
        near = bool(objectives) or single.rate * WORTH_IT >= max(rivals, default=0.0)
        for name, one in {candidate(single.spec): single, **several, candidate(default.spec): default}.items():
            if one.ok and name != candidate(default.spec):
                last = yield from self._once_more(one, curve_from=0.0 if name in several or near else math.inf)
                if (other := self._runners_up.get(name)) and candidate(other.spec) not in several:
                    # Its smaller loads are of interest if it is better this time, or where they may decide.
                    yield from self._once_more(other, curve_from=0.0 if objectives or not last.ok else last.rate)
        if default.ok:
            curve = near and candidate(single.spec) == candidate(default.spec)
            yield from self._once_more(default, curve_from=0.0 if curve else math.inf)

    def _until_sure(self) -> Chapter:
        """Where two candidates are known too roughly, start the rougher one again, as often as should make it known.

        How often is decided beforehand, as in two-stage sampling (Stein 1945): to look after every start, and to stop
        as soon as there is a verdict, would favour lucky starts.
        """
        left = self._protocol.more_starts - len(self._runners_up)
        while left > 0:
            found = unsure(self._manifest, self._tried, self._outline())
            planned = (self._planned(group) for group in found.groups)
            # A precision that cannot be reached is worth no start; a verdict is worth what there is.
            one, count = next((plan for plan in planned if plan[1] and (found.needed or plan[1] <= left)), (None, 0))
            if one is None:
                return
            last = one.attempts[-1]
            for _ in range(min(left, count)):
                again = msgspec.structs.replace(last.spec, repeat=last.spec.repeat + 1, protocol=self._protocol)
                try:
                    last = yield from self._measured(again, again=False)
                except NotRecorded:
                    return  # a run that was sure by an earlier estimate of what it measured
                left -= 1
                if not last.ok:
                    break

    def _planned(self, group: Sequence[Contender]) -> tuple[Contender | None, int]:
        """The roughest of these candidates and how many more starts should make it known; none where none starts."""
        wanted = self._protocol.gain_precision or ENOUGH
        starting = [one for one in group if one.attempts[-1].ok]  # what does not start again is not known better
        one = max(starting, key=lambda one: half_width(one.value) if one.value else 0.0, default=None)
        if one is None:
            return None, 0
        if one.estimate is None or one.estimate.between.dof < FEWEST_DOF:
            return one, 1  # first it has to be known how starts differ
        quoted, width = max(1, len(one.quoted)), half_width(one.value) if one.value else 2 * wanted
        return one, max(1, math.ceil(quoted * ((min(width, 1.0) / wanted) ** 2 - 1)))

    def _on_the_gpu_alone(self) -> Chapter:
        """Fixed steps of the tuned engine and of the best several: why they gain. No verdict waits for it."""
        if not self._protocol.gpu_alone or not self._finalists:
            return
        wanted = [self._spec(1, mps=False), *(self._better(one).spec for one in self._finalists)]
        # Not `yield from`: what is sent has no one to go to.
        for one in {key(spec): spec for spec in map(specs.steps_spec, wanted)}.values():  # noqa: UP028
            yield one

    def _better(self, finalist: Tried) -> Tried:
        """A finalist, or its runner-up if later starts say that this is the better one."""
        other = self._runners_up.get(candidate(finalist.spec))
        if other is None or self._later_rate(other) < WORTH_IT * self._later_rate(finalist):
            return finalist
        return other

    def _later_rate(self, one: Tried) -> float:
        later = [again.rate for again in self._starts_of(one) if again.ok and again.spec.repeat]
        return math.fsum(later) / len(later) if later else 0.0

    def _starts_of(self, one: Tried) -> list[Tried]:
        return [other for other in self._tried if first_key(other.spec) == first_key(one.spec)]

    def _once_more(self, one: Tried, *, curve_from: float) -> Told:
        """Further starts of a candidate; the last one of a finalist also at smaller loads, if it reaches that rate."""
        # It may have been started again before, when another load was looked for.
        last = max([one, *self._starts_of(one)], key=lambda other: other.spec.repeat)
        for _ in range(1, self._protocol.starts):
            spec = msgspec.structs.replace(last.spec, repeat=last.spec.repeat + 1, protocol=self._protocol)
            last = yield from self._measured(spec)
            if not last.ok:
                return last  # what does not start again is not advised, whatever its curve
        if last.rate < curve_from:
            return last
        points = {self._concurrency: last}
        for share in sorted(self._protocol.curve, reverse=True):
            yield from self._at_smaller(last, round(share * self._concurrency), points)
        # Where one load misses the objectives and the next smaller one keeps to them, look in between, twice.
        for _ in range(2 if self._manifest.question.slo else 0):
            keeping = [load for load, point in points.items() if self._keeps(point)]
            missing = [load for load, point in points.items() if load > max(keeping, default=0) and point.ok]
            if not keeping or not missing:
                break
            yield from self._at_smaller(last, (max(keeping) + min(missing)) // 2, points)
        return last

    def _at_smaller(self, last: Tried, load: int, points: dict[int, Tried]) -> Chapter:
        load = max(last.spec.engines, load)
        if load < self._concurrency and load not in points:
            points[load] = yield from self._measured(specs.at_load(last.spec, load, short=True))

    # -- trials

    def _measured(self, spec: TrialSpec, *, again: bool = True) -> Told:
        """One trial, and once more when it failed by what may have been an accident.

        An engine that was killed, a port that two engines chose, a disturbance that made the evidence worthless: the
        candidate is not to blame, and a verdict needs it. Too little memory is no accident.
        """
        if known := self._results.get(key(spec)):
            return known
        result = yield spec
        self._tried.append(result)
        if again and result.outcome in ACCIDENTS:
            result = yield msgspec.structs.replace(spec, repeat=spec.repeat + 1)
            self._tried.append(result)
            self._results[key(result.spec)] = result  # which a second start would ask for
        self._results[key(spec)] = result
        if spec.engines > 1 and not spec.repeat:
            self._several_tried.append(result)
        return result

    def _spec(
        self, engines: int, *, mps: bool, percentage: int | None = None, base: EngineSettings | None = None
    ) -> TrialSpec:
        told = base or self._for(engines)
        return specs.load_spec(self._manifest, engines, mps=mps, percentage=percentage, base=told)

    def _for(self, engines: int) -> EngineSettings:
        """The settings for this many engines: the tuned ones, or those that were found better for several."""
        return self._share(self._tuned if engines == 1 else self._several_from, engines)

    def _share(self, base: EngineSettings, engines: int) -> EngineSettings:
        """`base` for one engine's share of the load."""
        return tuning.for_share(base, self._manifest.settings, self._concurrency, engines)

    def _refusal(self, engines: int) -> tuple[Outcome, str] | None:
        """Why this many engines cannot even be tried, by computation; None when they can."""
        question = self._manifest.question
        if engines > question.max_engines:
            return "skipped", f"--max-engines is {question.max_engines}"
        if engines > MPS_CLIENTS:
            return "infeasible", f"MPS serves {MPS_CLIENTS} clients at most"
        if engines > self._concurrency:
            return "infeasible", f"{self._concurrency} requests in flight cannot load {engines} engines"
        if cores.plan(self._manifest.host.cores, engines) is None:
            return "infeasible", (
                f"{engines} engines need {2 * engines} physical cores beside the load generator's; "
                f"this machine has {len(self._manifest.host.cores)}"
            )
        if why := self._no_room(engines, self._for(engines)):
            return "infeasible", why
        return None

    def _no_room(self, engines: int, base: EngineSettings) -> str:
        """Why engines with these settings do not fit the GPU's memory; empty when they do."""
        planned = specs.memory_plan(self._manifest, engines, base)
        return memory.explain(planned) if planned.kv_bytes is None else ""

    def _leave_out(
        self,
        engines: int,
        mps: bool,
        percentage: int | None,
        outcome: Outcome,
        why: str,
        error: float | None = None,
        base: EngineSettings | None = None,
    ) -> None:
        self._left_out.append(
            LeftOut(
                engines=engines,
                mps=mps,
                thread_percentage=percentage,
                outcome=outcome,
                why=why,
                worst_product_error=error,
                settings=base,
            )
        )


def runner_up(tried: Sequence[Tried], best: Tried) -> Tried | None:
    """The fastest other one, if single starts may hide that it is 3 % faster than `best`; None where none may be.

    What keeps the GPU busy repeats to 1 %; starts of what leaves it waiting were up to 10 % apart.
    """

    def busy(one: Tried) -> bool:
        idle = one.measurement.gpu_idle_pct if one.measurement else None
        return idle is not None and idle <= BUSY_IDLE_PCT

    def may(one: Tried) -> bool:
        apart = APART_BUSY if busy(one) and busy(best) else APART_WAITING
        return one.rate * apart >= WORTH_IT * best.rate

    return max(
        (one for one in tried if one.ok and one is not best and may(one)), key=lambda one: one.rate, default=None
    )


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


def _cannot_check(manifest: Manifest) -> str:
    """Why no percentage of this model can be shown to compute correctly; empty when it can."""
    if manifest.model.quantization is not None:
        return "the numerics check covers unquantised products only"
    if manifest.settings.load_format == "dummy":
        return "vLLM's own dummy weights depend on the number of SMs, so restricted engines cannot be compared"
    return ""


def simplest_best(tried: Sequence[Tried], default: EngineSettings) -> Tried | None:
    """The simplest within 3 % of the best of these; None when none is ok.

    Simpler are fewer engines, then no thread percentage, then fewer changes of the `default` settings.
    """
    ok = [one for one in tried if one.ok]
    if not ok:
        return None
    best = max(one.rate for one in ok)

    def complexity(one: Tried) -> tuple[int, bool, int]:
        changes = tuning.words(one.spec.settings, default) if one.spec.settings else []
        return one.spec.engines, one.spec.thread_percentage is not None, len(changes)

    return min((one for one in ok if one.rate * WORTH_IT >= best), key=complexity)
