"""The parent of the numerics check: one worker process per thread percentage, one after another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO

import msgspec

from advisor.core.numerics import Product
from advisor.core.records import NumericsResult, RawNumerics
from advisor.shell.patience import NUMERICS_END_S as _END_S

WORKER = ("-m", "advisor.shell.numerics_worker")
PERCENTAGE_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
_TAIL_BYTES = 16 * 1024
_WHY_CHARACTERS = 300


def check(
    percentages: Sequence[int],
    products: Sequence[Product],
    daemon_environment: Callable[[int], dict[str, str]],
    base_environment: Mapping[str, str],
    python: str,
    timeout_s: float,
    *,
    dtype: str = "bfloat16",
    repeats: int = 3,
    seed: int = 0,
    device: str = "cuda",
    worker: Sequence[str] = WORKER,
) -> RawNumerics:
    """Runs `products` under each of `percentages` in a client of the caller's MPS daemon.

    A worker is `python` with the arguments `worker`; its environment is `base_environment`, then
    `daemon_environment(percentage)`, then the percentage itself, and nothing else. `dtype` is torch's name of
    the model's type. `timeout_s` is one worker's limit: past it, and when the caller is interrupted, the whole
    process group is ended. What a worker finished before it failed is kept; why it failed stands in `failed`
    under the percentage. A worker's failure is never an exception.
    """
    started_s = time.monotonic()
    results: list[NumericsResult] = []
    failed: dict[str, str] = {}
    config = {
        "products": [msgspec.to_builtins(product) for product in products],
        "repeats": repeats,
        "dtype": dtype,
        "seed": seed,
        "device": device,
        "deadline_s": timeout_s,  # ends a worker whose parent was killed
    }
    for percentage in dict.fromkeys(percentages):
        if not products:
            failed[str(percentage)] = "no products to check: only unquantised models are supported"
            continue
        environment = {**base_environment, **daemon_environment(percentage), PERCENTAGE_VARIABLE: str(percentage)}
        answers, why = _ask([python, *worker], environment, config, timeout_s)
        finished, defect = _read(answers, percentage)
        results += finished
        if why or defect:
            failed[str(percentage)] = why or defect
    return RawNumerics(results=results, failed=failed, seconds=round(time.monotonic() - started_s, 3))


def _ask(
    command: list[str], environment: dict[str, str], config: dict[str, object], timeout_s: float
) -> tuple[bytes, str]:
    """What the worker wrote, and why it failed ("" if it did not).

    Files rather than pipes: nothing that a dying worker leaves behind can then keep this process waiting.
    """
    with tempfile.TemporaryFile() as question, tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as errors:
        question.write(json.dumps(config).encode())
        question.seek(0)
        try:
            process = subprocess.Popen(
                command, stdin=question, stdout=answers, stderr=errors, env=environment, start_new_session=True
            )
        except OSError as error:
            return b"", f"the worker could not be started: {error}"
        why = ""
        try:
            if code := process.wait(timeout_s):
                why = _last_line(errors) or _ending(code)
        except subprocess.TimeoutExpired:
            why = f"not done after {timeout_s:g} s"
        finally:
            _end_group(process)
        answers.seek(0)
        return answers.read(), why


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the worker's process group, politely first: an MPS client that is killed in mid-launch may upset others."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)


def _ending(code: int) -> str:
    return f"the worker ended with exit code {code}" if code > 0 else f"the worker was ended by signal {-code}"


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(max(errors.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
    lines = errors.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:_WHY_CHARACTERS]


def _read(answers: bytes, percentage: int) -> tuple[list[NumericsResult], str]:
    """The finished products, and what is wrong with the answer as a whole ("" if nothing)."""
    results: list[NumericsResult] = []
    for line in answers.splitlines():
        try:
            answer = msgspec.json.decode(line, type=dict[str, object])
            if "done" in answer:
                return results, ""
            results.append(msgspec.convert({**answer, "percentage": percentage}, NumericsResult))
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            return results, f"the worker's answer is damaged: {error}"
    return results, "the worker ended before it was done"
