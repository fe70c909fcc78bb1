"""The screen: whole at 80 columns, the same through a pipe, and every figure on it."""

from __future__ import annotations

import io
import re
import shlex

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console

from advisor.core.records import (
    Candidate,
    Caution,
    EngineSettings,
    GpuFacts,
    HostFacts,
    ModelFacts,
    Percentiles,
    Protocol,
    Question,
    Recommendation,
    Report,
    Software,
    Stage,
    Value,
    Workload,
)
from advisor.report.terminal import render

SETTINGS = EngineSettings(
    max_num_batched_tokens=8192,
    max_num_seqs=1024,
    max_cudagraph_capture_size=512,
    enable_prefix_caching=True,
    async_scheduling=True,
    kv_cache_memory_bytes=4 * 1024**3,
    max_model_len=32768,
    gpu_memory_utilization=0.05,
    dtype="bfloat16",
    quantization=None,
    kv_cache_dtype="auto",
    load_format="auto",
)
SERVE = (
    "vllm serve acme/tiny-0.5B --port {port} --max-num-batched-tokens 8192 --max-num-seqs 1024 "
    "--kv-cache-memory-bytes 4294967296 --compilation-config '{{\"max_cudagraph_capture_size\": 512}}'"
)


def value(middle, spread=0.02):
    return Value(value=middle, low=middle * (1 - spread), high=middle * (1 + spread))


def measured(engines, mps, rate, **more):
    return Candidate(
        **{
            "engines": engines,
            "mps": mps,
            "thread_percentages": None,
            "sms_each": 132,
            "settings": SETTINGS,
            "outcome": "ok",
            "source": "measured",
            "throughput_tok_per_s": value(rate),
            "requests_per_s": rate / 128,
            "ttft_ms": Percentiles(p50=31.0, p95=52.0, p99=88.0),
            "itl_ms": Percentiles(p50=9.0, p95=17.0, p99=21.0),
            "e2e_ms": Percentiles(p50=900.0, p95=1900.0, p99=2500.0),
            "gain_vs_default": value(rate / 9100.4),
            "gain_vs_best_without_mps": value(rate / 18900.0),
            "sm_active_pct": 59.3,
            "gpu_idle_pct": 34.2,
            "tokens_per_joule": 41.0,
            **more,
        }
    )


def failed(engines, outcome, why, **more):
    return Candidate(
        **{
            "engines": engines,
            "mps": True,
            "thread_percentages": None,
            "sms_each": None,
            "settings": None,
            "outcome": outcome,
            "source": None,
            "why_not": why,
            **more,
        }
    )


def advice(**more):
    return Recommendation(
        **{
            "status": "recommend",
            "engines": 4,
            "mps": True,
            "settings": SETTINGS,
            "gain_vs_default": value(3.27),
            "gain_vs_best_without_mps": value(1.57),
            "sentence": "Run 4 engines under MPS, no thread percentage: 3.27× one engine (3.1 to 3.4), "
            "1.57× without MPS.",
            "because": ["4 engines under MPS: 29,776 tokens/s; the best without MPS is 2 engines with 18,900."],
            "cost_of_mps": ["Shared fate: when the MPS server dies, every engine on this GPU dies with it."],
            "environment": {"CUDA_MPS_PIPE_DIRECTORY": "/tmp/mps/pipe", "CUDA_MPS_LOG_DIRECTORY": "/tmp/mps/log"},
            "commands": [
                "CUDA_MPS_PIPE_DIRECTORY=/tmp/mps/pipe CUDA_MPS_LOG_DIRECTORY=/tmp/mps/log nvidia-cuda-mps-control -d",
                *(SERVE.format(port=port) for port in range(8000, 8004)),
            ],
            **more,
        }
    )


