"""Handing a folded model on: as a plain transformers directory, as an ONNX graph, or in int8."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.errors import InputError, TensorfoldError, pass_on_memory, reason
from tensorfold.export.engines import check_finite, check_packages, compare, probe, trace
from tensorfold.hf.beside import carry_over
from tensorfold.hf.dense import check_floating, check_in_memory, plain_config, plain_model
from tensorfold.hf.int8 import quantize
from tensorfold.hf.loading import load
from tensorfold.models.anatomy import count_parameters
from tensorfold.models.modes import evaluation_mode
from tensorfold.utils.atomic_files import atomic_directory, check_target
from tensorfold.utils.torch_modes import in_usual_modes

# Of a float32 model, in units of its largest logit where that is above 1.
TOLERANCE = {"dense": 1e-4, "onnx": 1e-3}

NO_CACHE = (
    "There is no KV cache in the graph: each call computes the logits of all positions from all tokens, so generating "
    "n tokens costs n whole passes."
)

_DENSE_README = """# {name}, dense again

A plain transformers checkpoint: every folded matrix is multiplied out, so it needs nothing but transformers, and is as
large and as fast as the dense model. It computes what the folded one computes.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(PATH)
```

- parameters: {parameters:,}
- written by tensorfold {version} from {name}
"""

_ONNX_README = """# {name}, as ONNX

`model.onnx` holds the factors of the folded matrices as initialisers, not their products, in float32. A tied output
head and its embedding are one initialiser.

```python
import numpy
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
ids = numpy.array([[1, 2, 3]])  # (batch, length), int64, any batch size and length
[logits] = session.run(["logits"], {{"input_ids": ids, "attention_mask": numpy.ones_like(ids)}})
```

- logits: (batch, length, vocabulary), float32
- attention_mask: 1 for tokens, 0 for padding; pad on the right
- {no_cache}
- parameters: {parameters:,}
- written by tensorfold {version} from {name}
"""


_INT8_README = """# {name}, weights in int8

```python
import tensorfold

