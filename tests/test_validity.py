"""Which trials may count, and what a reader must know about those that do."""

import math
from typing import get_args

import msgspec
import pytest
import raw
from hypothesis import given, settings
from hypothesis import strategies as st
from raw import changed

from advisor.core.cautions import REMEDIES, caution, cautions, teardown_cautions
from advisor.core.measure import measure
from advisor.core.records import FULL, CautionCode, CoreSpeed, MpsEvidence, Protocol, Stranger, Workload
from advisor.core.validity import judge

TRIAL = raw.trial()
ALONE = raw.trial(2, mps=False)
PREFILL = raw.trial(workload=Workload(kind="prefill", isl=1024, osl=128, concurrency=256), rate=60.0)
DECODE = raw.trial(workload=Workload(kind="decode", isl=1024, osl=128, concurrency=256))
CORES = [raw.engine_core_pid(0), raw.engine_core_pid(1)]
STRANGER = 4242


def codes(trial):
    return {fault.code for fault in judge(trial)}


def text(trial, code):
    (fault,) = [fault for fault in judge(trial) if fault.code == code]
    return fault.text


def caution_codes(trial):
    assert judge(trial) == []
    return {caution.code for caution in cautions(trial, measure(trial))}


@pytest.mark.parametrize(
    "trial",
    [
        TRIAL,
        ALONE,
        PREFILL,
        DECODE,
        raw.trial(1, mps=False, rate=9000.0),
        raw.trial(1, mps=True),
        raw.trial(4, rate=30000.0),
        raw.trial(3, rate=25000.0, workload=Workload(kind="serve", isl=128, osl=64, concurrency=100)),
        raw.shifted(TRIAL, 1000.0),
        raw.numerics_trial(),
    ],
    ids=["two", "no-mps", "prefill", "decode", "one", "one-mps", "four", "three", "later", "numerics"],
)
def test_a_good_trial_has_no_faults_and_no_cautions(trial):
    assert judge(trial) == []
    if trial.spec.kind == "load":
        assert cautions(trial, measure(trial)) == []


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.booleans(), st.floats(1000, 90000), st.floats(0, 0.05), st.integers(0, 1000))
def test_any_well_run_trial_may_count(engines, mps, rate, noise, seed):
    assert judge(raw.trial(engines, mps, rate, noise, seed)) == []


# ---------------------------------------------------------------- endings


@pytest.mark.parametrize("ended", ["oom", "crash", "timeout", "not_attached", "refused"])
def test_a_trial_that_did_not_complete_says_what_happened_and_nothing_else(ended):
    (fault,) = judge(raw.failed(ended, "engine 1 said why"))
    assert (fault.code, fault.text) == (ended, "engine 1 said why")


def test_an_ending_without_a_reason_still_has_a_text():
    assert "timeout" in text(raw.failed("timeout", ""), "timeout")


def test_a_completed_trial_without_a_window_or_results_is_refused():
    assert codes(raw.trial(window=None)) == {"no_window"}
    assert codes(raw.numerics_trial(numerics=None)) == {"no_evidence"}


# ---------------------------------------------------------------- MPS


@pytest.mark.parametrize("when", ["clients_start", "clients_end"])
def test_an_engine_that_is_not_attached_is_named(when):
    trial = changed(TRIAL, f"mps.{when}", CORES[:1])
    assert codes(trial) == {"not_attached"}
    assert str(CORES[1]) in text(trial, "not_attached")
    assert str(CORES[0]) not in text(trial, "not_attached")


@pytest.mark.parametrize("when", ["clients_start", "clients_end"])
def test_a_client_too_many_is_named(when):
    trial = changed(TRIAL, f"mps.{when}", [*CORES, STRANGER])
    assert codes(trial) == {"foreign_client"}
    assert str(STRANGER) in text(trial, "foreign_client")


def test_a_client_in_the_place_of_an_engine_is_both():
    assert codes(changed(TRIAL, "mps.clients_start", [CORES[0], STRANGER])) == {"not_attached", "foreign_client"}


def test_mps_without_a_daemon_is_refused():
    assert codes(changed(TRIAL, "mps.daemon", False)) == {"no_daemon"}


