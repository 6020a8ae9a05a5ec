"""Exported models, run: a graph of ONNX Runtime or OpenVINO, or a GGUF file in llama.cpp, as a transformers model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tensorfold.errors import InputError, pass_on_memory, reason
from tensorfold.export.engine_sessions import EngineCache, LlamaCppSession, OnnxSession, OpenVINOSession, Session
from tensorfold.export.last_logits import NAME
from tensorfold.export.tracing import check_packages
from tensorfold.hf.sources import Source, find_model
from tensorfold.models.anatomy import context_length
from tensorfold.utils.records import read_object

# What an exported directory says of itself: engine, bits, parameters, and how far its logits were from the model's.
MANIFEST = "engine.json"
LLAMA_CPP = "llama.cpp"
FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml", LLAMA_CPP: "*.gguf"}
WEIGHTS = {"onnx": "model.onnx*", "openvino": "openvino_model.*", LLAMA_CPP: "*.gguf"}

# By the name of the dtype that is asked for.
_COMPUTED_IN = {**dict.fromkeys(("None", "auto", "float32"), torch.float32), "bfloat16": torch.bfloat16}
_TYPES = {32: "float32", 16: "float16", 8: "int8", 4: "int4"}


class EngineModel(PreTrainedModel, GenerationMixin):
    """What an engine runs, called as any causal language model is; on the CPU, without parameters of torch's.

    Attributes:
        engine: ``onnx``, ``openvino`` or ``llama.cpp``.
        stored_parameters, stored_bytes: Of the exported model, and of its weight files.
        stored_type: Engine and type of a stored weight, such as ``onnx int4``, and what products round to if that is
            not float32: ``openvino int8, computed in bfloat16``.
    """

    main_input_name = "input_ids"

    def __init__(
        self,
        config: PreTrainedConfig,
        directory: Path,
        manifest: dict[str, Any],
        computed_in: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(config)
        self.engine: str = manifest["engine"]
        rounded = "" if computed_in == torch.float32 else f", computed in {str(computed_in).removeprefix('torch.')}"
        self.stored_type = f"{self.engine} {manifest.get('type') or _TYPES[manifest['bits']]}{rounded}"
        self.stored_parameters: int = manifest["parameters"]
        self.stored_bytes = file_bytes(directory, self.engine)
        self.name_or_path = str(directory)
        file = next(directory.glob(FILES[self.engine]), directory / FILES[self.engine])
        self._session = _session(self.engine, file, computed_in, context_length(config))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """Nothing: the table is the engine's."""

    def get_output_embeddings(self) -> None:
        """Nothing: the head is the engine's."""

    def can_generate(self) -> bool:  # type: ignore[override]
        return True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = True,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of further tokens.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, tokens before and these): 0 for padding, which lies on the left.
            position_ids: (batch, length); by default counted from the mask.
            past_key_values: From the call before; an empty one otherwise.
            logits_to_keep: Only those of the last this many tokens; all if 0.

        Returns:
            Logits (batch, length, vocabulary) in float32, and the cache.
        """
        cache = past_key_values if isinstance(past_key_values, EngineCache) else EngineCache()
        if cache is not past_key_values and past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise InputError("the cache is another model's; needed the one that this exported model returned.")
        batch, length = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(batch, cache.length + length, dtype=torch.long)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
        feed = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        feed[NAME] = torch.tensor([logits_to_keep])
        logits = self._session({name: tensor.long().contiguous() for name, tensor in feed.items()}, cache)
        cache.length += length
        return CausalLMOutputWithPast(
            logits=logits[:, -logits_to_keep:],  # type: ignore[arg-type]
            past_key_values=cache if use_cache is not False else None,
        )


def _session(engine: str, file: Path, computed_in: torch.dtype, context: int | None) -> Session:
    """A file opened in its engine.

    Raises:
        InputError: The engine is not installed.
    """
    if engine == LLAMA_CPP:
        if importlib.util.find_spec("llama_cpp") is None:
            raise InputError(
                f"{file.parent}: llama.cpp runs it, by the package llama-cpp-python, which is missing; run: "
                f"pip install llama-cpp-python, or give the file {file.name} itself, which transformers reads."
            )
        return LlamaCppSession(file, context)
    check_packages(engine)
    return OnnxSession(file) if engine == "onnx" else OpenVINOSession(file, computed_in)


class EngineSource(Source):
    """An exported directory."""

    def model(self, dtype: torch.dtype | str | None = None, device: str | None = None) -> PreTrainedModel:
        """The graph, ready to run.

        Args:
            dtype: What it computes in: float32 by default; bfloat16 in OpenVINO, as that does by default on processors
                with instructions for it. Weights stay as they are stored.
            device: The CPU.

        Raises:
            InputError: Another type, or another device than the CPU, is asked for, what runs the engine is not
                installed, or the files are damaged.
        """
        computed_in = _COMPUTED_IN.get(str(dtype).removeprefix("torch."))
        engine = (read_object(Path(self.path) / MANIFEST) or {}).get("engine")
        if computed_in is None or (computed_in != torch.float32 and engine != "openvino"):
            raise InputError(
                f"{self.name} is an exported model; got the dtype {dtype}, needed float32 or none"
                f"{', or bfloat16' if engine == 'openvino' else ''}: its weights stay as they are stored; the dtype is "
                "what it computes in."
            )
        if device not in (None, "cpu"):
            raise InputError(
                f"{self.name} runs on the CPU, as exported models do; got the device {device}, needed none."
            )
        return open_exported(self.path, computed_in)


def engine_dtype(engine: str) -> torch.dtype:
    """What an engine's products round to on this processor if nobody says otherwise: bfloat16 or float32."""
    if engine != "openvino":
        return torch.float32
    import openvino

    chosen = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
    return torch.bfloat16 if chosen == openvino.Type.bf16 else torch.float32


