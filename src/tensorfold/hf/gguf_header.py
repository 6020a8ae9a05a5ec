"""The header of a GGUF file: metadata, and the name, shape and type of every tensor.

Layout, little-endian: ``GGUF``, version, counts of tensors and of metadata, the metadata, then each tensor's name,
dimensions (fastest first), type and offset. Nothing of the weights is read.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from tensorfold.errors import InputError, pass_on_memory

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Names of ggml_type by number; numbers that are missing were taken out of the format.
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_UNQUANTISED = {"F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"}
_LONGEST = 2**28  # bytes of a string, or elements of an array: no sound header has more


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a GGUF file.

    Attributes:
        name: Name in the file.
        shape: Shape in torch's order, slowest dimension first.
        type: ggml's name of its type.
    """

    name: str
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class GGUFHeader:
    """Header of a GGUF file.

    Attributes:
        file: Name of the file.
        bytes: Size of the whole file.
        metadata: Values by key.
        tensors: All tensors, in the order of the file.
    """

    file: str
    bytes: int
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Count of numbers by ggml type, most first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.type] += prod(tensor.shape)
        return dict(counts.most_common())

    @property
    def quantised(self) -> bool:
        """Whether any tensor is of a quantised type."""
        return any(kind not in _UNQUANTISED for kind in self.numbers)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without metadata and single tensors."""
        return {"file": self.file, "bytes": self.bytes, "numbers": self.numbers, "quantised": self.quantised}


def read_gguf_header(path: str | Path) -> GGUFHeader:
    """Read the header of a GGUF file.

    Raises:
        InputError: The file is no GGUF file, or cut short or damaged before its weights.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            return GGUFHeader(path.name, path.stat().st_size, *_parse(stream))
    except (struct.error, ValueError, KeyError, OSError) as error:
        pass_on_memory(error)
        raise InputError(
            f"{path}: cannot be read as a GGUF model ({error}); copy the file again, or give another."
        ) from error


def _parse(stream: BinaryIO) -> tuple[dict[str, Any], tuple[GGUFTensor, ...]]:
    if stream.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := _scalar(stream, "I")) not in (2, 3):
        raise ValueError(f"version {version}; needed 2 or 3")
    tensors, entries = _count(stream), _count(stream)
    metadata = {}
    for _ in range(entries):
        key = _string(stream)
        metadata[key] = _value(stream, _scalar(stream, "I"))
    return metadata, tuple(_tensor(stream) for _ in range(tensors))


def _tensor(stream: BinaryIO) -> GGUFTensor:
    name = _string(stream)
    dimensions = [_count(stream) for _ in range(_scalar(stream, "I"))]
    kind = _scalar(stream, "I")
    _scalar(stream, "Q")  # where its weights begin
    return GGUFTensor(name, tuple(reversed(dimensions)), _TYPES.get(kind, f"ggml type {kind}"))


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(stream)
    if kind != _ARRAY:
        return _scalar(stream, _SCALARS[kind])
    of, count = _scalar(stream, "I"), _count(stream)
    if of in _SCALARS:
        form = struct.Struct(f"<{count}{_SCALARS[of]}")
        return list(form.unpack(_exactly(stream, form.size)))
    return [_value(stream, of) for _ in range(count)]


def _scalar(stream: BinaryIO, form: str) -> Any:
    form = f"<{form}"
    return struct.unpack(form, _exactly(stream, struct.calcsize(form)))[0]


def _count(stream: BinaryIO) -> int:
    count = int(_scalar(stream, "Q"))
    if count > _LONGEST:
        raise ValueError(f"{count} entries, more than any header has")
    return count


def _string(stream: BinaryIO) -> str:
    return _exactly(stream, _count(stream)).decode("utf-8", errors="replace")


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise ValueError("it ends before its weights begin")
    return data