@pytest.mark.parametrize(
    ("path", "servers"),
    [("mps.servers_end", [901]), ("mps.servers_end", []), ("mps.servers_start", []), ("mps.servers_start", [900, 901])],
)
def test_a_server_that_was_replaced_missing_or_not_alone_is_refused(path, servers):
    assert codes(changed(TRIAL, path, servers)) == {"server_changed"}


def test_two_servers_throughout_are_refused():
    trial = changed(changed(TRIAL, "mps.servers_start", [900, 901]), "mps.servers_end", [900, 901])
    assert codes(trial) == {"server_changed"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("daemon", True),
        ("servers_start", [900]),
        ("servers_end", [900]),
        ("clients_start", CORES[:1]),
        ("clients_end", [STRANGER]),
    ],
)
def test_mps_where_none_was_asked_for_is_refused(field, value):
    assert codes(changed(ALONE, f"mps.{field}", value)) == {"mps_present"}


@pytest.mark.parametrize("trial", [TRIAL, ALONE])
def test_a_trial_that_does_not_say_who_was_attached_proves_nothing(trial):
    assert codes(changed(trial, "mps", None)) == {"no_evidence"}


def test_an_idle_daemons_evidence_does_not_pass_for_an_mps_trial():
    nobody = MpsEvidence(daemon=True, servers_start=[], servers_end=[], clients_start=[], clients_end=[])
    assert codes(changed(TRIAL, "mps", nobody)) == {"server_changed", "not_attached"}


def test_another_process_on_the_gpu_is_refused():
    assert str(STRANGER) in text(changed(TRIAL, "foreign_pids", [STRANGER]), "foreign_process")


# ---------------------------------------------------------------- engines


def test_an_engine_core_that_was_not_found_is_refused():
    assert codes(changed(ALONE, "engines.1.engine_core_pid", None)) == {"missing_engine"}
    assert "engine 1" in text(changed(ALONE, "engines.1.engine_core_pid", None), "missing_engine")


def test_two_engines_with_one_core_process_are_refused():
    assert codes(changed(ALONE, "engines.1.engine_core_pid", CORES[0])) == {"missing_engine"}


def test_an_engine_too_few_is_refused():
    assert "missing_engine" in codes(changed(ALONE, "engines", lambda engines: engines[:1]))


@pytest.mark.parametrize("died_s", [30.0, 70.0, 76.5])
def test_an_engine_that_died_before_teardown_is_refused(died_s):
    trial = changed(changed(TRIAL, "engines.0.died_s", died_s), "engines.0.exit_code", -9)
    assert codes(trial) == {"engine_died"}
    assert "engine 0" in text(trial, "engine_died")
    assert "-9" in text(trial, "engine_died")


@pytest.mark.parametrize("exit_code", [0, -15, 143, None])
def test_how_an_engine_ends_at_teardown_does_not_matter(exit_code):
    assert codes(changed(TRIAL, "engines.0.exit_code", exit_code)) == set()
    assert codes(changed(TRIAL, "engines.0.died_s", TRIAL.timeline[-1].start_s + 1.0)) == set()


def test_a_death_after_the_window_counts_as_teardown_when_no_stage_says_otherwise():
    trial = changed(TRIAL, "timeline", [])
    assert codes(changed(trial, "engines.0.died_s", TRIAL.window[1] + 0.5)) == set()
    assert codes(changed(trial, "engines.0.died_s", TRIAL.window[1] - 0.5)) == {"engine_died"}


def test_engines_with_unequal_kv_caches_are_refused():
    trial = changed(TRIAL, "engines.1.kv_cache_tokens", lambda tokens: tokens - 16)
    assert codes(trial) == {"unequal_kv"}
    assert str(TRIAL.engines[0].kv_cache_tokens) in text(trial, "unequal_kv")


def test_an_unknown_kv_cache_is_refused():
    assert codes(changed(TRIAL, "engines.0.kv_cache_tokens", None)) == {"kv_unknown"}