def report(**more):
    """A report with one candidate of every kind. Its figures are invented."""
    workload = Workload(kind="serve", isl=1024, osl=128, concurrency=256)
    return Report(
        **{
            "schema_version": 1,
            "created": "2026-01-02T03:04:05Z",
            "replayed": False,
            "model": ModelFacts(
                name="acme/tiny-0.5B",
                architecture="Qwen2ForCausalLM",
                hidden_size=896,
                intermediate_size=4864,
                layers=24,
                heads=14,
                kv_heads=2,
                head_dim=64,
                vocab_size=151936,
                tied_embeddings=True,
                qkv_bias=True,
                max_context=32768,
                dtype="bfloat16",
                quantization=None,
                kv_cache_dtype="auto",
                weights="real",
                config={"rms_norm_eps": 1.23456789e-06, "rope_theta": 1000000.0},
            ),
            "gpu": GpuFacts(
                index=0,
                uuid="GPU-00000000-1111-2222-3333-444444444444",
                name="NVIDIA H200",
                sms=132,
                memory_total_bytes=150754820096,
                compute_capability="9.0",
                driver="580.159",
                cuda="13.0",
                compute_mode="default",
                mig=False,
                gpm=True,
                power_limit_w=700.0,
            ),
            "host": HostFacts(
                cpu="a processor",
                cores=list(range(16)),
                threads_per_core=1,
                memory_bytes=128 * 1024**3,
                kernel="6.1",
                numa_node=None,
            ),
            "software": Software(advisor="0.1.0", python="3.12", vllm="0.26.0", torch="2.11.0", environment={}),
            "workload": workload,
            "protocol": Protocol(),
            "candidates": [
                measured(1, False, 9100.4, ttft_ms=Percentiles(p50=300.0, p95=420.0, p99=512.0), gpu_idle_pct=78.0),
                measured(2, False, 18900.0),
                measured(2, True, 25009.0, why_not="16 % slower than what is advised"),
                measured(4, True, 29776.0, sm_active_pct=94.1, gpu_idle_pct=4.4),
                measured(4, False, 17444.0, sms_each=None, sm_active_pct=None, gpu_idle_pct=None),
                measured(4, True, 28111.0, thread_percentages=[50] * 4, sms_each=66),
                failed(
                    4,
                    "wrong_results",
                    "matrix product off by 0.37",
                    thread_percentages=[42] * 4,
                    sms_each=54,
                    worst_product_error=0.37,
                ),
                failed(5, "oom", "engine 4 found 1,234 MiB free, needs 5,678 MiB"),
                failed(6, "infeasible", "6 engines need 12 physical cores beside the load generator's; there are 11"),
                failed(7, "skipped", "--max-engines is 6"),
                measured(1, True, 8800.0),
            ],
            "profile": None,
            "waterfall": None,
            "warnings": [
                Caution(
                    code="throttled",
                    text="The GPU lowered its clocks in 7 % of the window.",
                    remedy="Repeat it on an idle machine.",
                )
            ],
            "recommendation": advice(),
            "timeline": [Stage(name="1-engine-no-mps: start", start_s=0.0, end_s=81.25)],
            "question": Question(workload=workload, max_engines=6, thread_percentages="auto", min_gain=0.1),
            **more,
        }
    )


