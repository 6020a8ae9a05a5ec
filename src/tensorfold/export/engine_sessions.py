"""What runs exported models: ONNX Runtime, OpenVINO or llama.cpp, each with a cache of its own form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tensorfold.errors import InputError
from tensorfold.export.last_logits import NAME, add_openvino_input

_LLAMA_CPP_CONTEXT = 4096  # tokens that it keeps keys and values of, at most


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


class Session(Protocol):
    """An opened model."""

    def __call__(self, feed: dict[str, Tensor], cache: EngineCache) -> Tensor:
        """Logits (batch, tokens, vocabulary) in float32 of further tokens, and ``cache.state`` for those after them.

        Args:
            feed: ``input_ids``, ``attention_mask`` and ``position_ids`` in int64, and ``num_logits_to_keep`` (1,): of
                how many tokens at the end of every row logits are wanted, all if 0. Others may be computed, too.
            cache: What came before; its state is None at the beginning.
        """


class OnnxSession:
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


class OpenVINOSession:
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
            raise InputError("OpenVINO holds another cache by now; needed that of its latest prompt: read it again.")
        feed["beam_idx"] = torch.arange(len(feed["input_ids"]), dtype=torch.int32)
        given = {name: tensor.numpy() for name, tensor in feed.items() if name in self._names}
        return torch.from_numpy(self._request.infer(given)["logits"]).float()


class LlamaCppSession:
    """llama.cpp, through the C interface of llama-cpp-python; it keeps the keys and values of one row of tokens.

    Several rows are read one after another, and cannot be gone on from.
    """

    def __init__(self, file: Path, context: int | None) -> None:
        import llama_cpp

        self._cpp = llama_cpp
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
        if not self._model:
            raise ValueError(f"llama.cpp does not read {file.name}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = self._room = min(context or _LLAMA_CPP_CONTEXT, _LLAMA_CPP_CONTEXT)
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._width: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._cache: EngineCache | None = None

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._cpp.llama_free(self._context)
        if getattr(self, "_model", None):
            self._cpp.llama_model_free(self._model)

    def __call__(self, feed: dict[str, Tensor], cache: EngineCache) -> Tensor:
        ids = feed["input_ids"]
        if cache.state is None:
            self._cache, cache.state = cache, len(ids)
        elif self._cache is not cache:
            raise InputError("llama.cpp holds another cache by now; needed that of its latest prompt: read it again.")
        elif cache.state != 1 or len(ids) != 1:
            raise InputError(f"llama.cpp goes on from one row of tokens; got {len(ids)}: generate one at a time.")
        length = ids.shape[1]
        if cache.length + length > self._room:
            raise InputError(f"llama.cpp was opened for {self._room:,} tokens; got {cache.length + length:,}.")
        wanted = min(int(feed[NAME]) or length, length)
        logits = torch.zeros(len(ids), wanted, self._width)
        for row, kept in enumerate(feed["attention_mask"][:, -length:].bool()):
            if cache.length == 0:
                self._cpp.llama_memory_clear(self._cpp.llama_get_memory(self._context), True)
            places = kept.nonzero()[:, 0].tolist()  # without padding, whose logits stay 0
            shown = [place for place in places if place >= length - wanted]
            found = self._decode(ids[row].tolist(), feed["position_ids"].expand_as(ids)[row].tolist(), places, shown)
            logits[row, [place - (length - wanted) for place in shown]] = found
        return logits

    def _decode(self, ids: list[int], positions: list[int], places: list[int], shown: list[int]) -> Tensor:
        """Read the tokens at some places of a row; logits (shown places, vocabulary)."""
        import ctypes

        import numpy as np

        cpp, wanted = self._cpp, set(shown)
        batch = cpp.llama_batch_init(len(places), 0, 1)
        try:
            batch.n_tokens = len(places)
            for index, place in enumerate(places):
                batch.token[index], batch.pos[index] = ids[place], positions[place]
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = place in wanted
            if places and (status := cpp.llama_decode(self._context, batch)):
                raise InputError(f"llama.cpp could not read {len(places)} tokens (its status {status}).")
            rows = []
            for index, place in enumerate(places):
                if place in wanted:
                    pointer = ctypes.cast(
                        cpp.llama_get_logits_ith(self._context, index), ctypes.POINTER(ctypes.c_float * self._width)
                    )
                    rows.append(torch.from_numpy(np.array(pointer.contents, dtype=np.float32)))
        finally:
            cpp.llama_batch_free(batch)
        return torch.stack(rows) if rows else torch.zeros(0, self._width)
