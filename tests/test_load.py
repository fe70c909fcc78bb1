"""The load generators against stub engines: real processes, real HTTP."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core.histogram import percentile
from advisor.core.loads import by_engine
from advisor.core.records import Workload
from advisor.core.vocabulary import build_tokenizer, ids_of
from advisor.core.workload import prompt_tokens
from advisor.shell import load as load_module
from advisor.shell.board import Board
from advisor.shell.load import BOARD, Load, LoadFailed, LoadTimeout, deal
from advisor.shell.load_worker import EventStream, LoadConfig, RequestFailed

ROOT = Path(__file__).parent.parent
STUB = ROOT / "tests" / "stubs" / "vllm_server.py"
NAME = "advised"


class Engine:
    """A running stub of `vllm serve`."""

    def __init__(self, process, port, log):
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def healthy(self):
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return self.get("/health")[0] == 200
        return False

    def ask(self):
        """One token; whether it came."""
        body = json.dumps({"model": NAME, "prompt": "1", "max_tokens": 1})
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            connection.request("POST", "/v1/completions", body)
            return connection.getresponse().status == 200

    def counter(self, name):
        _, page = self.get("/metrics")
        return float(re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", page, re.MULTILINE).group(1))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.json"
    path.write_text(json.dumps(build_tokenizer(4000)[0]))
    return path


@contextlib.contextmanager
def starter(folder):
    """Starts stub engines, one more each time; faults by keyword."""
    engines = []

    def start(*, flags=(), **faults):
        index = len(engines)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        rules = folder / f"faults-{index}.json"
        rules.write_text(json.dumps({"all": {"request_log": str(folder / f"requests-{index}.jsonl"), **faults}}))
        log = folder / f"engine-{index}.log"
        argv = [sys.executable, "-IS", str(STUB), "serve", "/no/model", "--served-model-name", NAME]
        with log.open("w") as output:
            process = subprocess.Popen(
                [*argv, "--kv-cache-memory-bytes", str(1 << 30), "--port", str(port), *flags],
                env={"PATH": os.environ["PATH"], "VLLM_STUB_FAULTS": str(rules), "MPS_ADVISOR_ENGINE": str(index)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        engine = Engine(process, port, log)
        engines.append(engine)
        return engine

    try:
        yield start
    finally:
        for engine in engines:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine.process.pid, signal.SIGKILL)
            engine.process.wait(10)


@contextlib.contextmanager
def loads(tokenizer):
    """Starts loads of engines as soon as these are ready; whatever is left of them is ended."""
    with contextlib.ExitStack() as stack:

        def start(engines, asked, *, workers=1, decode_tokens=None, **more):
            for engine in engines:
                if isinstance(engine, Engine):
                    until(engine.healthy)
            urls = [engine.url if isinstance(engine, Engine) else engine for engine in engines]
            jobs = deal(urls, NAME, asked, workers)
            if decode_tokens is not None:
                jobs = [msgspec.structs.replace(job, decode_tokens=decode_tokens) for job in jobs]
            usual = {"cores": [], "origin_s": time.monotonic(), "tokenizer": tokenizer, "drain_timeout_s": 10.0}
            if "directory" not in more:
                usual["directory"] = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            environment = {"PATH": os.environ["PATH"]}
            return stack.enter_context(Load.start(jobs, bin_s=0.1, environment=environment, **{**usual, **more}))

        yield start


@pytest.fixture
def start_engine(tmp_path):
    with starter(tmp_path) as start:
        yield start


@pytest.fixture
def load(tokenizer):
    with loads(tokenizer) as start:
        yield start


def serve(in_flight=4, *, isl=24, osl=8, **more):
    return Workload(kind="serve", isl=isl, osl=osl, concurrency=in_flight, **more)


def decode(in_flight, *, isl=24, osl=8):
    return Workload(kind="decode", isl=isl, osl=osl, concurrency=in_flight)


def until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def calibrations(engine, workers=1):
    """Requests, of one token each, that an engine is asked before the load: a short one more for the first."""
    return workers * (2 if engine == 0 else 1)


def requests_to(tmp_path, engine=0, workers=1):
    """What the stub was asked, without the calibration."""
    lines = (tmp_path / f"requests-{engine}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][calibrations(engine, workers) :]


def run(loader, *, completed=20, window=(0.0, 1e9)):
    """A whole load until each worker has completed so many requests."""
    loader.wait_ready(20)
    loader.go()
    until(lambda: all(tick.completed + tick.failed >= completed or tick.gave_up for tick in loader.progress()))
    return loader.stop(window, 20)


def gone(pids):
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


# ---------------------------------------------------------------- what is sent and counted


@pytest.fixture(scope="module")
def served(tmp_path_factory, tokenizer):
    """One load of two healthy engines by two generators, looked at by several tests."""
    folder = tmp_path_factory.mktemp("served")
    core = sorted(os.sched_getaffinity(0))[-1]
    with starter(folder) as start_engine, loads(tokenizer) as load:
        engines = [start_engine(), start_engine()]
        loader = load(engines, serve(16, osl=48), workers=2, cores=[core])
        loader.wait_ready(20)
        seen = SimpleNamespace(core=core, engines=engines, ready=loader.progress(), pids=loader.pids)
        seen.sessions = [os.getsid(pid) for pid in seen.pids]
        seen.affinities = [os.sched_getaffinity(pid) for pid in seen.pids]
        seen.calibrated = [engine.counter("generation_tokens_total") for engine in engines]
        loader.go()
        seen.ticks = until(
            lambda: [tick for tick in loader.progress() if tick.completed >= 24][1:] and loader.progress()
        )
        seen.parts = loader.stop((0.0, 1e9), 20)
        seen.raws = by_engine(seen.parts, 2)
        seen.left = [pid for pid in seen.pids if not gone([pid])]
        seen.counters = [engine.counter("generation_tokens_total") for engine in engines]
        seen.asked = [requests_to(folder, index, workers=2) for index in (0, 1)]
        yield seen


def test_tokens_that_are_counted_are_those_that_the_engine_generated(served):
    for index, (raw, asked, counter) in enumerate(zip(served.raws, served.asked, served.counters, strict=True)):
        generated = sum(request["completion_tokens"] for request in asked)
        assert raw.engine == index
        assert raw.sent == raw.completed == len(asked) > 0
        assert (raw.failed, raw.errors) == (0, [])
        assert raw.output_tokens == raw.chunks == generated == counter - calibrations(index, workers=2)
        assert sum(raw.tokens) == pytest.approx(generated)
        assert sum(raw.first_tokens) == sum(raw.completions) == len(asked)
        assert sum(raw.ttft.counts.values()) == sum(raw.e2e.counts.values()) == len(asked)
        assert sum(raw.itl.counts.values()) == generated - len(asked)
        assert (raw.prompt_tokens_min, raw.prompt_tokens_max) == (24, 24)


def test_every_generator_tells_of_every_engine(served):
    assert [part.engine for part in served.parts] == [0, 1, 0, 1]
    assert all(part.sent > 0 for part in served.parts)


def test_the_calibration_asks_every_engine_once_and_the_first_one_twice(served):
    assert served.calibrated == [calibrations(engine, workers=2) for engine in (0, 1)]


def test_what_is_sent_is_a_streamed_completion_that_ignores_the_end_token(served):
    for asked in served.asked:
        assert asked[-1]["body"] == {
            "model": NAME,
            "max_tokens": 48,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def test_every_prompt_is_unique_over_slots_generators_and_engines(served):
    prompts = [request["prompt"] for asked in served.asked for request in asked]
    assert len(set(prompts)) == len(prompts) >= 48
    assert all(len(prompt.split()) == 24 and prompt.startswith(" ") for prompt in prompts)


def test_first_requests_have_different_lengths_and_later_ones_the_full_one(served):
    lengths = sorted(request["max_tokens"] for asked in served.asked for request in asked)
    first, later = lengths[:16], lengths[16:]
    assert len(set(first)) > 6
    assert first[0] >= 1 and set(later) == {48}


def test_the_drain_lets_the_requests_in_flight_end(served):
    assert [tick.in_flight for tick in served.ticks] == [8, 8]
    assert [raw.sent - raw.completed for raw in served.raws] == [0, 0]
    assert served.left == []


def test_ticks_tell_how_far_it_is(served):
    assert [(tick.tokens, tick.completed, tick.in_flight) for tick in served.ready] == [(0, 0, 0)] * 2
    for worker, tick in enumerate(served.ticks):
        parts = served.parts[2 * worker : 2 * worker + 2]
        assert 24 <= tick.completed <= sum(part.completed for part in parts)
        assert 0 < tick.tokens <= sum(part.chunks for part in parts)
        assert (tick.failed, tick.gave_up) == (0, None)
        assert tick.cpu_s > 0 and tick.at_s > parts[0].bins_start_s


def test_bins_of_all_engines_lie_on_one_grid(served):
    for raw in served.parts:
        assert raw.bins_start_s / raw.bin_s == pytest.approx(round(raw.bins_start_s / raw.bin_s))
        assert len(raw.tokens) == len(raw.first_tokens) == len(raw.completions)


def test_workers_are_in_sessions_of_their_own_and_on_the_cores_that_they_were_given(served):
    assert served.sessions == served.pids
    assert served.affinities == [{served.core}] * 2


def test_the_same_seed_asks_the_same_and_another_seed_something_else(served, start_engine, load, tmp_path):
    before = {request["prompt"] for asked in served.asked for request in asked}
    run(load([start_engine()], serve(16, osl=48), workers=2), completed=1)
    again = {request["prompt"] for request in requests_to(tmp_path, workers=2)}
    assert len(again & before) >= 16  # at least each slot's first
    run(load([start_engine()], serve(16, osl=48, seed=1), workers=2), completed=1)
    assert not {request["prompt"] for request in requests_to(tmp_path, 1, workers=2)[2:]} & before


def test_prefill_asks_for_one_token_each(start_engine, load, tmp_path):
    (raw,) = run(load([start_engine()], Workload(kind="prefill", isl=24, osl=1, concurrency=4)))
    assert {request["max_tokens"] for request in requests_to(tmp_path)} == {1}
    assert raw.output_tokens == raw.completed
    assert raw.itl.counts == {}


def test_decode_sends_one_request_a_slot_and_nothing_joins_later(start_engine, load, tmp_path):
    asked = decode(3, isl=400, osl=40)
    (raw,) = run(load([start_engine(tokens_per_s=2000)], asked, decode_tokens=60), completed=3)
    assert [request["max_tokens"] for request in requests_to(tmp_path)] == [60] * 3
    assert (raw.sent, raw.completed, raw.output_tokens) == (3, 3, 180)
    assert raw.prompt_tokens_max == raw.prompt_tokens_min == prompt_tokens(asked)


def test_streams_are_counted_in_full_however_they_come(start_engine, load, tmp_path):
    for index, faults in enumerate(({"coalesce": 3}, {"split_bytes": 7}, {"bos": 2})):
        engine = start_engine(**faults)
        loader = load([engine], serve(2, osl=9))
        (calibration,) = loader.wait_ready(20)
        (raw,) = run(loader, completed=6)
        assert raw.failed == 0
        assert raw.output_tokens == engine.counter("generation_tokens_total") - calibrations(0)
        assert sum(raw.tokens) == pytest.approx(raw.output_tokens, abs=0.1)
        assert (raw.prompt_tokens_min, raw.prompt_tokens_max) == (24, 24)
        assert (raw.chunks < raw.output_tokens) == ("coalesce" in faults)
        assert calibration.words == 24 - faults.get("bos", 0)
        asked = [json.loads(line) for line in (tmp_path / f"requests-{index}.jsonl").read_text().splitlines()]
        assert len(asked[-1]["prompt"].split()) == calibration.words


def test_prompts_can_be_token_ids_of_single_words_and_no_two_are_alike(start_engine, load, tmp_path):
    asked = msgspec.structs.replace(serve(4, isl=24, osl=6), prompts="token_ids")
    # Nothing is added to ids, whatever the tokenizer adds to text.
    loader = load([start_engine(bos=2)], asked)
    (calibration,) = loader.wait_ready(20)
    (raw,) = run(loader, completed=8)
    assert (raw.failed, calibration.words, raw.prompt_tokens_min, raw.prompt_tokens_max) == (0, 24, 24, 24)
    prompts = [request["prompt"] for request in requests_to(tmp_path)]
    assert {len(prompt) for prompt in prompts} == {24} and len({tuple(prompt) for prompt in prompts}) == len(prompts)
    known = set(ids_of(build_tokenizer(4000)[0]).values())
    assert all(type(token) is int for token in prompts[0]) and known.issuperset(prompts[0])


def test_prompts_of_mixed_lengths_lie_in_the_range_and_are_what_the_server_counts(start_engine, load, tmp_path):
    asked = serve(8, isl=24, osl=6, isl_range=(8, 40), osl_range=(2, 10))
    (raw,) = run(load([start_engine(bos=2)], asked), completed=60)
    requests = requests_to(tmp_path)
    prompts, outputs = ([request[of] for request in requests] for of in ("prompt_tokens", "max_tokens"))
    assert 8 <= min(prompts) < 16 and 32 < max(prompts) <= 40
    assert (raw.prompt_tokens_min, raw.prompt_tokens_max) == (min(prompts), max(prompts))
    assert min(outputs) >= 1 and max(outputs) == 10 and len(set(outputs)) > 6
    assert sum(output == 1 for output in outputs) <= 8  # only first requests may be cut below the range
    assert raw.output_tokens == sum(outputs)


# ---------------------------------------------------------------- which engine gets a request


def test_two_generators_share_one_count_of_requests_in_flight_and_load_three_engines_equally(
    start_engine, load, tmp_path
):
    engines = [start_engine(tokens_per_s=100) for _ in range(3)]
    loader = load(engines, serve(3), workers=2, directory=tmp_path)
    raws = by_engine(run(loader, completed=24), 3)
    fair = sum(raw.sent for raw in raws) / 3
    assert [raw.sent for raw in raws] == pytest.approx([fair] * 3, rel=0.25)


def test_a_generator_heeds_what_others_have_in_flight(start_engine, load, tmp_path):
    loader = load([start_engine(), start_engine(), start_engine()], serve(4), workers=2, directory=tmp_path)
    loader.wait_ready(20)
    other = Board(tmp_path / BOARD, 1, 2, 3)
    for _ in range(10):
        other.take(0)
        other.take(1)
    first, second, third = by_engine(run(loader, completed=8), 3)
    assert (first.sent, second.sent) == (0, 0) and third.completed >= 16


def test_counts_on_the_board_are_what_the_engines_run(start_engine, load, tmp_path):
    engines = [start_engine(tokens_per_s=40) for _ in range(3)]
    loader = load(engines, serve(12, osl=40), workers=2, directory=tmp_path)
    loader.wait_ready(20)
    loader.go()
    board = Board(tmp_path / BOARD, 0, 2, 3)
    until(lambda: board.in_flight() == [engine.counter("num_requests_running") for engine in engines] == [4, 4, 4])
    assert [tick.in_flight for tick in loader.progress()] == [6, 6]


def test_a_slow_engine_gets_fewer_new_requests_than_a_fast_one(start_engine, load):
    engines = [start_engine(tokens_per_s=800), start_engine(tokens_per_s=100)]
    fast, slow = by_engine(run(load(engines, serve(8), workers=2), completed=40), 2)
    assert slow.sent < fast.sent / 2
    assert slow.completed > 0


@pytest.mark.parametrize("how", ["status", "disconnect"])
def test_an_engines_failed_request_gives_its_place_back(start_engine, load, tmp_path, how):
    engines = [start_engine(), start_engine(fail_every=2, fail_how=how, spare=1)]
    well, ill = run(load(engines, serve(6), directory=tmp_path), completed=60)
    # Places that were kept would add up until every request went to the engine without failures.
    assert ill.failed > 6 and well.failed == 0
    assert Board(tmp_path / BOARD, 0, 1, 2).in_flight() == [0, 0]


def test_a_decode_wave_is_dealt_exactly_evenly_by_however_many_generators(start_engine, load):
    engines = [start_engine(tokens_per_s=2000) for _ in range(3)]
    loader = load(engines, decode(8), workers=3, decode_tokens=20)
    loader.wait_ready(20)
    loader.go()
    until(lambda: sum(tick.completed for tick in loader.progress()) == 8)
    assert [raw.sent for raw in by_engine(loader.stop(None, 20), 3)] == [3, 3, 2]


def test_there_are_no_more_generators_than_requests_in_flight():
    jobs = deal(["http://127.0.0.1:9"], NAME, serve(3), 8)
    assert [(job.worker, job.workers, job.concurrency, job.first_slot) for job in jobs] == [
        (0, 3, 1, 0), (1, 3, 1, 1), (2, 3, 1, 2),
    ]  # fmt: skip
    assert [job.concurrency for job in deal(["http://127.0.0.1:9"], NAME, serve(11), 4)] == [3, 3, 3, 2]


# ---------------------------------------------------------------- the window


def test_only_what_ended_inside_the_window_is_in_the_histograms(start_engine, load):
    # Four requests in flight at 160 tokens/s: a step of 25 ms, eight tokens a request.
    origin_s = time.monotonic()
    loader = load([start_engine(tokens_per_s=160)], serve(), origin_s=origin_s)
    loader.wait_ready(20)
    loader.go()
    until(lambda: loader.progress()[0].completed >= 4)
    start_s = time.monotonic() - origin_s
    time.sleep(0.6)
    end_s = time.monotonic() - origin_s
    until(lambda: loader.progress()[0].at_s > end_s + 0.1)
    (raw,) = loader.stop((start_s, end_s), 20)
    inside = sum(raw.e2e.counts.values())
    assert 0 < inside <= raw.completed - 4
    low, high = (int((at_s - raw.bins_start_s) / raw.bin_s) for at_s in (start_s, end_s))
    assert sum(raw.completions[low + 1 : high]) <= inside <= sum(raw.completions[low : high + 1])
    assert sum(raw.itl.counts.values()) <= sum(raw.tokens[low : high + 1])
    assert percentile(raw.itl, 0.5) == pytest.approx(0.025, rel=0.5)
    assert percentile(raw.e2e, 0.95) > percentile(raw.ttft, 0.5) + 0.1


def test_a_load_without_slots_counts_nothing(start_engine, load):
    loader = load([start_engine()], serve(0))
    loader.wait_ready(20)
    loader.go()
    (raw,) = loader.stop(None, 20)
    assert (raw.sent, sum(raw.tokens), raw.prompt_tokens_min) == (0, 0, None)


# ---------------------------------------------------------------- calibration


def test_a_tokenizer_of_another_model_is_an_error_that_says_so(start_engine, load):
    with pytest.raises(LoadFailed, match=r"a prompt of .* belong to the model") as failure:
        load([start_engine(), start_engine(tokens_per_word=2)], serve(isl=40)).wait_ready(20)
    assert "80 tokens to engine 1, 40 were expected" in str(failure.value)
    assert failure.value.worker == 0
    assert failure.value.exit_code == 3


def test_an_engine_that_refuses_the_calibration_is_quoted(start_engine, load):
    engine = start_engine(flags=["--max-model-len", "20"])
    refusal = r"load generator 0 gave up: the calibration request to engine 0.*maximum context length is 20"
    with pytest.raises(LoadFailed, match=refusal):
        load([engine], serve(isl=40)).wait_ready(20)


def test_the_longest_prompt_is_what_is_calibrated(start_engine, load):
    engine = start_engine(flags=["--max-model-len", "60"])
    with pytest.raises(LoadFailed, match="maximum context length is 60"):
        load([engine], serve(isl=44, isl_range=(8, 80))).wait_ready(20)


def test_a_shortest_prompt_without_room_for_a_word_is_an_error(start_engine, load):
    with pytest.raises(LoadFailed, match="a prompt of 2 tokens leaves no room for a word"):
        load([start_engine(bos=2)], serve(isl=11, isl_range=(2, 20))).wait_ready(20)


def test_nobody_listening_is_an_error(load):
    with pytest.raises(LoadFailed, match="the calibration request to engine 0 failed: Client"):
        load(["http://127.0.0.1:9"], serve()).wait_ready(20)


def test_a_tokenizer_that_is_not_there_is_an_error(load, tmp_path):
    with pytest.raises(LoadFailed, match="FileNotFoundError"):
        load(["http://127.0.0.1:9"], serve(), tokenizer=tmp_path / "none.json").wait_ready(20)


# ---------------------------------------------------------------- failures


def test_failed_requests_are_counted_with_their_texts_and_their_slots_go_on(start_engine, load):
    texts = {
        "status": "HTTP status 500: .*something broke before the first token",
        "disconnect": "Client",
        "error_event": "the engine sent an error: .*something broke in the middle",
        "no_usage": "the stream ended without usage",
    }
    engines = [start_engine(fail_every=6, fail_how=how, spare=2) for how in texts]
    for raw, text in zip(run(load(engines, serve(16)), completed=100), texts.values(), strict=True):
        assert 0 < raw.failed < raw.completed
        assert raw.sent == raw.completed + raw.failed == sum(raw.completions) + raw.failed
        assert all(re.match(text, error, re.DOTALL) and len(error) <= 200 for error in raw.errors)
        assert len(raw.errors) == min(raw.failed, 5)


def test_a_request_without_an_end_fails_after_its_time(start_engine, load):
    (raw,) = run(load([start_engine(tokens_per_s=20)], serve(2, osl=40), request_timeout_s=0.5), completed=1)
    assert raw.failed >= 1
    assert "not complete after 0.5 s" in raw.errors[0]


def test_fifty_failures_in_a_row_end_the_sending_and_are_reported(start_engine, load):
    loader = load([start_engine(fail_every=1, spare=2)], serve(25))
    (raw,) = run(loader, completed=10**6)
    assert re.match("engine 0: HTTP status 500.*something broke", loader.progress()[0].gave_up)
    assert raw.completed == 0
    assert 50 <= raw.failed == raw.sent < 100
    assert len(raw.errors) == 5


def test_an_engine_that_dies_leaves_failures_and_what_was_counted_before(start_engine, load):
    engine = start_engine(tokens_per_s=500)
    loader = load([engine], serve())
    loader.wait_ready(20)
    loader.go()
    until(lambda: loader.progress()[0].completed >= 4)
    os.killpg(engine.process.pid, signal.SIGKILL)
    until(lambda: loader.progress()[0].failed >= 4)
    (raw,) = loader.stop((0.0, 1e9), 20)
    assert raw.completed >= 4 and raw.failed >= 4 and raw.errors
    assert sum(raw.tokens) >= raw.output_tokens


# ---------------------------------------------------------------- the end


def test_the_drain_cuts_off_what_does_not_end_and_keeps_its_tokens(start_engine, load, tmp_path):
    engine = start_engine(tokens_per_s=100, coalesce=2)
    loader = load([engine], decode(2), decode_tokens=10_000, drain_timeout_s=0.3, directory=tmp_path)
    loader.wait_ready(20)
    loader.go()
    until(lambda: loader.progress()[0].tokens > 10)
    (raw,) = loader.stop((0.0, 1e9), 20)
    assert (raw.sent, raw.completed, raw.failed) == (2, 0, 0)
    assert sum(raw.tokens) == raw.chunks > 10
    assert raw.output_tokens == 0
    assert Board(tmp_path / BOARD, 0, 1, 1).in_flight() == [0]


def test_an_abort_leaves_no_process_and_no_connection(start_engine, load, monkeypatch):
    engine = start_engine(tokens_per_s=50)
    loader = load([engine], serve(8, osl=200), workers=2)
    loader.wait_ready(20)
    loader.go()
    until(lambda: all(tick.in_flight == 4 for tick in loader.progress()))
    monkeypatch.setattr(load_module, "ABORT_TIMEOUT_S", 0.3)
    os.kill(loader.pids[1], signal.SIGSTOP)  # one that does not listen is ended all the same
    loader.abort()
    assert gone(loader.pids)
    # Like vLLM, the server counts anew at the end of a step; one more request makes it take one.
    until(lambda: engine.ask() and engine.counter("num_requests_running") == 0)
    loader.abort()


def test_a_worker_that_dies_is_named(start_engine, load):
    engine = start_engine()
    loader = load([engine], serve(8), workers=2)
    loader.wait_ready(20)
    loader.go()
    os.kill(loader.pids[1], signal.SIGKILL)

    def trouble():
        try:
            loader.check()
        except LoadFailed as failure:
            return failure

    failure = until(trouble)
    assert failure.worker == 1
    assert str(failure) == "load generator 1 was ended by signal 9"
    for ask in (loader.progress, lambda: loader.stop(None, 20)):
        with pytest.raises(LoadFailed, match="load generator 1"):
            ask()


def test_a_worker_that_is_late_is_named(load):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        loader = load([f"http://127.0.0.1:{mute.getsockname()[1]}"], serve())
        with pytest.raises(LoadTimeout, match=r"load generator 0 was not ready after 0.2 s"):
            loader.wait_ready(0.2)
        with pytest.raises(LoadFailed, match="not ready yet"):
            loader.progress()


def test_what_is_no_message_is_reported_with_its_text(load, monkeypatch):
    monkeypatch.setattr(load_module, "WORKER", [sys.executable, "-c", "print('hello'); input(); input()"])
    with pytest.raises(LoadFailed, match=r"load generator 0 sent what is not a message .*hello"):
        load(["http://127.0.0.1:9"], serve()).wait_ready(20)


def test_workers_end_with_their_parent(start_engine, tokenizer, tmp_path):
    engine = start_engine(tokens_per_s=50)
    code = f"""
