"""One graph for prompt and steps, with a cache of keys and values, by ``transformers.exporters``.

The graph is traced with two rows, one padded on the left, whose cache holds some tokens, and goes on by several: so
batch, tokens that are fed and tokens before them all stay free, and an empty cache makes it read a prompt.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tensorfold.data.tokens import table_rows
from tensorfold.errors import InputError, TensorfoldError, pass_on_memory
from tensorfold.export.last_logits import add_onnx_input
from tensorfold.export.onnx_attention import OPSET, merge_operations
from tensorfold.export.openvino_attention import plain_repeats
from tensorfold.models.experts import stacks
from tensorfold.nn import FoldedModule

PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
    "gguf": ("gguf",),
}

# Folding constants is for shape arithmetic, a few numbers each. With the usual limit of 8192 numbers the optimiser
# would also store transposed copies of cores, and of those that embedding and head share.
_LARGEST_CONSTANT = 64

_NO_CACHE = (
    "{} ({}): keeps something else than keys and values of every layer between two tokens, or takes more than text; "
    "needed a decoder with attention alone. Take --to dense."
)


def check_packages(to: str = "onnx") -> None:
    """Raise :class:`InputError` unless everything that writes and runs the files of an engine is installed."""
    missing = [package for package in PACKAGES[to] if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(
            f"export --to {to} needs the packages {', '.join(PACKAGES[to])}, and {', '.join(missing)} is missing; "
            f"run: pip install {' '.join(missing)}"
        )
    if to != "gguf" and importlib.util.find_spec("transformers.exporters") is None:
        raise InputError(f"export --to {to} needs transformers 5.23 or later; run: pip install 'transformers>=5.23'")


def probe(model: PreTrainedModel, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random tokens (batch, length), fewer where the model has fewer positions, always the same; and a mask of ones."""
    config = model.config.get_text_config()
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(table_rows(model) or config.vocab_size, (batch, length), generator=generator).to(model.device)
    return ids, torch.ones_like(ids)


@torch.no_grad()
def step_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """What the model's forward takes for two further tokens of two rows, the first of them padded on the left.

    Raises:
        InputError: The model has no cache of keys and values, it cannot generate, or its experts are folded.
    """
    from transformers.exporters.utils import decompose_for_generation

    name = type(model).__name__
    if not model.can_generate():
        raise InputError(f"{name} does not generate text; needed a causal language model. Take --to dense.")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise InputError(_NO_CACHE.format(name, model.config.model_type))
    if folded := next(iter(stacks(model)), None):
        raise InputError(
            f"{name}: {folded} is folded, and in a graph the experts of a layer are one tensor, so that all would be "
            "multiplied out; needed experts as they were. Take --to dense and export that, or fold without experts."
        )
    ids, mask = probe(model, 2, 6)
    mask[0, :2] = 0
    # Whole caches, also where attention looks at a window: the mask hides what is too far away.
    given = {"input_ids": ids, "attention_mask": mask, "past_key_values": DynamicCache()}
    with _plain_generation(model):
        stages = decompose_for_generation(model, given, multi_token_decode=True)
    inputs: dict[str, Any] = stages["decode"][1]
    cache = inputs.get("past_key_values")
    layers = getattr(cache, "layers", [])
    held = [getattr(layer, "keys", None) for layer in layers]
    if len(stages) != 2 or not held or not all(isinstance(keys, Tensor) and keys.dim() == 4 for keys in held):
        raise InputError(_NO_CACHE.format(name, model.config.model_type))
    return inputs


def trace(model: PreTrainedModel, to: str) -> Any:
    """The program of an engine in float32; cores are its constants.

    Args:
        model: In evaluation mode, float32, on the CPU.
        to: ``onnx`` for an ``onnx_ir.Model`` that takes and gives the cache, ``openvino`` for an ``openvino.Model``
            that keeps it as its state.

    Raises:
        InputError: The model is of a kind that no graph with a cache can be made of.
        TensorfoldError: The exporter cannot trace this architecture.
    """
    try:
        with _quiet(), _whole_attention(model), _chained(model):
            inputs = step_inputs(model)
            return (_trace_onnx if to == "onnx" else _trace_openvino)(model, inputs)
    except InputError:
        raise
    # The tracer fails in as many ways as models can be written.
    except Exception as error:
        pass_on_memory(error)
        cause = error.__cause__ or error
        first = (str(cause).strip().splitlines() or [""])[0][:300]
        raise TensorfoldError(
            f"{type(model).__name__}: transformers.exporters cannot trace it ({type(cause).__name__}: {first}); "
            "export it with --to dense, and convert that with a tool made for this architecture."
        ) from error