@pytest.mark.parametrize("name", [*TRIAL.engines[0].resolved])
def test_a_setting_that_vllm_resolved_otherwise_is_refused(name):
    asked = TRIAL.engines[0].resolved[name]
    other = {"True": "False", "False": "True"}.get(asked, "4096")
    trial = changed(TRIAL, f"engines.0.resolved.{name}", other)
    assert codes(trial) == {"settings_differ"}
    assert name in text(trial, "settings_differ")
    assert other in text(trial, "settings_differ")


def test_a_setting_that_vllm_does_not_tell_and_one_that_we_did_not_ask_are_not_compared():
    told = TRIAL.engines[0].resolved
    assert codes(changed(TRIAL, "engines.0.resolved", {})) == set()
    assert codes(changed(TRIAL, "engines.0.resolved", {**told, "swap_space": "4"})) == set()
    assert codes(changed(TRIAL, "engines.0.resolved", {**told, "enable_prefix_caching": "false"})) == set()


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize("field", ["prompt_tokens_min", "prompt_tokens_max"])
@pytest.mark.parametrize("tokens", [1023, 1025, None])
def test_prompts_of_another_length_are_refused(field, tokens):
    assert codes(changed(TRIAL, f"loads.1.{field}", tokens)) == {"prompt_length"}


MIXED = raw.trial(
    workload=Workload(kind="serve", isl=1152, osl=128, concurrency=256, isl_range=(256, 2048), osl_range=(64, 192))
)


def test_prompts_of_mixed_lengths_may_be_any_of_the_range_and_no_other():
    assert judge(MIXED) == []
    assert codes(changed(changed(MIXED, "loads.0.prompt_tokens_min", 300), "loads.0.prompt_tokens_max", 2000)) == set()
    for field, tokens in (("min", 255), ("max", 2049), ("min", None), ("max", None)):
        broken = changed(MIXED, f"loads.1.prompt_tokens_{field}", tokens)
        assert codes(broken) == {"prompt_length"}
        assert "prompts should hold 256 to 2048 tokens" in text(broken, "prompt_length")
    prefill = Workload(kind="prefill", isl=1024, osl=1, concurrency=256, isl_range=(24, 2024))
    assert judge(raw.trial(workload=prefill, rate=60.0)) == []


def test_a_decode_wave_that_was_cut_off_need_not_know_its_prompt_lengths():
    unknown = changed(changed(DECODE, "loads.0.prompt_tokens_min", None), "loads.0.prompt_tokens_max", None)
    assert codes(unknown) == set()
    assert codes(changed(unknown, "loads.0.completed", 3)) == {"prompt_length"}


def test_failed_requests_are_refused_and_their_error_quoted():
    trial = changed(changed(TRIAL, "loads.0.failed", 5), "loads.0.errors", ["HTTP 500: overloaded"])
    assert codes(trial) == {"failed_requests"}
    assert "HTTP 500: overloaded" in text(trial, "failed_requests")


@pytest.mark.parametrize(
    ("sent", "failed", "refused"), [(999, 1, True), (1000, 1, False), (1999, 2, True), (2000, 2, False)]
)
def test_one_failure_in_a_thousand_is_let_pass(sent, failed, refused):
    trial = raw.trial(1, mps=False)
    trial = changed(changed(trial, "loads.0.sent", sent), "loads.0.failed", failed)
    assert ("failed_requests" in codes(trial)) is refused


def test_a_missing_or_doubled_load_is_refused():
    assert codes(changed(TRIAL, "loads", lambda loads: loads[:1])) == {"no_evidence"}
    assert codes(changed(TRIAL, "loads.1.engine", 0)) == {"no_evidence"}


# ---------------------------------------------------------------- the window


def cut(trial, bins):
    """Load 0 without the bins outside `bins`."""
    for field in ("tokens", "first_tokens", "completions"):
        trial = changed(trial, f"loads.0.{field}", lambda values: values[bins])
    return changed(trial, "loads.0.bins_start_s", lambda start: start + (bins.start or 0) * 0.1)


@pytest.mark.parametrize("bins", [slice(45, None), slice(None, 155)])
def test_bins_that_do_not_cover_the_window_are_refused(bins):
    assert "bins_short" in codes(cut(TRIAL, bins))


