"""Handing a folded model on: as a plain transformers directory, or in int8; graphs for engines are in ``graphs``."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tensorfold.export.agreement import compared, expected_logits
from tensorfold.export.graphs import export_onnx as export_onnx  # of old a name of this module
from tensorfold.export.graphs import export_openvino as export_openvino
from tensorfold.export.written import ExportReport, version, write_beside, writing
from tensorfold.hf.dense import plain_model
from tensorfold.hf.int8 import quantize
from tensorfold.hf.loading import load
from tensorfold.models.anatomy import count_parameters
from tensorfold.models.modes import as_it_was_on_failure, evaluation_mode
from tensorfold.utils.atomic_files import check_target
from tensorfold.utils.torch_modes import in_usual_modes

# Of a float32 model, in units of its largest logit where that is above 1.
TOLERANCE = 1e-4

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
    with writing(out) as partial, evaluation_mode(model):
        inputs, expected = expected_logits(model, "dense")
        plain = plain_model(model)
        parameters = count_parameters(plain)
        plain.save_pretrained(partial)
        del plain  # two whole models at a time are enough
        text = _DENSE_README.format(name=name, parameters=parameters, version=version())
        write_beside(partial, model, tokenizer, text)
        # Products rounded to half precision differ by that rounding, for which there is no bound worth checking.
        allowed = TOLERANCE if model.dtype == torch.float32 else math.inf
        difference, _ = compared("dense", load(partial), inputs, expected, allowed)
        size = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    return ExportReport("dense", str(out), parameters, size, difference, round(time.monotonic() - started, 3))


@in_usual_modes
def export_int8(
    model: PreTrainedModel, out: str | Path, tokenizer: Any = None, *, name: str = "the model"
) -> ExportReport:
    """Write ``model`` with its weights in int8, see :func:`tensorfold.quantize`; whole or not at all.

    Args:
        model: Folded or not; is in int8 afterwards, or as it was where that fails.
        out, tokenizer, name: As for :func:`export_dense`.

    Raises:
        InputError: ``out`` cannot be written, the model is quantised already, or a weight is not finite.
        TensorfoldError: Logits before or after are not finite, or the disk is full.
    """
    started = time.monotonic()
    check_target(Path(out))
    with evaluation_mode(model):
        inputs, expected = expected_logits(model, "int8")
        with as_it_was_on_failure(model), writing(out) as partial:
            bytes_before = quantize(model).bytes_before
            model.save_pretrained(partial)
            text = _INT8_README.format(name=name, before=bytes_before, version=version())
            write_beside(partial, model, tokenizer, text)
            size = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
            difference, _ = compared("int8", load(partial), inputs, expected, math.inf)
    return ExportReport(
        "int8", str(out), count_parameters(model), size, difference, round(time.monotonic() - started, 3)
    )
