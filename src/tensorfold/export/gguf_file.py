"""GGUF files, which llama.cpp and what is built on it run: of plain models, whose matrices are whole."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tensorfold.errors import InputError, TensorfoldError, pass_on_memory, reason
from tensorfold.export.agreement import compared, expected_logits
from tensorfold.export.engine_model import LLAMA_CPP, write_manifest
from tensorfold.export.gguf_layout import Layout, layout_of, scaled, tensors, write_settings
from tensorfold.export.gguf_vocabulary import Vocabulary, read_vocabulary
from tensorfold.export.tracing import check_packages
from tensorfold.export.written import ExportReport, check_float32, version, write_beside, writing
from tensorfold.hf.dense import plain_config
from tensorfold.models.anatomy import count_parameters
from tensorfold.models.modes import evaluation_mode
from tensorfold.utils.atomic_files import atomic_file, check_file_target, check_target
from tensorfold.utils.torch_modes import in_usual_modes

# Of logits in float32, in units of the largest where that is above 1.
TOLERANCE = 1e-4
# By bits: the type of a matrix, the file's number for "mostly of this type", and the size of a group of a row.
_TYPES = {32: ("F32", 0, 1), 16: ("F16", 1, 1), 8: ("Q8_0", 7, 32), 4: ("Q4_0", 2, 32)}
_TABLES = ("token_embd.weight", "output.weight")  # eight bits where others have four, as in llama.cpp's own files
_QUANTIZATION = 2  # version of the layouts of quantised groups
# What transformers does not take from a file of this architecture, though llama.cpp does.
_UNREAD = {"llama": (), "qwen2": ("head_dim",), "qwen3": ("head_dim",), "gpt2": ("n_positions", "n_inner")}

_README = """# {name}, as GGUF

`{file}`: matrices in {kind}, for llama.cpp and what is built on it. The tokenizer is in the file.

```
llama-cli -m {file} -p "Once upon a time" -n 50
```

```python
from llama_cpp import Llama  # llama-cpp-python

print(Llama("{file}")("Once upon a time", max_tokens=50)["choices"][0]["text"])
```

tensorfold runs this directory in llama.cpp, where llama-cpp-python is installed, and reads the file itself as float32
into transformers:

```
tensorfold bench .
tensorfold eval {file} --text wikitext-2
```