def test_bins_that_end_with_the_window_suffice():
    assert codes(cut(TRIAL, slice(None, 160))) == set()


def test_a_window_of_too_few_turnovers_is_refused():
    start, _ = TRIAL.window
    trial = changed(TRIAL, "window", (start, start + 2.9 * 256 * 128 / 20000))
    assert codes(trial) == {"short_window"}
    assert "3 are needed" in text(trial, "short_window")


def test_a_warm_up_of_too_few_turnovers_is_refused():
    first = raw.READY_S
    assert codes(changed(TRIAL, "window", (first + 3.1, TRIAL.window[1]))) == {"short_warmup"}
    assert codes(changed(TRIAL, "window", (first + 3.5, TRIAL.window[1]))) == set()


def test_the_protocol_says_how_many_turnovers_are_needed():
    assert codes(changed(TRIAL, "spec.protocol.measure_turnovers", 8.0)) == {"short_window"}
    assert codes(changed(TRIAL, "spec.protocol.warmup_turnovers", 3.0)) == {"short_warmup"}
    assert codes(changed(DECODE, "spec.protocol.measure_turnovers", 80.0)) == set()


def test_prefill_turnovers_are_counted_in_requests():
    assert codes(changed(PREFILL, "window", (PREFILL.window[0], PREFILL.window[0] + 12.0))) == {"short_window"}


def paced(trial, pace, low_s=0.0, high_s=math.inf):
    """`trial` with `pace` times the tokens in every bin that starts in [low_s, high_s) of its window."""
    start = trial.window[0]

    def tokens_in(_, left_s, right_s, tokens):
        return tokens * pace if low_s <= (left_s + right_s) / 2 - start < high_s else tokens

    return raw.reshaped(trial, tokens_in)


def test_steady_decode_with_a_block_without_a_token_is_refused():
    assert codes(paced(DECODE, 0.0, 1.1, 2.6)) == {"stalled"}
    assert codes(paced(DECODE, 0.0, 1.4, 2.3)) == set()


@pytest.mark.parametrize(("pace", "refused"), [(0.5, True), (0.83, True), (0.9, False), (1.1, False), (1.2, True)])
@pytest.mark.parametrize("protocol", [raw.PROTOCOL, Protocol()])
def test_a_level_shift_in_the_middle_of_the_window_is_no_steady_state(pace, refused, protocol):
    trial = raw.trial(protocol=protocol, noise=0.0)
    shifted = paced(trial, pace, (trial.window[1] - trial.window[0]) / 2)
    assert codes(shifted) == ({"unsteady"} if refused else set())
    assert not refused or ("by +" if pace > 1 else "by -") in text(shifted, "unsteady")


def test_the_protocol_says_how_steady_a_window_has_to_be():
    middle = (TRIAL.window[1] - TRIAL.window[0]) / 2
    lenient = changed(paced(TRIAL, 0.8, middle), "spec.protocol.unsteady_log", FULL.unsteady_log)
    assert (codes(paced(TRIAL, 0.8, middle)), codes(lenient)) == ({"unsteady"}, set())
    assert codes(changed(paced(TRIAL, 0.5, middle), "spec.protocol.unsteady_log", FULL.unsteady_log)) == {"unsteady"}


@pytest.mark.parametrize(("low_s", "high_s"), [(0.0, 4.0), (2.0, 6.0), (8.0, 12.0)])
def test_a_stall_at_the_windows_ends_or_in_one_of_its_halves_is_no_steady_state(low_s, high_s):
    assert codes(paced(TRIAL, 0.0, low_s, high_s)) == {"unsteady"}


def test_a_stall_that_no_block_holds_is_told_by_the_whole_windows_rate():
    told = text(paced(TRIAL, 0.0, 8.0, 12.0), "unsteady")
    assert "over whole turnovers" in told
    assert f"{20000 * 8 / 12:.0f}"[:2] in told


@settings(max_examples=30, deadline=None)
@given(st.floats(min_value=0.0, max_value=raw.SWING_S))
def test_a_swing_of_one_turnovers_period_is_steady(phase_s):
    assert judge(raw.swinging(phase_s)) == []


