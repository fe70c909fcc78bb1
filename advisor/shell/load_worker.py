"""One process that keeps its part of all requests in flight over streaming HTTP, and remembers when each piece came.

Every new request goes to the engine that has the fewest in flight over all such processes (`board`).

Run as `python -m advisor.shell.load_worker` by `advisor.shell.load`, with JSON lines on stdin and stdout:

    in   {LoadConfig}                      the first line
    out  {"ready": {Calibration}}          prompts are known to have the right length; nothing counted yet
    in   {"go": true}                      start
    out  {"tick": {Tick}}                  every 0.1 s
    in   {"stop": {"window": [t0, t1]}}    send no more, let what is in flight end; window null: none was reached
    out  {"result": [{RawLoad}, ...]}      one for each engine, in their order; then exit 0
    in   {"abort": true}, or end of input  close everything and exit at once
    out  {"error": "..."}                  instead of any of the above, then exit 1

Every time is in seconds of CLOCK_MONOTONIC, which processes share, since the parent's `origin_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import random
import resource
import signal
import sys
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from advisor.core import histogram
from advisor.core.records import RawLoad, Record, Workload
from advisor.core.vocabulary import ids_of
from advisor.core.workload import output_range, prompt_range
from advisor.shell.board import Board

TICK_S: Final = 0.1
RETRY_S: Final = 0.2
FAILURES_IN_A_ROW_MAX: Final = 50
ERRORS_KEPT: Final = 5
ERROR_CHARS: Final = 200
# Shorter than the 5 s after which vLLM's HTTP server closes an idle connection: never send into a closing one.
KEEP_ALIVE_S: Final = 2.0
CALIBRATION_WORDS: Final = 16
CALIBRATION_TIMEOUT_S: Final = 120.0
_PR_SET_PDEATHSIG: Final = 1


# ---------------------------------------------------------------- what crosses the pipe


class LoadConfig(Record, frozen=True):
    """The part of worker `worker` of `workers`: `concurrency` of the workload's requests in flight at a time.

    Engine i is the one at `base_urls[i]`; `board` is the file of the requests in flight. Slots are numbered over all
    workers, these from `first_slot` on. `decode_tokens` is the output length of every request of the workload
    "decode"; the others do not use it. `cores` empty: not pinned.
    """

    worker: int
    workers: int
    base_urls: list[str]
    board: str
    model: str
    workload: Workload
    concurrency: int
    first_slot: int
    decode_tokens: int
    tokenizer: str  # path of a tokenizer.json
    bin_s: float
    origin_s: float
    cores: list[int]
    request_timeout_s: float
    drain_timeout_s: float
    parent_pid: int


class Calibration(Record, frozen=True):
    """`words` of our own make `prompt_tokens` tokens, the longest prompt, as every engine counts them."""

    words: int
    prompt_tokens: int

    @property
    def extra(self) -> int:
        """Tokens that every prompt has beyond its words."""
        return self.prompt_tokens - self.words


class Tick(Record, frozen=True):
    """Progress so far, over all engines. `tokens` counts content events, each as many tokens as in whole answers.

    `gave_up` names an engine and its last error after 50 failures in a row; from then on nothing more is sent.
    """

    at_s: float
    tokens: int
    completed: int
    failed: int
    in_flight: int
    cpu_s: float
    gave_up: str | None = None


class Window(Record, frozen=True):
    window: tuple[float, float] | None


class Command(Record, frozen=True):
    go: bool = False
    stop: Window | None = None
    abort: bool = False


class RequestFailed(Exception):
    """One request did not bring a whole answer."""


class WorkerError(Exception):
    """The load cannot be generated; the text goes to the parent."""


# ---------------------------------------------------------------- one request


class EventStream:
    """Counts the server-sent events of one completion, fed with bytes as they come, cut anywhere.

    A content event holds choices. Its JSON is not parsed: inside a JSON string a quote is always escaped, so
    the bytes of a key cannot be part of the text that the model wrote. Whatever is not plain content (usage,
    the end mark, errors, comments) is parsed, once per request as a rule.
    """

    __slots__ = ("_rest", "completion_tokens", "done", "error", "prompt_tokens")

    def __init__(self) -> None:
        self._rest = b""
        self.completion_tokens: int | None = None
        self.prompt_tokens: int | None = None
        self.error: str | None = None
        self.done = False

    def feed(self, data: bytes) -> int:
        """Content events that `data` completed. Raises RequestFailed for an event that is not JSON."""
        if self._rest:
            data = self._rest + data
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            self._rest = data
            return 0
        if end < len(data):
            self._rest = data[end:]
            data = data[:end]
        else:
            self._rest = b""
        events = data.count(b"\n\n")
        if data.count(b'"choices":[{') == events:
            return events
        return sum(map(self._parse, data.split(b"\n\n")))

    def _parse(self, event: bytes) -> bool:
        text = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if not text:
            return False
        if text == b"[DONE]":
            self.done = True
            return False
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise RequestFailed(f"an event that is not a JSON object: {text[:80].decode(errors='replace')}")
        if body.get("error"):
            self.error = json.dumps(body["error"])
        if usage := body.get("usage"):
            self.completion_tokens = usage.get("completion_tokens")
            self.prompt_tokens = usage.get("prompt_tokens")
        return bool(body.get("choices"))


@dataclass(slots=True)
class Exchange:
    """One request to one engine, and its answer.

    `arrived_s` and `events` run in parallel: when each read came, what it held.
    """

    engine: int
    sent_s: float
    arrived_s: array[float] = field(default_factory=lambda: array("d"))
    events: array[int] = field(default_factory=lambda: array("l"))
    ended_s: float = 0.0
    tokens: int | None = None  # output tokens by the server's count, once the answer is whole
    prompt_tokens: int | None = None


class Client:
    """Sends completions to the engines and counts what streams back. `vocabulary`: words that are one token, and its
    id.
    """

    def __init__(self, config: LoadConfig, vocabulary: Mapping[str, int], session: aiohttp.ClientSession) -> None:
        self._config = config
        self._words, self._ids = list(vocabulary), list(vocabulary.values())
        self._session = session
        self._urls = [f"{url.rstrip('/')}/v1/completions" for url in config.base_urls]
        self.events = 0

    def now_s(self) -> float:
        return time.monotonic() - self._config.origin_s

    async def complete(self, exchange: Exchange, prompt: str | list[int], max_tokens: int, timeout_s: float) -> None:
        """Fill `exchange` until the answer is whole. Raises RequestFailed otherwise; what came until then stays."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._stream(exchange, prompt, max_tokens)
        except TimeoutError as error:
            raise RequestFailed(f"the answer was not complete after {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        finally:
            exchange.ended_s = self.now_s()

    async def _stream(self, exchange: Exchange, prompt: str | list[int], max_tokens: int) -> None:
        body = {
            "model": self._config.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": self._config.workload.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        stream = EventStream()
        origin_s = self._config.origin_s
        clock = time.monotonic
        async with self._session.post(self._urls[exchange.engine], json=body) as response:
            content = response.content
            if response.status != 200:
                text = await content.read(4 * ERROR_CHARS)
                raise RequestFailed(f"HTTP status {response.status}: {text.decode(errors='replace')}")
            while data := await content.readany():
                at_s = clock() - origin_s
                if events := stream.feed(data):
                    self.events += events
                    exchange.arrived_s.append(at_s)
                    exchange.events.append(events)
        if stream.error is not None:
            raise RequestFailed(f"the engine sent an error: {stream.error}")
        if stream.completion_tokens is None or not stream.done:
            raise RequestFailed(f"the stream ended without {'its end mark' if not stream.done else 'usage'}")
        if stream.completion_tokens > 0 and not exchange.events:
            raise RequestFailed(f"{stream.completion_tokens} tokens were reported and none was streamed")
        exchange.tokens = stream.completion_tokens
        exchange.prompt_tokens = stream.prompt_tokens

    def prompt(self, rng: random.Random, words: int) -> str | list[int]:
        """Fresh text of `words` random words, each one token with the space before it; or the ids of such tokens."""
        if self._config.workload.prompts == "token_ids":
            return rng.choices(self._ids, k=words)
        return " " + " ".join(rng.choices(self._words, k=words))

    async def calibrate(self) -> Calibration:
        """How many words make a prompt of the wanted length. Raises WorkerError when no number does.

        A tokenizer may add a constant (a beginning-of-text token). It is found on a short prompt to the first engine;
        the longest prompt is then checked with every engine, for all have to serve the same model.
        """
        shortest, longest = prompt_range(self._config.workload)
        rng = random.Random(f"{self._config.workload.seed}/{self._config.worker}/calibration")
        short = min(shortest, CALIBRATION_WORDS)
        extra = await self._count(0, rng, short) - short
        if shortest - extra < 1:
            raise WorkerError(f"a prompt of {shortest} tokens leaves no room for a word; ask for a longer one")
        words = longest - extra
        for engine in range(len(self._urls)):
            counted = await self._count(engine, rng, words)
            if counted != longest:
                raise WorkerError(
                    f"a prompt of {words} words is {counted} tokens to engine {engine}, {longest} were expected: does"
                    f" {self._config.tokenizer} belong to the model that it serves?"
                )
        return Calibration(words=words, prompt_tokens=longest)

    async def _count(self, engine: int, rng: random.Random, words: int) -> int:
        exchange = Exchange(engine=engine, sent_s=self.now_s())
        failed = f"the calibration request to engine {engine} failed"
        try:
            await self.complete(exchange, self.prompt(rng, words), 1, CALIBRATION_TIMEOUT_S)
        except RequestFailed as error:
            raise WorkerError(f"{failed}: {error}"[: 2 * ERROR_CHARS]) from error
        if exchange.prompt_tokens is None:
            raise WorkerError(f"{failed}: its usage names no prompt tokens")
        return exchange.prompt_tokens


# ---------------------------------------------------------------- the closed loop


def remaining(rng: random.Random, low: int, high: int) -> int:
    """What is left of a request that is under way, its length between `low` and `high`, at a moment of no choice."""
    while (left := rng.randint(1, high)) > rng.randint(low, high):
        pass
    return left


class ClosedLoop:
    """Slots that each send the next request when their last one has ended."""

    def __init__(self, config: LoadConfig, client: Client, board: Board, extra: int) -> None:
        engines = len(config.base_urls)
        self._config = config
        self._client = client
        self._board = board
        self._extra = extra
        self._stopping = asyncio.Event()
        self._failed_in_a_row = [0] * engines
        self._first_bin = int(client.now_s() / config.bin_s)
        self._slots = [asyncio.create_task(self._slot(config.first_slot + i)) for i in range(config.concurrency)]
        self.exchanges: list[Exchange] = []
        self.errors: list[list[str]] = [[] for _ in range(engines)]
        self.completed = [0] * engines
        self._whole_tokens = self._whole_events = 0
        self.failed = [0] * engines
        self.in_flight = 0
        self.gave_up: str | None = None

    async def _slot(self, number: int) -> None:
        workload = self._config.workload
        rng = random.Random(f"{workload.seed}/{self._config.worker}/{number}")
        prompts, outputs = prompt_range(workload), output_range(workload)
        if workload.kind == "decode":
            # A wave is dealt once and nothing evens it out later, so it must not depend on who looks first.
            engine = number % len(self._config.base_urls)
            await self._attempt(engine, self._prompt(rng, prompts), self._config.decode_tokens)
            return
        # Without different first lengths all slots would end, and be prefilled, in the same steps for ever.
        staggered = workload.kind == "serve"
        while not self._stopping.is_set():
            length = remaining(rng, *outputs) if staggered else rng.randint(*outputs)
            if await self._attempt(None, self._prompt(rng, prompts), length):
                staggered = False
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), RETRY_S)

    def _prompt(self, rng: random.Random, tokens: tuple[int, int]) -> str | list[int]:
        return self._client.prompt(rng, rng.randint(*tokens) - self._extra)

    async def _attempt(self, engine: int | None, prompt: str | list[int], max_tokens: int) -> bool:
        """Send one request to `engine`, or to the one with the fewest in flight; whether it brought a whole answer."""
        if engine is None:
            engine = self._board.choose()
        self._board.take(engine)
        self.in_flight += 1
        exchange = Exchange(engine=engine, sent_s=self._client.now_s())
        self.exchanges.append(exchange)
        try:
            await self._client.complete(exchange, prompt, max_tokens, self._config.request_timeout_s)
        except RequestFailed as error:
            self._note_failure(engine, str(error))
            return False
        finally:
            self.in_flight -= 1
            self._board.give_back(engine)
        self.completed[engine] += 1
        self._whole_tokens += exchange.tokens or 0
        self._whole_events += sum(exchange.events)
        self._failed_in_a_row[engine] = 0
        return True

    def _note_failure(self, engine: int, text: str) -> None:
        self.failed[engine] += 1
        self._failed_in_a_row[engine] += 1
        text = text[:ERROR_CHARS]
        if len(self.errors[engine]) < ERRORS_KEPT:
            self.errors[engine].append(text)
        if self._failed_in_a_row[engine] >= FAILURES_IN_A_ROW_MAX and self.gave_up is None:
            self.gave_up = f"engine {engine}: {text}"
            self._stopping.set()

    async def drain(self) -> None:
        """Send nothing new, wait for what is in flight, then cut off what has not ended by the time limit."""
        self._stopping.set()
        if self._slots:
            _, late = await asyncio.wait(self._slots, timeout=self._config.drain_timeout_s)
            for task in late:
                task.cancel()
            for outcome in await asyncio.gather(*self._slots, return_exceptions=True):
                if isinstance(outcome, Exception):
                    raise outcome

    def tick(self) -> Tick:
        return Tick(
            at_s=self._client.now_s(),
            tokens=round(self._client.events * self._tokens_per_event()),
            completed=sum(self.completed),
            failed=sum(self.failed),
            in_flight=self.in_flight,
            cpu_s=time.process_time(),
            gave_up=self.gave_up,
        )

    def _tokens_per_event(self) -> float:
        """As whole answers have it so far: a server may send several tokens in one event (`--stream-interval`)."""
        return self._whole_tokens / self._whole_events if self._whole_events else 1.0

    def result(self, window: tuple[float, float] | None) -> list[RawLoad]:
        """Everything seen, by engine. What was cut off at the end of the drain is sent, neither completed nor failed.

        Bins lie on multiples of `bin_s` since the origin, so that those of all engines cover each other.
        """
        bins = int(self._client.now_s() / self._config.bin_s) - self._first_bin + 1
        return [self._seen_of(engine, bins, window) for engine in range(len(self._config.base_urls))]

    def _seen_of(self, engine: int, bins: int, window: tuple[float, float] | None) -> RawLoad:
        config = self._config
        exchanges = [exchange for exchange in self.exchanges if exchange.engine == engine]
        tokens, first_tokens, completions = [0.0] * bins, [0] * bins, [0] * bins
        ttft, itl, e2e = histogram.empty(), histogram.empty(), histogram.empty()
        whole = [exchange for exchange in exchanges if exchange.tokens is not None]
        streamed = sum(sum(exchange.events) for exchange in whole)
        output = sum(exchange.tokens or 0 for exchange in whole)
        # An answer without its usage says nothing of how many tokens its events carried: as many as the others'.
        usual = output / streamed if streamed else 1.0

        def bin_of(at_s: float) -> int:
            return int(at_s / config.bin_s) - self._first_bin

        def inside(at_s: float) -> bool:
            return window is not None and window[0] <= at_s < window[1]

        for exchange in exchanges:
            each = usual if exchange.tokens is None else exchange.tokens / max(1, sum(exchange.events))
            last_s = None
            for at_s, events in zip(exchange.arrived_s, exchange.events, strict=True):
                tokens[bin_of(at_s)] += events * each
                if last_s is None:
                    first_tokens[bin_of(at_s)] += 1
                    if inside(at_s):
                        histogram.add(ttft.counts, at_s - exchange.sent_s)
                elif inside(at_s):
                    histogram.add(itl.counts, at_s - last_s)
                if events > 1 and inside(at_s):
                    histogram.add(itl.counts, 0.0, events - 1)
                last_s = at_s
            if exchange.tokens is not None:
                completions[bin_of(exchange.ended_s)] += 1
                if inside(exchange.ended_s):
                    histogram.add(e2e.counts, exchange.ended_s - exchange.sent_s)
        prompts = [exchange.prompt_tokens for exchange in whole if exchange.prompt_tokens is not None]
        return RawLoad(
            engine=engine,
            bins_start_s=self._first_bin * config.bin_s,
            bin_s=config.bin_s,
            tokens=[round(value, 4) for value in tokens],
            first_tokens=first_tokens,
            completions=completions,
            sent=len(exchanges),
            completed=self.completed[engine],
            failed=self.failed[engine],
            errors=self.errors[engine],
            chunks=sum(sum(exchange.events) for exchange in exchanges),
            output_tokens=output,
            prompt_tokens_min=min(prompts, default=None),
            prompt_tokens_max=max(prompts, default=None),
            ttft=ttft,
            itl=itl,
            e2e=e2e,
        )


