"""What this process's GPU can do at best: a large copy and a large matrix product. Prints one JSON object.

`python -m advisor.shell.ceilings_worker [DEVICE]`. The best of many repetitions, timed on the device; random numbers,
since products of zeros are faster. A failure is an exception: its last line says what went wrong, the exit code is 1.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise

from advisor.shell.processes import end_with_parent

REPEATS = 20
LARGEST_COPY_BYTES = 4 << 30
PRODUCT = 8192


def measure(device: str, copy_bytes: int, size: int, repeats: int) -> dict[str, float]:
    """`copy_bytes_per_s` counts bytes read and bytes written; `bf16_flops_per_s` two operations per multiply-add."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    random = {"generator": generator, "dtype": torch.bfloat16, "device": device}
    source = torch.randn(copy_bytes // 2, **random)
    target = torch.empty_like(source)
    copy_s = _best_s(lambda: target.copy_(source), device, repeats)
    a, b = torch.randn((size, size), **random), torch.randn((size, size), **random)
    product_s = _best_s(lambda: a @ b, device, repeats)
    return {"copy_bytes_per_s": 2 * copy_bytes / copy_s, "bf16_flops_per_s": 2 * size**3 / product_s}


def _best_s(work: Callable[[], object], device: str, repeats: int) -> float:
    import torch

    for _ in range(3):
        work()
    if device != "cuda":
        taken = []
        for _ in range(repeats):
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)
        return min(taken)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return float(min(left.elapsed_time(right) for left, right in pairwise(events))) / 1000


def main() -> None:
    end_with_parent()
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        found = measure(device, min(LARGEST_COPY_BYTES, free // 8 * 2), PRODUCT, REPEATS)
    else:
        found = measure(device, 1 << 20, 64, 3)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