def screen(shown, width=80, encoding="utf-8"):
    """What a pipe receives."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="")
    render(shown, Console(file=file, width=width))
    file.flush()
    return raw.getvalue().decode(encoding)


def row(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def test_a_default_pipe_gets_lines_of_at_most_80_columns():
    text = screen(report(), width=None)
    assert max(map(cell_len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_is_wider_than_the_console(width):
    big = measured(48, True, 1234567.0, gain_vs_default=value(135.66), ttft_ms=Percentiles(p50=1, p95=123456, p99=2))
    text = screen(report(candidates=[*report().candidates, big]), width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "1,234,567 ±2%" in text


def test_a_narrow_console_cuts_nothing():
    assert screen(report(), width=40) == screen(report(), width=80)


def test_a_pipe_receives_no_escape_codes_even_when_a_log_holds_some():
    text = screen(report(candidates=[failed(2, "crash", "\x1b[31mCUDA error\x1b[0m\x07 in\n[bold]engine[/bold] 1")]))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "crashed (CUDA error in [bold]engine[/bold] 1)" in text


def test_colour_adds_nothing_but_colour():
    file = io.StringIO()
    render(report(), Console(file=file, width=80, force_terminal=True, color_system="standard", legacy_windows=False))
    coloured = file.getvalue()
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == screen(report())


def test_the_title_names_model_gpu_software_and_load():
    text = " ".join(screen(report()).split("\n ")[0].split())
    for part in ("acme/tiny-0.5B on NVIDIA H200", "vLLM 0.26.0", "bf16", "1024 in, 128 out", "256 in flight"):
        assert part in text


def test_a_measured_row_shows_all_its_figures():
    cells = row(screen(report()), "►4")
    for figure in ("yes", "132", "29,776 ±2%", "3.27×", "52 ms", "17 ms", "94 %", "4 %"):
        assert f" {figure}" in cells


def test_every_candidate_is_there_in_order_of_engines():
    lines = screen(report()).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(" engines")) + 1
    table = [line for line in lines[first : first + 20] if line[:1] in " ►" and line[1:2].isdigit()]
    assert [line[1] for line in table] == list("11224444567")


def test_only_the_recommended_candidate_is_marked():
    assert screen(report()).count("►") == 1
    settled = report(recommendation=advice(thread_percentages=[50] * 4))
    assert " 66 " in row(screen(settled), "►4")


def test_one_engine_shows_a_dash_for_mps_unless_it_ran_under_mps():
    rows = [line.split()[:2] for line in screen(report()).splitlines() if line.startswith(" 1 ")]
    assert rows == [["1", "–"], ["1", "yes"]]


def test_what_is_missing_is_a_dash_and_never_a_zero():
    bare = measured(
        3, True, 100.0, throughput_tok_per_s=None, gain_vs_default=None, ttft_ms=None, itl_ms=None, sm_active_pct=None,
        gpu_idle_pct=None, sms_each=None, thread_percentages=[33] * 3,
    )  # fmt: skip
    assert row(screen(report(candidates=[bare])), " 3").split() == ["3", "yes", "33", "%", *"––––––"]


def test_an_engine_without_a_percentage_sees_all_the_sms():
    assert row(screen(report(candidates=[measured(3, True, 100.0, sms_each=None)])), " 3").split()[2] == "132"


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (6, "wrong results (matrix product off by 0.37)"),
        (7, "out of memory (engine 4 found 1,234 MiB free, needs 5,678 MiB)"),
        (8, "infeasible (6 engines need 12 physical cores beside the load generator's; there are 11)"),
        (9, "skipped (--max-engines is 6)"),
    ],
)
def test_a_candidate_that_did_not_end_well_says_so_in_words(candidate, words):
    whole = report()
    text = screen(msgspec.structs.replace(whole, candidates=[whole.candidates[candidate]]))
    assert words in " ".join(text.split())


def test_a_reason_that_begins_with_the_outcome_is_not_said_twice():
    text = screen(report(candidates=[failed(2, "timeout", "Timed out after 420 s"), failed(3, "invalid", None)]))
    assert "    Timed out after 420 s" in text
    assert row(text, " 3").split()[-1] == "invalid"


def test_the_sentence_its_reasons_and_the_cost_follow_the_table():
    text = " ".join(screen(report()).split())
    sentence = text.index(advice().sentence)
    assert text.index("29,776 ±2%") < sentence < text.index(advice().because[0]) < text.index(advice().cost_of_mps[0])


def test_the_cost_of_mps_is_left_out_when_mps_is_not_advised():
    text = screen(report(recommendation=advice(engines=2, mps=False, cost_of_mps=["a daemon to watch"])))
    assert "daemon to watch" not in text
    assert row(text, "►2").split()[:2] == ["►2", "no"]


@pytest.mark.parametrize(
    ("status", "word"), [("inconclusive", "Inconclusive."), ("infeasible", "Infeasible."), ("no_slo", "No SLO met.")]
)
def test_no_verdict_is_said_before_the_table_with_the_reason(status, word):
    text = screen(
        report(recommendation=Recommendation(status=status, sentence="It is unknown.", because=["So it is."]))
    )
    assert text.index(f"{word} It is unknown.") < text.index("So it is.") < text.index(" engines ")
    assert "►" not in text
    assert "To run it" not in text


def test_a_candidate_that_worked_says_why_it_lost():
    assert "2 engines under MPS: 16 % slower than what is advised" in screen(report())


def test_a_warning_comes_with_its_remedy():
    text = screen(report())
    assert "Warning: The GPU lowered its clocks in 7 % of the window.\n  → Repeat it on an idle machine." in text


def test_intervals_are_called_90_percent():
    assert "90 % intervals" in screen(report())


def test_a_replayed_report_says_so():
    assert "replayed from a recorded run" in screen(report(replayed=True))
    assert "replayed" not in screen(report())


def test_dummy_weights_are_named_once():
    dummy = msgspec.structs.replace(report().model, weights="dummy")
    assert "weights are dummies" in screen(report(model=dummy))
    told = Caution(code="dummy_weights", text="Weights are dummies.", remedy="")
    assert screen(report(model=dummy, warnings=[told])).lower().count("weights are dummies") == 1
    assert "dummies" not in screen(report())


def test_what_was_not_measured_says_so():
    assert "3 engines under MPS: predicted, not measured." in screen(
        report(candidates=[measured(3, True, 1.0, source="predicted")])
    )


def test_a_prefill_report_says_what_its_tokens_are():
    prefill = Workload(kind="prefill", isl=2048, osl=1, concurrency=64)
    text = screen(report(workload=prefill))
    assert "prefill of 2048" in text
    assert "stands for a prompt of 2,048 tokens" in text


def shell_commands(text):
    lines = text[text.index("To run it:\n") :].split("\n\n")[0].splitlines()[1:]
    return [shlex.split(command) for command in "\n".join(lines).replace("\\\n", " ").splitlines()]


def test_a_broken_command_is_the_same_command_for_a_shell():
    printed = shell_commands(screen(report()))
    daemon, first = (shlex.split(command) for command in advice().commands[:2])
    assert printed[:2] == [daemon, first]


def test_a_long_command_has_one_option_a_line():
    lines = [line.strip() for line in screen(report()).splitlines()]
    assert "vllm serve acme/tiny-0.5B \\" in lines
    assert "--port 8000 \\" in lines
    assert "--compilation-config '{\"max_cudagraph_capture_size\": 512}'" in lines


def test_engines_that_differ_by_their_port_are_told_by_the_port():
    text = screen(report())
    assert [port for port in range(8001, 8004) if f"and once more with --port {port}" in text] == [8001, 8002, 8003]
    assert text.count("vllm serve") == 1


def test_different_commands_are_all_written_out():
    commands = [
        SERVE.format(port=8000),
        SERVE.format(port=8001).replace("8192", "4096").replace("1024", "2048") + " -x",
    ]
    assert shell_commands(screen(report(recommendation=advice(environment={}, commands=commands)))) == [
        shlex.split(command) for command in commands
    ]


def test_a_command_that_is_not_understood_is_printed_as_it_is():
    odd = 'echo "an open quote and   spaces ' + "x" * 90
    assert f"  {odd}\n" in screen(report(recommendation=advice(environment={}, commands=[odd])))


def test_environment_that_no_command_sets_is_exported():
    text = screen(report(recommendation=advice(environment={"CUDA_MPS_PIPE_DIRECTORY": "/tmp/a b"})))
    assert "  export CUDA_MPS_PIPE_DIRECTORY='/tmp/a b'\n" in text
    assert "export" not in screen(report())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode_still_gets_every_figure(encoding):
    text = screen(report(), encoding=encoding)
    assert row(text, ">4").split()[:6] == [">4", "yes", "132", "29,776", "+-2%", "3.27x"]
