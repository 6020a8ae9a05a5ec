"""Weights of a checkpoint read tensor by tensor from their files, with the model itself on the meta device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from tensorfold.errors import InputError, pass_on_memory, reason
from tensorfold.hf.checks import check_files, shards
from tensorfold.hf.loading import load_config
from tensorfold.hf.shard_writer import ShardWriter
from tensorfold.models.anatomy import count_parameters, empty_model
from tensorfold.utils.memory import release_file_pages

_PIECE = 2**20  # numbers written at a time
_HALF = (torch.float16, torch.bfloat16)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class NotStoredError(InputError):
    """The tensors on the disk are not the model's weights one by one; loading it whole may still convert them."""


@dataclass(frozen=True)
class Stored:
    """A model on the meta device, and the places of its weights on the disk.

    Attributes:
        directory: Directory of the checkpoint.
        model: Model without weights.
        files: File and name in it of every tensor in the model's state dictionary, except tied weights; by the model's
            name.
    """

    directory: Path
    model: PreTrainedModel
    files: Mapping[str, tuple[Path, str]]

    def tensor(self, name: str) -> Tensor:
        """Weight mapped from its file: it is read when it is used, and takes no memory once it is let go.

        Raises:
            InputError: The file is damaged.
        """
        path, key = self.files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            pass_on_memory(error)
            raise InputError(f"{path}: {key} cannot be read ({reason(error)}); copy the checkpoint again.") from error

    def signature(self) -> dict[str, object]:
        """Facts by name that are equal wherever this checkpoint is read: configuration, file sizes, shapes, dtypes."""
        sizes = {str(path.name): path.stat().st_size for path, _ in self.files.values()}
        weights = {name: (tuple(t.shape), str(t.dtype)) for name, t in self.model.state_dict().items()}
        return {"configuration": self.model.config.to_json_string(), **sizes, **weights}


def find_stored(path: str) -> Stored:
    """Find the weights of a checkpoint on the disk.

    Args:
        path: Directory that ``save_pretrained`` wrote, or a hub id whose snapshot is on this machine.

    Raises:
        NotStoredError: The weights are not all there as safetensors of one floating dtype, under the model's own names
            and in its own shapes, or loading would change them.
        InputError: There is no such model, or none can be built from its configuration.
    """
    config = load_config(path)
    if getattr(config, "quantization_config", None) is not None:
        raise NotStoredError(f"{path}: its weights are quantised or folded.")
    directory = _directory(path)
    found = _tensors(directory)
    dtypes = {dtype for _, _, dtype in found.values() if dtype.is_floating_point}
    if len(dtypes) != 1 or config.dtype not in (None, *dtypes):
        shown = ", ".join(sorted(str(dtype) for dtype in dtypes)) or "no floating dtype"
        raise NotStoredError(f"{directory}: holds {shown}, its configuration says {config.dtype}.")
    [config.dtype] = dtypes
    model = empty_model(config)
    if _is_converted(model):
        raise NotStoredError(f"{type(model).__name__}: transformers converts its weights on loading.")
    if model._keep_in_fp32_modules_strict and config.dtype in _HALF:
        raise NotStoredError(f"{type(model).__name__}: keeps some of its weights in float32.")
    if model._keep_in_fp32_modules and config.dtype == torch.float16:
        raise NotStoredError(f"{type(model).__name__}: keeps some of its weights in float32.")
    files = {name: (file, key) for name, (file, key) in _matched(directory, model, found).items()}
    _describe_generation(directory, model)
    return Stored(directory, model, files)


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors of a model that its checkpoint holds, by name: its state dictionary without tied weights.

    Raises:
        NotStoredError: A tensor has two names, without being known as tied.
    """
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    own = {name: model.get_parameter_or_buffer(name) for name in model.state_dict() if name not in left_out}
    if len({id(tensor) for tensor in own.values()}) != len(own):
        raise NotStoredError(f"{type(model).__name__}: shares weights in a way of its own.")
    state = model.state_dict()  # where orders have the type that they are stored in
    return {name: tensor if state[name].dtype == tensor.dtype else state[name] for name, tensor in own.items()}


def save_configuration(model: PreTrainedModel, directory: Path) -> None:
    """Write the files that ``save_pretrained`` writes beside the weights: config.json and generation_config.json."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def save_in_pieces(model: PreTrainedModel, directory: Path, max_bytes: int) -> None:
    """Write weights and configuration as ``save_pretrained`` does, without more than a piece of a weight in memory.

    Args:
        model: Folded; its parameters may be mapped from files, which are not written to.
        directory: Directory that is there.
        max_bytes: Most bytes of a file.
    """
    own = own_tensors(model)
    with ShardWriter(directory, own, count_parameters(model), max_bytes) as writer:
        for name, tensor in own.items():
            flat = tensor.detach().reshape(-1)
            for start in range(0, flat.numel(), _PIECE):
                piece = flat[start : start + _PIECE]
                writer.write(name, piece, start)
                release_file_pages(piece)
    save_configuration(model, directory)


