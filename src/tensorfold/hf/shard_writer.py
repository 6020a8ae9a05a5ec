"""Writing safetensors files a piece at a time, so that no more than the piece is ever in memory.

Header, order of tensors, names and index of shards are as ``save_pretrained`` writes them. The format: eight bytes with
the length of a JSON header, the header, and the tensors' bytes one after another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

# Names of types, in the order in which the safetensors library puts tensors into a file, the last type first.
_TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: place for place, dtype in enumerate(_TYPES)}


class ShardWriter:
    """Weight files of a checkpoint, made at their full size and filled in any order.

    Args:
        directory: Directory for the files: ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` and their
            index.
        tensors: Names, shapes and dtypes of all tensors that will be written; on the meta device.
        parameters: Number of the model's parameters, for the index.
        max_bytes: Most bytes of a file; a larger tensor has a file of its own.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, Tensor], parameters: int, max_bytes: int) -> None:
        self.tensors = dict(tensors)
        self.missing = {name: tensor.nbytes for name, tensor in tensors.items()}
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files = ExitStack()
        split = split_torch_state_dict_into_shards(
            self.tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_bytes
        )
        for file, names in split.filename_to_tensors.items():
            self._make(directory / file, names)
        if split.is_sharded:
            metadata = {"total_parameters": parameters, **split.metadata}
            index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _make(self, path: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts: dict[str, int] = {}
        end = 0
        for name in sorted(names, key=lambda name: (-_ORDER[self.tensors[name].dtype], name)):
            tensor, starts[name] = self.tensors[name], end
            end += tensor.nbytes
            offsets = [starts[name], end]
            header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = self._files.enter_context(path.open("wb"))
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        self._places.update({name: (file, 8 + len(text) + start) for name, start in starts.items()})

    def write(self, name: str, piece: Tensor, start: int = 0) -> None:
        """Write a piece of a tensor to its place in the file.

        Args:
            name: Name of the tensor.
            piece: Consecutive numbers of it, of any shape, in its dtype.
            start: Index of the piece's first number in the flat tensor.

        Raises:
            ValueError: The piece has another dtype, or goes beyond the tensor's end.
        """
        expected = self.tensors[name]
        if piece.dtype != expected.dtype or start + piece.numel() > expected.numel():
            raise ValueError(f"{name}: got {piece.dtype} × {piece.numel()}; needed {expected.dtype} × {expected.shape}")
        file, place = self._places[name]
        file.seek(place + start * piece.element_size())
        file.write(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.missing[name] -= piece.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._files.close()
        unwritten = [name for name, left in self.missing.items() if left]
        if error is None and unwritten:
            raise ValueError(f"never written, or not once: {', '.join(unwritten)}")