def _trace_onnx(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    from onnxscript import optimizer
    from torch.onnx.errors import OnnxExporterError
    from transformers.exporters import OnnxConfig, OnnxExporter

    def export(opset: int | None) -> Any:
        config = OnnxConfig(dynamic=True, dynamic_shapes=_free_axes(inputs), optimize=False, opset_version=opset)
        return OnnxExporter().export_program(model, inputs, config)[0]

    try:
        program = export(OPSET)
    except OnnxExporterError:  # heads that share their keys without being told to, as Falcon's: no Attention says so
        program = export(None)
    optimizer.optimize(program, input_size_limit=_LARGEST_CONSTANT, output_size_limit=_LARGEST_CONSTANT)
    merge_operations(program)
    _name_like_the_runtimes(program)
    _drop_origins(program)
    add_onnx_input(program)
    return program


def _trace_openvino(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    config = OpenVINOConfig(dynamic=True, dynamic_shapes=_free_axes(inputs))
    program = OpenVINOExporter().export_program(model, inputs, config)[0]
    plain_repeats(program)
    return program


def _free_axes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What may vary: batch and lengths, not the heads and their width."""
    auto, static = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    axes: dict[str, Any] = {
        name: dict.fromkeys(range(value.dim()), auto) for name, value in inputs.items() if isinstance(value, Tensor)
    }
    layers = inputs["past_key_values"].layers
    axes["past_key_values"] = [{0: auto, 1: static, 2: auto, 3: static} for _ in range(2 * len(layers))]
    return {name: axes[name] for name in inputs if name in axes}


def _name_like_the_runtimes(program: Any) -> None:
    """Give inputs, outputs and free axes the names that onnxruntime-genai, Optimum and transformers.js look for."""
    graph = program.graph
    for values, after in ((graph.inputs, "past_key_values"), (graph.outputs, "present")):
        for value in values:
            parts = value.name.split(".")
            if "layers" in parts:
                at = parts.index("layers")
                value.name = f"{after}.{parts[at + 1]}.{parts[at + 2].removesuffix('s')}"
    import onnx_ir

    lengths = {
        "input_ids": "sequence_length",
        "position_ids": "sequence_length",
        "logits": "logits_length",
        "attention_mask": "total_sequence_length",
    }
    for value in (*graph.inputs, *graph.outputs):
        axis, length = 1, lengths.get(value.name)
        if length is None:
            axis = 2
            length = "past_sequence_length" if value.name.startswith("past") else "total_sequence_length"
        shape = list(value.shape)
        shape[0], shape[axis] = "batch_size", length
        value.shape = onnx_ir.Shape(shape)


def _drop_origins(program: Any) -> None:
    """Remove what the exporter notes at every node: stack traces, which name this machine's paths."""
    for node in program.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*program.graph.inputs, *program.graph.initializers.values()):
        value.metadata_props.clear()
    program.graph.metadata_props.clear()
    program.metadata_props.clear()


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Generate greedily and to the end, whatever the checkpoint's own settings are."""
    from transformers import GenerationConfig

    before = model.generation_config
    padding = before.pad_token_id if before.pad_token_id is not None else 0
    model.generation_config = GenerationConfig(pad_token_id=padding, do_sample=False, use_cache=True)
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _whole_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention by torch's own product, which is what the exporters turn into an engine's."""
    before = model.config._attn_implementation
    if before in ("sdpa", "eager"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _chained(model: PreTrainedModel) -> Iterator[None]:
    """Folded layers go through their cores: a matrix that is multiplied out would be a constant of the graph."""
    folded = [module for module in model.modules() if isinstance(module, FoldedModule) and "chain" in module.ways]
    before = {module: module.way for module in folded}
    for module in before:
        module.way = "chain"
    for module in folded:
        module.settle_orders(True)
    try:
        yield
    finally:
        for module, way in before.items():
            module.way = way
        for module in folded:
            module.settle_orders(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' notices (versions, progress, a node was not folded) from the user."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