# ---------------------------------------------------------------- the process


class Parent:
    """The pipe to the process that started this one."""

    def __init__(self, commands: asyncio.StreamReader) -> None:
        self._commands = commands
        self.go = asyncio.Event()
        self.stop: asyncio.Future[Window] = asyncio.get_running_loop().create_future()

    @classmethod
    async def connect(cls) -> Parent:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        return cls(reader)

    async def config(self) -> LoadConfig:
        line = await self._commands.readline()
        try:
            return msgspec.json.decode(line, type=LoadConfig)
        except msgspec.MsgspecError as error:
            raise WorkerError(f"the first line is not a load configuration: {error}") from error

    async def listen(self) -> None:
        """Take commands. Leaves the process at an abort and when the parent is gone: connections close with it."""
        while line := await self._commands.readline():
            try:
                command = msgspec.json.decode(line, type=Command)
            except msgspec.MsgspecError as error:
                send({"error": f"a command that is not one: {error}"})
                break
            if command.abort:
                break
            if command.go:
                self.go.set()
            if command.stop is not None and not self.stop.done():
                self.stop.set_result(command.stop)
        os._exit(1)


def allow_a_connection_per_slot() -> None:
    """Raise the soft limit of open files, 1024 on most machines, to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def send(message: dict[str, Any]) -> None:
    """Write one line to the parent, all of it."""
    os.set_blocking(1, True)
    rest = memoryview(msgspec.json.encode(message) + b"\n")
    while rest:
        rest = rest[os.write(1, rest) :]


async def send_ticks(loop: ClosedLoop) -> None:
    """A tick is below a pipe's atomic size: where the parent does not read it is dropped, and never waited for."""
    while True:
        os.set_blocking(1, False)
        with contextlib.suppress(BlockingIOError):
            os.write(1, msgspec.json.encode({"tick": loop.tick()}) + b"\n")
        await asyncio.sleep(TICK_S)