model = tensorfold.load(PATH)  # raises if any weight is missing
# after the import, AutoModelForCausalLM.from_pretrained(PATH) works too
```

Every linear layer, table and large core holds whole numbers of eight bits and a scale a row; activations, norms and
biases are in floating point. For inference only: it is smaller, and slower where few
tokens are computed at a time.

- in floating point: {before:,} bytes
- written by tensorfold {version} from {name}
"""


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    ``parameters``: of the exported model, shared ones and the scales of int8 once. ``bytes``: of its weight files.
    ``difference``: the largest between a logit of what was written and of the model it was written from, on random
    tokens; in int8 it is what the eight bits cost.
    """

    to: str
    out: str
    parameters: int
    bytes: int
    difference: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters, {self.bytes / 1e6:.1f} MB; logits within {self.difference:.1e} of the "
            f"model's\nwritten to {self.out} in {self.seconds:.0f} s"
        )


@in_usual_modes
def export_dense(
    model: PreTrainedModel, out: str | Path, tokenizer: Any = None, *, name: str = "the model"
) -> ExportReport:
    """Write ``model`` as a plain transformers directory that loads without this package; whole or not at all.

    Args:
        model: Folded or not; stays as it is.
        out: Directory to write; must not exist, or be empty.
        tokenizer: Written beside the model.
        name: What its README calls the model.

    Raises:
        InputError: ``out`` cannot be written, or the model is quantised by something else.
        TensorfoldError: What was written does not give finite logits, or in float32 the model's to 1e-4 (of the largest
            where that is above 1); the model's own are not finite; or the files cannot be written.
    """
    started = time.monotonic()
    with _directory(out) as partial, evaluation_mode(model):
        inputs, expected = _expected(model, "dense")
        plain = plain_model(model)
        parameters = count_parameters(plain)
        plain.save_pretrained(partial)
        del plain  # two whole models at a time are enough
        text = _DENSE_README.format(name=name, parameters=parameters, version=_version())
        _write_beside(partial, model, tokenizer, text)
        # Products rounded to half precision differ by that rounding, for which there is no bound worth checking.
        allowed = TOLERANCE["dense"] if model.dtype == torch.float32 else math.inf
        difference = _difference("dense", load(partial), inputs, expected, allowed)
        size = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    return ExportReport("dense", str(out), parameters, size, difference, round(time.monotonic() - started, 3))


@in_usual_modes
def export_onnx(
    model: PreTrainedModel, out: str | Path, tokenizer: Any = None, *, name: str = "the model"
) -> ExportReport:
    """Write ``model`` as ``model.onnx`` with factors kept as factors, beside its tokenizer; whole or not at all.

    Batch size and length are free. The graph has no KV cache. Weights beyond the 2 GB that one ONNX file can hold go to
    ``model.onnx.data``.

    Args:
        model: Folded or not, in float32; stays as it is.
        out, tokenizer, name: As for :func:`export_dense`.

    Raises:
        InputError: A package is missing, ``out`` cannot be written, or the model is not in float32.
        TensorfoldError: The model cannot be traced, the graph does not give its logits to 1e-3 (of the largest where
            that is above 1), these are not finite, or the files cannot be written.
    """
    started = time.monotonic()
    check_packages()
    check_target(Path(out))  # tracing takes minutes
    check_floating(model)
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if dtypes != {"float32"}:
        raise InputError(
            f"export_onnx: got a model in {', '.join(sorted(dtypes))}; needed float32, which every runtime computes "
            'in: load it with dtype="float32".'
        )
    with evaluation_mode(model):
        _expected(model, "onnx")
        program = trace(model)
        with _directory(out) as partial:
            graph = partial / "model.onnx"
            program.save(graph)
            plain_config(model).save_pretrained(partial)
            parameters = count_parameters(model)
            text = _ONNX_README.format(name=name, parameters=parameters, version=_version(), no_cache=NO_CACHE)
            _write_beside(partial, model, tokenizer, text)
            difference, largest = compare(graph, model)
            _check("onnx", difference, TOLERANCE["onnx"] * max(1.0, largest))
            size = sum(file.stat().st_size for file in partial.glob("model.onnx*"))
    return ExportReport("onnx", str(out), parameters, size, difference, round(time.monotonic() - started, 3))


@in_usual_modes
def export_int8(
    model: PreTrainedModel, out: str | Path, tokenizer: Any = None, *, name: str = "the model"
) -> ExportReport:
    """Write ``model`` with its weights in int8, see :func:`tensorfold.quantize`; whole or not at all.

    Args:
        model: Folded or not; is in int8 afterwards.
        out, tokenizer, name: As for :func:`export_dense`.

    Raises:
        InputError: ``out`` cannot be written, the model is quantised already, or a weight is not finite.
        TensorfoldError: Logits before or after are not finite, or the disk is full.
    """
    started = time.monotonic()
    check_target(Path(out))
    with evaluation_mode(model):
        inputs, expected = _expected(model, "int8")
        bytes_before = quantize(model).bytes_before
        with _directory(out) as partial:
            model.save_pretrained(partial)
            text = _INT8_README.format(name=name, before=bytes_before, version=_version())
            _write_beside(partial, model, tokenizer, text)
            size = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
            difference = _difference("int8", load(partial), inputs, expected, math.inf)
    return ExportReport(
        "int8", str(out), count_parameters(model), size, difference, round(time.monotonic() - started, 3)
    )


@contextmanager
def _directory(out: str | Path) -> Iterator[Path]:
    try:
        with atomic_directory(out) as partial:
            yield partial
    except (SafetensorError, OSError) as error:
        pass_on_memory(error)
        raise TensorfoldError(f"{out}: could not be written: {reason(error)}; nothing was left of it.") from error


def _write_beside(directory: Path, model: PreTrainedModel, tokenizer: Any, readme: str) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    carry_over(model.config, directory)
    (directory / "README.md").write_text(readme, encoding="utf-8")


@torch.no_grad()
def _expected(model: PreTrainedModel, to: str) -> tuple[dict[str, Any], Tensor]:
    """Random tokens as a model takes them, and the logits that it gives them.

    Raises:
        InputError: Weights are offloaded.
        TensorfoldError: The logits are not finite.
    """
    check_in_memory(model)
    ids, mask = probe(model, 2, 16)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    logits = model(**inputs).logits
    check_finite(logits, to, "the model's own")
    return inputs, logits


@torch.no_grad()
def _difference(to: str, written: PreTrainedModel, inputs: dict[str, Any], expected: Tensor, tolerance: float) -> float:
    """The largest of a logit of what was written; ``tolerance`` in units of the largest expected logit above 1.

    Raises:
        TensorfoldError: It is larger, or not finite.
    """
    got = written.to(expected.device)(**inputs).logits  # type: ignore[arg-type]
    check_finite(got, to, "those of what was written")
    difference = (got.double() - expected.double()).abs().max().item()
    _check(to, difference, tolerance * max(1.0, expected.abs().max().item()))
    return difference


def _check(to: str, difference: float, allowed: float) -> None:
    if not difference <= allowed:
        raise TensorfoldError(
            f"export --to {to}: logits of what was written differ from the model's by {difference:.1e}; needed at most "
            f"{allowed:.1e}. Nothing was kept. Please report it with the model's config.json."
        )


def _version() -> str:
    from tensorfold import __version__

    return __version__