def is_exported(name: str | Path) -> bool:
    """Whether ``name`` is a directory that ``tensorfold export --to onnx``, ``openvino`` or ``gguf`` wrote."""
    return (Path(name) / MANIFEST).is_file()


def find_runnable(name: str) -> Source:
    """As :func:`~tensorfold.hf.sources.find_model`, and exported directories too."""
    found = find_model(name)
    return EngineSource(found.name, found.place) if is_exported(name) else found


def open_exported(directory: str | Path, computed_in: torch.dtype = torch.float32) -> EngineModel:
    """An exported directory as a model.

    Args:
        directory: What ``tensorfold export`` wrote.
        computed_in: float32, or bfloat16 in OpenVINO: what products and attention round to, and keys and values.

    Raises:
        InputError: The engine is not installed, or a file is missing or damaged.
    """
    path = Path(directory)
    manifest = read_object(path / MANIFEST) or {}
    if manifest.get("engine") not in FILES or manifest.get("bits") not in _TYPES or "parameters" not in manifest:
        raise InputError(f"{path / MANIFEST}: names no engine; needed what tensorfold export wrote: export again.")
    try:
        model = EngineModel(AutoConfig.from_pretrained(path), path, manifest, computed_in)
    except InputError:
        raise
    except Exception as error:  # each runtime has its own
        pass_on_memory(error)
        raise InputError(f"{path}: {manifest['engine']} cannot open it ({reason(error)}); export again.") from error
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def file_bytes(directory: Path, engine: str) -> int:
    """Bytes of the file or files that graph and weights are in."""
    return sum(file.stat().st_size for file in directory.glob(WEIGHTS[engine]))


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Say beside a file what runs it.

    Args:
        directory: Where the file is.
        manifest: ``engine``, ``bits`` of a stored weight and ``parameters``; ``type`` is the weights' where it is not
            float32, float16, int8 or int4. Whatever else is for readers.
    """
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