import time
from pathlib import Path
from advisor.core.records import Workload
from advisor.shell.load import Load, deal
load = Workload(kind="serve", isl=8, osl=500, concurrency=2)
jobs = deal([{engine.url!r}], {NAME!r}, load, 1)
load = Load.start(jobs, tokenizer=Path({str(tokenizer)!r}), directory=Path({str(tmp_path)!r}), bin_s=0.1,
                  origin_s=time.monotonic(), cores=[], environment={{}}, drain_timeout_s=1)
load.wait_ready(20)
load.go()
print(load.pids[0], flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        pid = int(parent.stdout.readline())
        assert not gone([pid])
        parent.kill()
    until(lambda: gone([pid]))


def answer_to(config):
    """Exit code and output of a worker that is given one line."""
    argv = [sys.executable, "-m", "advisor.shell.load_worker"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        answer, _ = process.communicate(json.dumps(config).encode() + b"\n", timeout=20)
    return process.returncode, answer


def test_a_worker_says_what_is_wrong_with_its_configuration():
    code, answer = answer_to({"worker": 0})
    assert code == 1
    assert "not a load configuration" in json.loads(answer)["error"]


def test_a_worker_whose_parent_is_another_process_does_nothing(tokenizer):
    config = LoadConfig(
        worker=0,
        workers=1,
        base_urls=["http://127.0.0.1:9"],
        board="/nowhere/in-flight",
        model=NAME,
        workload=serve(),
        concurrency=1,
        first_slot=0,
        decode_tokens=0,
        tokenizer=str(tokenizer),
        bin_s=0.1,
        origin_s=0.0,
        cores=[],
        request_timeout_s=1.0,
        drain_timeout_s=1.0,
        parent_pid=1,
    )
    assert answer_to(msgspec.to_builtins(config)) == (0, b"")


# ---------------------------------------------------------------- the stream

CONTENT = (
    'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":%s,'
    '"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'
)
USAGE = (
    'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[],"usage":{"prompt_tokens":9,'
    '"total_tokens":12,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":0}}}\n\n'
)
DONE = "data: [DONE]\n\n"


def fed(text, cuts):
    data = text.encode()
    edges = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    stream = EventStream()
    return stream, sum(stream.feed(data[a:b]) for a, b in pairwise(edges))


@given(st.lists(st.text(), max_size=6), st.lists(st.integers(min_value=0), max_size=30))
def test_a_stream_is_counted_the_same_wherever_it_is_cut(texts, cuts):
    stream, events = fed("".join(CONTENT % json.dumps(text) for text in texts) + USAGE + DONE, cuts)
    assert events == len(texts)
    assert (stream.prompt_tokens, stream.completion_tokens, stream.done, stream.error) == (9, 3, True, None)


@given(st.lists(st.integers(min_value=0), max_size=10))
def test_what_a_model_writes_is_not_mistaken_for_the_protocol(cuts):
    text = 'data: {"choices":[{"usage":{"completion_tokens":5}}], "error": 1}\n\ndata: [DONE]\n\n"choices":[]'
    stream, events = fed(CONTENT % json.dumps(text), cuts)
    assert events == 1
    assert (stream.completion_tokens, stream.done, stream.error) == (None, False, None)


@given(st.lists(st.integers(min_value=0), max_size=10))
def test_comments_are_no_tokens_and_errors_are_kept(cuts):
    error = 'data: {"error":{"message":"out of luck","code":500}}\n\n'
    stream, events = fed(CONTENT % '"a"' + ": still here\n\n" + error + DONE, cuts)
    assert events == 1
    assert "out of luck" in stream.error


def test_an_event_that_is_not_json_fails_the_request():
    with pytest.raises(RequestFailed, match="not a JSON object: <html>"):
        EventStream().feed(b"data: <html>\n\n")
