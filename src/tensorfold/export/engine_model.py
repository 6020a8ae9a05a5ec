"""Exported models, run: a graph of ONNX Runtime or OpenVINO as a transformers model that evaluates and generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tensorfold.errors import InputError, pass_on_memory, reason
from tensorfold.export.last_logits import NAME, add_openvino_input
from tensorfold.export.tracing import check_packages
from tensorfold.hf.sources import Source, find_model
from tensorfold.utils.records import read_object

# What an exported directory says of itself: engine, bits, parameters, and how far its logits were from the model's.
MANIFEST = "engine.json"
FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
WEIGHTS = {"onnx": "model.onnx*", "openvino": "openvino_model.*"}


# By the name of the dtype that is asked for.
_COMPUTED_IN = {**dict.fromkeys(("None", "auto", "float32"), torch.float32), "bfloat16": torch.bfloat16}
_TYPES = {32: "float32", 16: "float16", 8: "int8", 4: "int4"}


class EngineCache(Cache):
    """What an engine keeps of the tokens so far; :attr:`state` is the engine's own form of it."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.length = 0
        self.state: Any = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that were read."""
        return self.length

    @property
    def is_initialized(self) -> bool:
        return self.length > 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise InputError("an exported model was asked for beams; needed one row of tokens: set num_beams=1.")


class EngineModel(PreTrainedModel, GenerationMixin):
    """A graph with a cache, called as any causal language model is; on the CPU, without parameters of torch's.

    Attributes:
        engine: ``onnx`` or ``openvino``.
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
        self.stored_type = f"{self.engine} {_TYPES[manifest['bits']]}{rounded}"
        self.stored_parameters: int = manifest["parameters"]
        self.stored_bytes = file_bytes(directory, self.engine)
        self.name_or_path = str(directory)
        check_packages(self.engine)
        file = directory / FILES[self.engine]
        self._session = _OnnxSession(file) if self.engine == "onnx" else _OpenVINOSession(file, computed_in)

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


class _OnnxSession:
    """ONNX Runtime; keys and values go from call to call in its own memory."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Or the threads of one graph still spin, for work that will not come, while another is timed.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        optional = self._session.get_overridable_initializers()
        self._inputs = {value.name: value.shape for value in (*self._session.get_inputs(), *optional)}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, feed: dict[str, Tensor], cache: EngineCache) -> Tensor:
        from onnxruntime import OrtValue

        given = {
            name: OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in feed.items() if name in self._inputs
        }
        if cache.state is None:
            batch = len(feed["input_ids"])
            empty = {
                name: torch.zeros(batch, shape[1], 0, shape[3]).numpy()
                for name, shape in self._inputs.items()
                if name.startswith("past_key_values.")
            }
            cache.state = {name: OrtValue.ortvalue_from_numpy(value) for name, value in empty.items()}
        results = self._session.run_with_ort_values(self._outputs, {**given, **cache.state})
        found = dict(zip(self._outputs, results, strict=True))
        logits = torch.from_numpy(found.pop("logits").numpy())
        cache.state = {name.replace("present.", "past_key_values."): value for name, value in found.items()}
        return logits


class _OpenVINOSession:
    """OpenVINO; keys and values are the state of its one request, so that one cache is in use at a time."""

    def __init__(self, file: Path, computed_in: torch.dtype) -> None:
        import openvino

        precision = "bf16" if computed_in == torch.bfloat16 else "f32"
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # By default it depends on the processor: some compute in bfloat16 and keep keys and values in eight bits.
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
        }
        program = openvino.Core().read_model(str(file))
        add_openvino_input(program)
        compiled = openvino.Core().compile_model(program, "CPU", options)
        self._names = {port.get_any_name() for port in compiled.inputs}
        self._request = compiled.create_infer_request()
        self._cache: EngineCache | None = None

    def __call__(self, feed: dict[str, Tensor], cache: EngineCache) -> Tensor:
        if cache.state is None:
            self._request.reset_state()
            self._cache, cache.state = cache, True
        if self._cache is not cache:
            raise InputError("OpenVINO holds another cache by now; needed the one of its latest prompt: read it again.")
        feed["beam_idx"] = torch.arange(len(feed["input_ids"]), dtype=torch.int32)
        given = {name: tensor.numpy() for name, tensor in feed.items() if name in self._names}
        return torch.from_numpy(self._request.infer(given)["logits"]).float()


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
        if computed_in is None or (computed_in != torch.float32 and engine == "onnx"):
            raise InputError(
                f"{self.name} is an exported graph; got the dtype {dtype}, needed float32 or none"
                f"{'' if engine == 'onnx' else ', or bfloat16'}: its weights stay as --bits of tensorfold export said, "
                "and the dtype is what it computes in."
            )
        if device not in (None, "cpu"):
            raise InputError(
                f"{self.name} runs on the CPU, as exported graphs do; got the device {device}, needed none."
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
    """Whether ``name`` is a directory that ``tensorfold export --to onnx`` or ``openvino`` wrote."""
    return (Path(name) / MANIFEST).is_file()


def find_runnable(name: str) -> Source:
    """As :func:`~tensorfold.hf.sources.find_model`, and exported directories too."""
    found = find_model(name)
    return EngineSource(found.name, found.place) if is_exported(name) else found


def open_exported(directory: str | Path, computed_in: torch.dtype = torch.float32) -> EngineModel:
    """The graph of an exported directory as a model.

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
    """Bytes of the graph and its weights."""
    return sum(file.stat().st_size for file in directory.glob(WEIGHTS[engine]))