def test_a_swing_that_is_longer_than_the_window_is_not_steady():
    slow = raw.trial(protocol=Protocol(), noise=0.0)
    length_s = slow.window[1] - slow.window[0]

    def swing(_, left_s, __, tokens):
        return tokens * (1 + 0.3 * math.sin((left_s - slow.window[0]) / length_s * math.tau))

    assert codes(raw.reshaped(slow, swing)) == {"unsteady"}


def test_decode_in_which_a_request_starts_late_is_refused():
    late = changed(DECODE, "loads.0.first_tokens.0", lambda n: n - 1)
    late = changed(late, "loads.0.first_tokens.50", 1)
    assert codes(late) == {"not_steady"}
    assert "255 of 256" in text(late, "not_steady")


def test_decode_in_which_a_request_ends_early_is_refused():
    last = math.floor((DECODE.window[1] - raw.READY_S) / 0.1)
    assert codes(changed(DECODE, f"loads.1.completions.{last - 1}", 1)) == {"not_steady"}
    assert codes(changed(DECODE, f"loads.1.completions.{last + 1}", 1)) == set()


# ---------------------------------------------------------------- client against server


def test_prefix_cache_hits_are_refused():
    prompts = TRIAL.engines[0].counters_end.prompt_tokens - TRIAL.engines[0].counters_start.prompt_tokens
    assert codes(changed(TRIAL, "engines.0.counters_end.prefix_cache_hits", 0.006 * prompts)) == {"prefix_hits"}
    assert codes(changed(TRIAL, "engines.0.counters_end.prefix_cache_hits", 0.004 * prompts)) == set()


def test_hits_are_counted_between_the_counters_and_do_not_matter_in_decode():
    trial = changed(TRIAL, "engines.0.counters_start.prefix_cache_hits", 5000.0)
    assert codes(changed(trial, "engines.0.counters_end.prefix_cache_hits", 5000.0)) == set()
    assert codes(changed(DECODE, "engines.0.counters_end.prefix_cache_hits", 1e6)) == set()


@pytest.mark.parametrize(("factor", "refused"), [(0.9, True), (0.97, False), (1.03, False), (1.1, True)])
def test_client_and_server_must_count_the_same_tokens(factor, refused):
    before = TRIAL.engines[1].counters_start.generation_tokens
    path = "engines.1.counters_end.generation_tokens"
    trial = changed(TRIAL, path, lambda after: before + (after - before) * factor)
    assert ("tokens_disagree" in codes(trial)) is refused


def test_counters_need_not_be_read_at_the_windows_edges():
    trial = TRIAL
    for end, by_s in (("counters_start", -1.0), ("counters_end", 5.0)):
        # 10000 tokens/s for each engine: what was counted moves along with the moment.
        trial = changed(trial, f"engines.0.{end}.at_s", lambda at, by_s=by_s: at + by_s)
        trial = changed(trial, f"engines.0.{end}.generation_tokens", lambda n, by_s=by_s: n + 10000 * by_s)
    assert codes(trial) == set()


@pytest.mark.parametrize("end", ["counters_start", "counters_end"])
def test_an_engine_without_its_own_counters_proves_nothing(end):
    assert codes(changed(TRIAL, f"engines.0.{end}", None)) == {"no_evidence"}


def test_counters_from_before_the_load_prove_nothing():
    trial = changed(TRIAL, "engines.0.counters_start.at_s", 1.0)
    assert codes(changed(trial, "engines.0.counters_end.at_s", 2.0)) == {"no_evidence"}


# ---------------------------------------------------------------- the load generator


def test_a_load_generator_that_fills_its_core_is_the_limit():
    assert codes(raw.trial(load_core_share=0.91)) == {"load_bound"}
    assert codes(raw.trial(load_core_share=0.89)) == set()


def test_a_load_generator_that_is_nearly_full_is_a_caution():
    assert caution_codes(raw.trial(load_core_share=0.75)) == {"load_busy"}
    assert caution_codes(raw.trial(load_core_share=0.65)) == set()


# ---------------------------------------------------------------- damage