def _directory(path: str) -> Path:
    """Local directory of a checkpoint; for a hub id its snapshot in the cache."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(cached_file(path, "config.json")).parent
    except OSError as error:
        pass_on_memory(error)
        raise NotStoredError(f"{path}: no snapshot of it on this machine.") from error


def _tensors(directory: Path) -> dict[str, tuple[Path, tuple[int, ...], torch.dtype]]:
    """File, shape and dtype of every tensor in a directory, by its name; only headers are read."""
    files = [directory / "model.safetensors"]
    index = directory / "model.safetensors.index.json"
    check_files(directory)
    if not files[0].is_file() and index.is_file():
        files = shards(index)
    try:
        found = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                    part = tensors.get_slice(name)
                    found[name] = file, tuple(part.get_shape()), _DTYPES[part.get_dtype()]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        pass_on_memory(error)
        raise NotStoredError(f"{directory}: no safetensors that can be read ({reason(error)}).") from error
    return found


def _matched(
    directory: Path, model: PreTrainedModel, found: Mapping[str, tuple[Path, tuple[int, ...], torch.dtype]]
) -> dict[str, tuple[Path, str]]:
    """File and name in it of each of the model's tensors, by the model's name.

    A checkpoint of the body alone lacks the first part of every name.

    Args:
        directory: The checkpoint's, for messages.
        model: Model on the meta device.
        found: File, shape and dtype of the tensors in the directory.

    Raises:
        NotStoredError: A tensor is missing, too many, or of another shape or dtype.
    """
    own = own_tensors(model)
    ignored = re.compile("|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_unexpected or ()) or "$^")
    files = {}
    for key, (file, shape, dtype) in found.items():
        name = next((n for n in (key, f"{model.base_model_prefix}.{key}") if n in own), None)
        if name is None and ignored.search(key):
            continue
        if name is None or name in files:
            raise NotStoredError(f"{directory}: {key} is none of the model's weights, or there twice.")
        if (shape, dtype) != (tuple(own[name].shape), own[name].dtype):
            raise NotStoredError(f"{directory}: {key} is {dtype} {shape}; the model's is {own[name].shape}.")
        files[name] = file, key
    absent = [name for name in own if name not in files]
    if absent:
        raise NotStoredError(f"{directory}: has no {absent[0]}.")
    return files


def _is_converted(model: PreTrainedModel) -> bool:
    """Whether transformers renames or rearranges this architecture's weights between the files and the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def _describe_generation(directory: Path, model: PreTrainedModel) -> None:
    """Give a model its generation settings as ``from_pretrained`` does: from their file, else from config.json.

    Raises:
        InputError: The file is damaged.
    """
    if not model.can_generate():
        return
    try:
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory)
        except OSError as error:
            pass_on_memory(error)
            model.generation_config = GenerationConfig.from_pretrained(
                directory, config_file_name="config.json", _from_model_config=True
            )
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{directory}: generation_config.json cannot be used ({reason(error)}); correct it, or delete it."
        ) from error