- parameters: {parameters:,}; {bytes:,} bytes; numbers stored: {stored}
- read back by transformers: logits within {difference:.1e} of the model's in float32, {same} likeliest tokens the same
- written by tensorfold {version} from {name}
"""


@in_usual_modes
def export_gguf(
    model: PreTrainedModel, out: str | Path, tokenizer: Any, *, name: str = "the model", bits: int = 32
) -> ExportReport:
    """Write a plain model as a GGUF file with its tokenizer, for llama.cpp; whole or not at all.

    Plain is what has no factors: a dense model, one that ``--to dense`` wrote, or one that only has fewer hidden units
    (``auto`` with ``plain: true``).

    Args:
        model: Shaped as Llama, Mistral, Qwen2, Qwen3 or GPT-2, in float32 on the CPU; stays as it is.
        out: ``….gguf``: that file, which is replaced if it is there. Else a directory for file and README, which must
            not exist, or be empty.
        tokenizer: Byte-level BPE that llama.cpp has a name for.
        name: What file and README call the model.
        bits: Of a number of a matrix. 16: F16. 8: Q8_0, groups of 32 along the inputs; F16 where 32 does not divide
            them. 4: Q4_0, in the same groups, and Q8_0 for the table and the head. Norms, biases and positions are in
            float32.

    Raises:
        InputError: The package gguf is missing, the model has factors, llama.cpp has no such architecture, settings or
            tokenizer, or ``out`` cannot be written.
        TensorfoldError: transformers does not read the file in float32 back to the logits, to 1e-4 (of the largest
            where that is above 1); these are not finite; or the file cannot be written.
    """
    started = time.monotonic()
    if bits not in _TYPES:
        raise InputError(f"export --to gguf: got bits={bits}; needed one of {', '.join(map(str, _TYPES))}.")
    check_packages("gguf")
    out = Path(out)
    alone = out.suffix == ".gguf"
    (check_file_target if alone else check_target)(out)
    layout = layout_of(model)
    check_float32(model, "gguf")
    vocabulary = read_vocabulary(tokenizer, model)
    kind = _TYPES[bits][0]
    file = out.name if alone else f"{name.rpartition('/')[2].replace(' ', '-')}-{kind}.gguf"
    with evaluation_mode(model), (_one_file if alone else writing)(out) as place:
        path = place if alone else place / file
        inputs, expected = expected_logits(model, "gguf")
        for step in dict.fromkeys((32, bits)):  # what float32 gives is known, so that is what shows mistakes
            stored = _write(path, layout, model, vocabulary, name, step)
            allowed = TOLERANCE if step == 32 else float("inf")
            difference, same = compared("gguf", _read(path, layout, model), inputs, expected, allowed)
        report = ExportReport(
            "gguf", str(out), count_parameters(model), path.stat().st_size, difference, 0.0, bits, None,
            f"{same} of {expected[..., 0].numel()}", dict(stored),
        )  # fmt: skip
        if not alone:
            plain_config(model).save_pretrained(place)
            with suppress(ValueError):  # settings that contradict each other stay with the model they came with
                model.generation_config.save_pretrained(place)
            manifest = {"engine": LLAMA_CPP, "bits": bits, "type": kind, "parameters": report.parameters}
            more = {"difference": difference, "same_tokens": report.same_tokens, "stored": report.stored}
            write_manifest(place, {**manifest, "tensorfold": version(), **more})
            write_beside(place, model, tokenizer, _readme(name, file, report))
    seconds = round(time.monotonic() - started, 3)
    return ExportReport(**{**report.to_dict(), "seconds": seconds})


def _readme(name: str, file: str, report: ExportReport) -> str:
    return _README.format(
        name=name,
        file=file,
        kind=_TYPES[report.bits or 32][0],
        parameters=report.parameters,
        bytes=report.bytes,
        stored=", ".join(f"{count:,} in {kind}" for kind, count in (report.stored or {}).items()),
        difference=report.difference,
        same=report.same_tokens,
        version=version(),
    )


@contextmanager
def _one_file(out: Path) -> Iterator[Path]:
    try:
        with atomic_file(out) as temporary:
            yield temporary
    except OSError as error:
        pass_on_memory(error)
        raise TensorfoldError(f"{out}: could not be written: {reason(error)}; nothing was left of it.") from error


def _write(
    path: Path, layout: Layout, model: PreTrainedModel, vocabulary: Vocabulary, name: str, bits: int
) -> Counter[str]:
    """Write the file, over what is there; how many numbers are of which type."""
    import gguf

    kind, mostly, group = _TYPES[bits]
    writer = gguf.GGUFWriter(path, layout.name)
    # A file of exactly this name is another model type to transformers, which then finds no names for its tensors.
    writer.add_name("Mistral" if name == "mistral" else name)
    writer.add_file_type(mostly)
    writer.add_quantization_version(_QUANTIZATION)
    write_settings(writer, layout, model)
    vocabulary.write(writer)
    stored: Counter[str] = Counter()
    for tensor, values, fewer in tensors(layout, model):
        wanted = "Q8_0" if bits == 4 and tensor in _TABLES else kind
        chosen = "F32" if not fewer else wanted if values.shape[-1] % group == 0 else "F16"
        stored[chosen] += values.size
        number = gguf.GGMLQuantizationType[chosen]
        writer.add_tensor(tensor, gguf.quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _read(path: Path, layout: Layout, model: PreTrainedModel) -> PreTrainedModel:
    """The file as transformers reads it, in float32.

    Raises:
        TensorfoldError: It cannot.
    """
    with TemporaryDirectory() as folder, redirect_stderr(StringIO()):  # a progress bar
        given: dict[str, Any] = {"gguf_file": "model.gguf"}  # by the ending it knows the format
        (Path(folder) / given["gguf_file"]).symlink_to(path.resolve())
        try:
            config = AutoConfig.from_pretrained(folder, **given)
            for setting in (*_UNREAD[layout.name], *(["rope_parameters"] if scaled(model.config) else [])):
                if hasattr(model.config, setting):
                    setattr(config, setting, getattr(model.config, setting))
            return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, **given).eval()
        except Exception as error:  # readers fail in many ways
            pass_on_memory(error)
            raise TensorfoldError(
                f"export --to gguf: transformers cannot read what was written ({reason(error)}); nothing was kept."
            ) from error