NUMBERS = [
    "loads.0.tokens.70",
    "loads.0.first_tokens.70",
    "loads.1.sent",
    "loads.1.ttft.floor_s",
    "engines.0.counters_end.generation_tokens",
    "engines.0.counters_start.preemptions",
    "engines.1.kv_cache_tokens",
    "gpu.power_w.300",
    "gpu.sm_active_pct.5",
    "gpu.energy_end_j",
    "cpu.2.cpu_s",
    "steal_s",
    "window.1",
    "timeline.0.end_s",
    "teardown.seconds",
]


@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0])
def test_a_number_that_cannot_be_is_damage_and_is_named(path, number):
    trial = changed(TRIAL, path, number)
    assert codes(trial) == {"damaged"}
    assert path.split(".")[0] in text(trial, "damaged")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("window", (76.0, 64.0)),
        ("window", (64.0, 64.0)),
        ("loads.0.bin_s", 0.0),
        ("loads.0.tokens", [1.0]),
        ("loads.0.itl.ratio", 1.0),
        ("loads.0.itl.ratio", 1.05),
        ("gpu.power_w", [400.0]),
        ("gpu.dram_active_pct", []),
        ("engines.0.counters_end.generation_tokens", 0.0),
        ("engines.0.counters_end.at_s", 1.0),
        ("engines.0.prompt_logprobs.0.0", math.nan),
        ("spec.workload", None),
        ("spec.protocol", None),
    ],
)
def test_evidence_that_contradicts_itself_is_damage(path, value):
    assert codes(changed(TRIAL, path, value)) == {"damaged"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("cpu.2.waited_s", math.nan),
        ("strangers", [Stranger(pid=7, name="x", cpu_s=-1.0, core=0)]),
        ("core_speeds", [CoreSpeed(core=0, seconds=math.inf)]),
        ("engines.0.counters_end.steps_by_tokens", {"512": math.nan}),
        ("engines.0.counters_start.steps_by_tokens", {"512": 5.0}),
    ],
)
def test_damage_in_what_is_known_of_cores_and_steps_is_damage_too(path, value):
    assert codes(changed(TRIAL, path, value)) == {"damaged"}


def test_negative_log_probabilities_and_signals_are_no_damage():
    assert codes(changed(changed(TRIAL, "engines.0.exit_code", -15), "engines.0.prompt_logprobs", [[-9.5]])) == set()


# ---------------------------------------------------------------- cautions


@pytest.mark.parametrize("bit", [0x8, 0x20, 0x40, 0x80])
def test_throttling_inside_the_window_is_a_caution(bit):
    inside = round((TRIAL.window[0] + 2) / 0.2)
    assert caution_codes(changed(TRIAL, f"gpu.throttle_reasons.{inside}", bit | 0x1)) == {"throttled"}
    assert caution_codes(changed(TRIAL, "gpu.throttle_reasons.10", bit)) == set()


def test_the_power_limit_is_a_milder_caution():
    inside = round((TRIAL.window[0] + 2) / 0.2)
    assert caution_codes(changed(TRIAL, f"gpu.throttle_reasons.{inside}", 0x4)) == {"power_capped"}
    assert caution_codes(changed(TRIAL, f"gpu.throttle_reasons.{inside}", 0x1)) == set()


def test_stolen_time_is_a_caution_above_one_percent_of_the_cores_used():
    cores, window_s = 8, TRIAL.window[1] - TRIAL.window[0]
    assert caution_codes(changed(TRIAL, "steal_s", 0.011 * cores * window_s)) == {"steal"}
    assert caution_codes(changed(TRIAL, "steal_s", 0.009 * cores * window_s)) == set()
    assert caution_codes(changed(TRIAL, "steal_s", None)) == set()


def test_preemptions_inside_the_window_are_a_caution():
    assert caution_codes(changed(TRIAL, "engines.1.counters_end.preemptions", 3.0)) == {"preemptions"}
    earlier = changed(TRIAL, "engines.1.counters_start.preemptions", 3.0)
    assert caution_codes(changed(earlier, "engines.1.counters_end.preemptions", 3.0)) == set()


