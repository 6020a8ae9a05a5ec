"""A causal language model as an ONNX graph: traced, kept small, and compared with the model it came from."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorfold.data.tokens import table_rows
from tensorfold.errors import InputError, TensorfoldError, pass_on_memory

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# Folding constants is for shape arithmetic, a few numbers each. With the usual limit of 8192 numbers the optimiser
# would also store transposed copies of cores, and of those that embedding and head share.
_LARGEST_CONSTANT = 64


class _Logits(nn.Module):
    """The model as a function of two tensors, without a cache of keys and values."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def check_packages() -> None:
    """Raise :class:`InputError` unless everything that writes and runs ONNX files is installed."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(
            f"export --to onnx needs the packages {', '.join(PACKAGES)}, and {', '.join(missing)} is missing; "
            f"run: pip install {' '.join(missing)}"
        )


@torch.no_grad()
def trace(model: PreTrainedModel) -> ONNXProgram:
    """``(input_ids, attention_mask) -> logits`` with any batch size and length; cores are initialisers of the graph.

    Args:
        model: In evaluation mode, float32. Inputs are (batch, length) int64, logits (batch, length, vocabulary).

    Raises:
        TensorfoldError: The exporter cannot trace this architecture.
    """
    inputs = probe(model, 2, 7)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    try:
        with _quiet():
            from onnxscript import optimizer

            program = torch.onnx.export(
                _Logits(model).eval(),
                inputs,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=(axes, axes),
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            optimizer.optimize(program.model, input_size_limit=_LARGEST_CONSTANT, output_size_limit=_LARGEST_CONSTANT)
    # The tracer fails in as many ways as models can be written.
    except Exception as error:
        pass_on_memory(error)
        first = (str(error).strip().splitlines() or [""])[0][:300]
        raise TensorfoldError(
            f"{type(model).__name__}: torch.onnx cannot trace it ({type(error).__name__}: {first}); "
            "export it with --to dense, and convert that with a tool made for this architecture."
        ) from error
    _drop_origins(program.model)
    return program


def compare(path: Path, model: PreTrainedModel) -> tuple[float, float]:
    """Run the file with onnxruntime beside the model, at several batch sizes and lengths, with and without padding.

    Returns:
        Largest difference of any logit that is not at padding, and the largest magnitude of one.

    Raises:
        TensorfoldError: A logit is not finite.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    difference = largest = 0.0
    for batch, length in ((1, 1), (2, 7), (3, 40)):
        ids, mask = probe(model, batch, length)
        mask[0, (length + 1) // 2 :] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].cpu()
        feed = {"input_ids": ids.cpu().numpy(), "attention_mask": mask.cpu().numpy()}
        got = torch.from_numpy(session.run(["logits"], feed)[0])[mask.bool().cpu()]
        check_finite(expected, "onnx", "the model's own")
        check_finite(got, "onnx", "those of what was written")
        difference = max(difference, (got - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    return difference, largest


def check_finite(logits: Tensor, to: str, whose: str) -> None:
    """Raise :class:`TensorfoldError` for logits with NaN or infinity, which nothing can be compared with."""
    bad = int((~logits.isfinite()).sum())
    if bad:
        raise TensorfoldError(
            f"export --to {to}: of {logits.numel():,} logits on random tokens, {bad:,} of {whose} are NaN or infinite "
            f"in {str(logits.dtype).removeprefix('torch.')}. Nothing was kept. Load the model in bfloat16 or float32; "
            "if that does not help, its weights are damaged."
        )


def probe(model: PreTrainedModel, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random tokens (batch, length), fewer where the model has fewer positions, always the same; and a mask of ones."""
    config = model.config.get_text_config()
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(table_rows(model) or config.vocab_size, (batch, length), generator=generator).to(model.device)
    return ids, torch.ones_like(ids)


def _drop_origins(graph_model: Any) -> None:
    """Remove what the exporter notes at every node: stack traces, which name this machine's paths."""
    for node in graph_model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph_model.graph.inputs, *graph_model.graph.initializers.values()):
        value.metadata_props.clear()
    graph_model.graph.metadata_props.clear()
    graph_model.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notices (torchvision is not installed, a node was not folded) from the user."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
