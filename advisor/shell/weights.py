"""Writes stand-in weights as one safetensors file: 8 bytes of header length, a JSON header, then the tensors.

Format: the safetensors specification (little-endian, data offsets relative to the end of the header).
"""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from advisor.core.weights import STANDARD_DEVIATION, Tensor

FILE = "model.safetensors"
# One block of random values is drawn and read from ever new places. Its length is a prime, so that no two rows of
# a matrix are the same: rows would have to be a multiple of it apart.
_BLOCK_VALUES = 1_000_003
_NUMBER_BYTES = 2
_SEED = 20251
# What has to stay free on the disk besides the file.
_SPARE_BYTES = 4 << 30


def file_bytes(tensors: Sequence[Tensor]) -> int:
    return _NUMBER_BYTES * sum(math.prod(tensor.shape) for tensor in tensors)


def room_for(tensors: Sequence[Tensor], folder: Path) -> bool:
    """Whether the file fits on this disk with something to spare."""
    return shutil.disk_usage(folder).free >= file_bytes(tensors) + _SPARE_BYTES


def write(tensors: Sequence[Tensor], dtype: str, folder: Path) -> Path:
    """Write the tensors in `dtype` ("bfloat16" or "float16"). The same tensors always give the same file."""
    names = {"bfloat16": "BF16", "float16": "F16"}
    header: dict[str, object] = {}
    offset = 0
    for tensor in tensors:
        end = offset + _NUMBER_BYTES * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": names[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    noise = _Noise(dtype)
    path = folder / FILE
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            size = math.prod(tensor.shape)
            if tensor.ones:
                file.write(_encode([1.0], dtype) * size)
            else:
                noise.write(file, size)
    return path


class _Noise:
    """Normal values, `STANDARD_DEVIATION` wide, handed out one stretch after another."""

    def __init__(self, dtype: str) -> None:
        draw = random.Random(_SEED)
        block = _encode([draw.gauss(0.0, STANDARD_DEVIATION) for _ in range(_BLOCK_VALUES)], dtype)
        self._block = memoryview(block)
        self._at = 0

    def write(self, file: BinaryIO, values: int) -> None:
        while values:
            count = min(values, _BLOCK_VALUES - self._at)
            file.write(self._block[_NUMBER_BYTES * self._at : _NUMBER_BYTES * (self._at + count)])
            self._at = (self._at + count) % _BLOCK_VALUES
            values -= count


def _encode(values: Sequence[float], dtype: str) -> bytes:
    """Numbers as 16-bit floats, little-endian; bfloat16 is the upper half of a float32, cut off."""
    if dtype == "float16":
        return struct.pack(f"<{len(values)}e", *values)
    words = memoryview(struct.pack(f"<{len(values)}f", *values)).cast("H")
    upper = array("H", words[1::2])
    return upper.tobytes()