@contextlib.contextmanager
def running(*coroutines: Any) -> Iterator[None]:  # noqa: ANN401  (a coroutine of any kind)
    """Background work for as long as the block lasts."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


async def serve(parent: Parent) -> None:
    """Calibrate, wait for the word, load the engines until told to stop, report."""
    config = await parent.config()
    if os.getppid() != config.parent_pid:
        return
    with running(parent.listen()):
        try:
            if config.cores:
                os.sched_setaffinity(0, config.cores)
            allow_a_connection_per_slot()
            vocabulary = ids_of(json.loads(Path(config.tokenizer).read_bytes()))
            board = Board(Path(config.board), config.worker, config.workers, len(config.base_urls))
        except (OSError, ValueError) as error:
            raise WorkerError(f"{type(error).__name__}: {error}") from error
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        unlimited = aiohttp.ClientTimeout(total=None, sock_connect=30.0)
        async with aiohttp.ClientSession(connector=connector, timeout=unlimited) as session:
            client = Client(config, vocabulary, session)
            calibration = await client.calibrate()
            client.events = 0
            gc.collect()
            gc.freeze()  # the vocabulary is not worth walking through again while chunks arrive
            send({"ready": calibration})
            await parent.go.wait()
            loop = ClosedLoop(config, client, board, calibration.extra)
            with running(send_ticks(loop)):
                window = (await parent.stop).window
                await loop.drain()
            send({"result": loop.result(window)})


async def main() -> int:
    parent = await Parent.connect()
    try:
        await serve(parent)
    except WorkerError as error:
        send({"error": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.exit(asyncio.run(main()))