def test_chunks_that_hold_several_tokens_are_a_caution():
    behind = changed(TRIAL, "loads.0.chunks", lambda chunks: int(chunks * 0.85))
    assert caution_codes(behind) == {"coalesced"}
    assert caution_codes(changed(TRIAL, "loads.0.chunks", lambda chunks: int(chunks * 0.98))) == set()
    # What was asked for is not lateness.
    assert caution_codes(changed(behind, "spec.settings.stream_interval", 8)) == set()


def test_an_engine_far_below_its_fair_share_is_a_caution():
    def slowed(by):
        trial = changed(raw.trial(rate=30000.0), "loads.1.tokens", lambda tokens: [n * by for n in tokens])
        for end in ("counters_start", "counters_end"):
            trial = changed(trial, f"engines.1.{end}.generation_tokens", lambda n: n * by)
        return trial

    assert caution_codes(slowed(0.5)) == {"unequal_engines"}
    (caution,) = cautions(slowed(0.5), measure(slowed(0.5)))
    assert "Engine 1 gave 67 % of its fair share of the output tokens" in caution.text
    assert caution_codes(slowed(0.8)) == set()


def test_a_fair_share_is_one_of_output_tokens_whatever_the_remainder_of_the_requests():
    four = Workload(kind="serve", isl=128, osl=128, concurrency=4)
    level = raw.reshaped(raw.trial(3, rate=2000.0, workload=four), lambda load, low_s, high_s, _: 66.0)
    assert caution_codes(level) == set()


def test_a_decode_wave_is_fair_by_the_requests_that_an_engine_was_dealt():
    three = Workload(kind="decode", isl=1024, osl=128, concurrency=3)
    wave = raw.trial(2, rate=300.0, workload=three)
    assert caution_codes(wave) == set()  # two requests against one
    # Engines of equal output then: two requests had no more than one.
    each = sum(sum(load.tokens) for load in wave.loads) / len(wave.loads[0].tokens) / 2
    assert caution_codes(raw.reshaped(wave, lambda *_: each)) == set()  # 75 % of its share
    assert caution_codes(raw.reshaped(wave, lambda load, *_: each * (0.8 if load.engine == 0 else 1.2))) == {
        "unequal_engines"
    }


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        ("teardown.left_pids", [77], "processes_left"),
        ("teardown.daemon_left", True, "processes_left"),
        ("teardown.memory_after_bytes", 600 * 2**20, "memory_left"),
    ],
)
def test_what_is_left_behind_is_a_caution(path, value, code):
    assert caution_codes(changed(TRIAL, path, value)) == {code}


def test_a_trial_without_a_teardown_is_a_caution_unless_another_one_of_its_start_has_it():
    def codes(started, proven):
        trial = msgspec.structs.replace(TRIAL, teardown=None, started=started)
        return [caution.code for caution in teardown_cautions(trial, proven)]

    assert codes(None, {"monday"}) == ["teardown_unproven"]
    assert codes("monday", {"tuesday"}) == ["teardown_unproven"]
    assert codes("monday", {"monday", "tuesday"}) == []
    assert list(teardown_cautions(TRIAL, set())) == []


def test_a_little_memory_more_or_an_unknown_amount_is_no_caution():
    assert caution_codes(changed(TRIAL, "teardown.memory_after_bytes", 500 * 2**20)) == set()
    assert caution_codes(changed(TRIAL, "teardown.memory_after_bytes", None)) == set()


def test_every_code_has_its_remedy():
    assert set(REMEDIES) == set(get_args(CautionCode))
    assert all(caution(code, "Text.").remedy == remedy for code, remedy in REMEDIES.items())


def test_every_caution_says_what_to_do():
    trial = msgspec.structs.replace(TRIAL, teardown=None, steal_s=100.0)
    trial = changed(trial, "gpu.throttle_reasons", lambda reasons: [0xEC] * len(reasons))
    found = [*cautions(trial, measure(trial)), *teardown_cautions(trial, set())]
    assert len(found) == 4
    assert all(caution.text.endswith(".") and caution.remedy.endswith(".") for caution in found)
