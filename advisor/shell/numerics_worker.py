"""The child of the numerics check: runs matrix products in this process's CUDA context and judges their tiles.

`python -m advisor.shell.numerics_worker`: a JSON object on standard input (products, repeats, dtype, seed,
deadline_s, device), one JSON line per finished product and batch size on standard output, at the end a line
with "done". Whatever else writes to standard output is sent to standard error. A failure is an exception: its
last line on standard error says what went wrong, and the exit code is 1.

The parent sets the thread percentage in this process's environment: it is fixed when the context is made.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from advisor.core.numerics import NOT_FINITE
from advisor.shell.processes import end_with_parent

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch import dtype as DType

TILE = 64
# What one step may hold beside the operands, the result and the reference. Several steps' temporaries live at once.
BLOCK_BYTES = 256 * 2**20
# Grace over the deadline after which a process that is stuck in a driver call is ended from outside Python.
STUCK_S = 10.0
REFERENCE_LIMIT = 1e-10
CHECKED_ROWS = 16
CHECKED_COLUMNS = 4096


class ReferenceWrong(RuntimeError):
    """The float64 product on the device disagrees with the one on the CPU, so nothing can be judged by it."""


class OutOfTime(RuntimeError):
    """The deadline passed between two products."""


def blocks(total: int, width: int) -> Iterator[slice]:
    """Cuts range(total) into slices of `width`, a multiple of TILE at least one TILE wide; the last may be smaller."""
    step = max(width // TILE, 1) * TILE
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices below `total`, evenly spaced, the first and the last among them."""
    if total <= count:
        return list(range(total))
    if count == 1:
        return [0]
    return [index * (total - 1) // (count - 1) for index in range(count)]


def tile_error(result: Tensor, reference: Tensor) -> float:
    """The worst tile of TILE × TILE elements (smaller at the edges): norm(result - reference) / norm(reference).

    Frobenius norms in float64, by elementwise operations and sums alone: a matrix product would be the very
    thing under suspicion. NaN or infinity where the result holds them. Columns are done in blocks to bound memory.
    """
    import torch

    rows, columns = result.shape
    worst = torch.zeros((), dtype=torch.float64, device=result.device)
    for part in blocks(columns, BLOCK_BYTES // (8 * rows)):
        expected = reference[:, part].double()
        off = _tile_norms(result[:, part].double() - expected)
        relative = torch.where(off == 0, off, off / _tile_norms(expected))
        worst = torch.maximum(worst, relative.max())  # both hand NaN on
    return float(worst)


def _tile_norms(values: Tensor) -> Tensor:
    from torch.nn.functional import pad

    rows, columns = values.shape
    by_row = pad(values.square(), (0, -columns % TILE)).reshape(rows, -1, TILE).sum(2)
    return pad(by_row, (0, 0, 0, -rows % TILE)).reshape(-1, TILE, by_row.shape[1]).sum(1).sqrt_()


def reference_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + bias computed in float64 on the device, kept in float32 (rounding 6e-8) to halve its memory.

    Every block comes from one float64 product of its own, and every one of them is compared with a product on
    the CPU at sampled rows and columns. Raises ReferenceWrong where they disagree.
    """
    import torch

    rows, inner = x.shape
    columns = weight.shape[0]
    reference = torch.empty((rows, columns), dtype=torch.float32, device=x.device)
    column_blocks = list(blocks(columns, BLOCK_BYTES // (8 * inner)))
    widest = column_blocks[0].stop
    sampled_columns = max(CHECKED_COLUMNS // len(column_blocks), 1)
    for across in blocks(rows, BLOCK_BYTES // (8 * max(inner, widest))):
        left = x[across].double()
        for down in column_blocks:
            part_bias = None if bias is None else bias[down]
            exact = left @ weight[down].double().T
            if part_bias is not None:
                exact += part_bias.double()
            verify(exact, x[across], weight[down], part_bias, CHECKED_ROWS, sampled_columns)
            reference[across, down] = exact
    return reference


def verify(exact: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int) -> None:
    """Compares `exact` with the same product on the CPU, at `rows` × `columns` places; raises ReferenceWrong."""
    import torch

    across = torch.tensor(spread(x.shape[0], rows), device=x.device)
    down = torch.tensor(spread(weight.shape[0], columns), device=x.device)
    expected = x[across].cpu().double() @ weight[down].cpu().double().T
    if bias is not None:
        expected += bias[down].cpu().double()
    difference = float((exact[across][:, down].cpu() - expected).norm())
    error = difference / float(expected.norm()) if difference else 0.0
    if not error < REFERENCE_LIMIT:  # also when it is NaN
        raise ReferenceWrong(f"the float64 reference itself is off by {error:.2g}")


class Launcher:
    """Makes a repeatable launch of x·Wᵀ + bias: a replayed CUDA graph on a GPU, a plain call on a CPU."""

    def __init__(self, device: str) -> None:
        import torch

        self._side = torch.cuda.Stream() if device == "cuda" else None

    def prepare(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
        """A launch whose result is NaN wherever the product wrote nothing. Every launch reuses the same buffer."""
        import torch
        from torch.nn.functional import linear  # what vLLM's unquantised layers call

        if self._side is None:
            return lambda: linear(x, weight, bias)
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):  # libraries set themselves up outside the capture
            linear(x, weight, bias)
        torch.cuda.current_stream().wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = linear(x, weight, bias)

        def launch() -> Tensor:
            result.fill_(math.nan)
            graph.replay()
            return result

        return launch


def compare(launch: Callable[[], Tensor], reference: Tensor, repeats: int) -> tuple[float, bool]:
    """The worst tile error over `repeats` launches, NOT_FINITE at most, and whether they differ in any bit."""
    first = launch().clone()
    errors, unstable = [tile_error(first, reference)], False
    for _ in range(repeats - 1):
        again = launch()
        if not _same_bits(first, again):
            unstable = True
            errors.append(tile_error(again, reference))
    return max(error if math.isfinite(error) else NOT_FINITE for error in errors), unstable


def _same_bits(a: Tensor, b: Tensor) -> bool:
    import torch

    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(torch.equal(a.view(bits), b.view(bits)))


def check_product(
    product: dict[str, Any], launcher: Launcher, generator: Generator, dtype: DType, repeats: int
) -> Iterator[dict[str, Any]]:
    """One answer per batch size, ascending: {"product", "rows", "columns", "inner", "worst_error", "unstable"}.

    Weights are N(0, 1/inner), inputs and bias N(0, 1), so every output is about N(0, 1). The inputs of a batch
    size are the first rows of the largest one's, so that one reference serves all.
    """
    import torch

    inner, columns, sizes = product["inner"], product["columns"], sorted(product["rows"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)

    weight = normal(columns, inner).mul_(inner**-0.5)
    x = normal(sizes[-1], inner)
    bias = normal(columns) if product["bias"] else None
    reference = reference_of(x, weight, bias)
    for rows in sizes:
        launch = launcher.prepare(x[:rows], weight, bias)
        worst_error, unstable = compare(launch, reference[:rows], repeats)
        yield {
            "product": product["name"],
            "rows": rows,
            "columns": columns,
            "inner": inner,
            "worst_error": float(f"{worst_error:.3g}"),
            "unstable": unstable,
        }


def run(config: dict[str, Any], answers: TextIO) -> None:
    """Checks every product of `config` and writes the lines of the answer. Raises OutOfTime at its deadline."""
    started_s = time.monotonic()
    faulthandler.dump_traceback_later(config["deadline_s"] + STUCK_S, exit=True)
    import torch

    gc.freeze()  # each capture collects garbage; without this it would walk all of torch every time
    device, dtype = config.get("device", "cuda"), getattr(torch, config["dtype"])
    sms = torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 0
    generator = torch.Generator(device)
    generator.manual_seed(config["seed"])
    with torch.inference_mode():
        launcher = Launcher(device)
        for product in config["products"]:
            for answer in check_product(product, launcher, generator, dtype, config["repeats"]):
                _write(answers, answer | {"sms": sms})
                if time.monotonic() - started_s > config["deadline_s"]:
                    raise OutOfTime(f"not done after {config['deadline_s']:g} s, at {answer['product']}")
    _write(answers, {"done": True, "sms": sms, "seconds": round(time.monotonic() - started_s, 3)})
    faulthandler.cancel_dump_traceback_later()


def _write(answers: TextIO, line: dict[str, Any]) -> None:
    answers.write(json.dumps(line) + "\n")
    answers.flush()


def main() -> None:
    end_with_parent()
    config = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    run(config, answers)


if __name__ == "__main__":
    main()
