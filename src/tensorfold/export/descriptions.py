"""What lies beside an exported graph: how to run it in each runtime, and the files that the runtimes read."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel

from tensorfold.errors import pass_on_memory
from tensorfold.export.written import ExportReport, version
from tensorfold.models.anatomy import context_length

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

_HEAD = """# {name}, as {engine}

{files} in {precision}, factors of folded matrices kept as factors, with a KV cache. One graph reads prompts and steps:
any batch size and length, rows padded on the left.

```
tensorfold sample PATH --prompt "Once upon a time"
tensorfold eval PATH --text wikitext-2
tensorfold bench PATH
```
"""

_TAIL = """
- parameters: {parameters:,}; weight files: {bytes:,} bytes; numbers stored: {stored}
- against PyTorch in float32, over {steps} steps with the cache, a row alone and rows padded on the left: logits within
  {difference:.1e}, {same} likeliest tokens the same
- written by tensorfold {version} from {name}
"""

_ONNX = """
## onnxruntime

```python
import numpy
import onnxruntime

session = onnxruntime.InferenceSession("PATH/model.onnx")
past = {{i.name: numpy.zeros((1, i.shape[1], 0, i.shape[3]), numpy.float32)
        for i in session.get_inputs() if i.name.startswith("past_key_values")}}
ids, seen = numpy.array([[1, 2, 3]]), 0  # (batch, length), int64
for _ in range(20):
    seen += ids.shape[1]
    given = {{"input_ids": ids, "attention_mask": numpy.ones((1, seen), numpy.int64),
             "position_ids": numpy.arange(seen - ids.shape[1], seen)[None]}}
    given = {{i.name: given[i.name] for i in session.get_inputs() if i.name in given}}
    logits, *present = session.run(None, {{**given, **past}})
    past = dict(zip(past, present))
    ids = logits[:, -1:].argmax(-1)
```

- logits: (batch, length, vocabulary), float32, of every token that was fed
- attention_mask: (batch, tokens so far), 1 for tokens, 0 for padding on the left; position_ids then count from the
  first token
- past_key_values.N.key, present.N.key and value: (batch, heads, tokens so far, width of a head)
"""

_GENAI = """
## onnxruntime-genai

`genai_config.json` lies beside the graph.

```python
import onnxruntime_genai

model = onnxruntime_genai.Model("PATH")
tokenizer = onnxruntime_genai.Tokenizer(model)
params = onnxruntime_genai.GeneratorParams(model)
params.set_search_options(max_length=100)
generator = onnxruntime_genai.Generator(model, params)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```
"""

_BROWSER = """
## In a browser: transformers.js

```javascript
import { AutoTokenizer, AutoModelForCausalLM } from "@huggingface/transformers";

const tokenizer = await AutoTokenizer.from_pretrained("PATH");
const form = { subfolder: "", model_file_name: "model", dtype: "fp32" };
const model = await AutoModelForCausalLM.from_pretrained("PATH", form);
const ids = await model.generate({ ...tokenizer("Once upon a time"), max_new_tokens: 50 });
console.log(tokenizer.batch_decode(ids, { skip_special_tokens: true })[0]);
```

`dtype: "fp32"` names the file `model.onnx`, whatever is in it.
"""

_OPENVINO = """
## OpenVINO

```python
import numpy
import openvino

request = openvino.compile_model("PATH/openvino_model.xml", "CPU").create_infer_request()
request.reset_state()  # before each prompt: the cache is the request's state
ids, seen = numpy.array([[1, 2, 3]]), 0  # (batch, length), int64
for _ in range(20):
    seen += ids.shape[1]
    given = {{"input_ids": ids, "attention_mask": numpy.ones((1, seen), numpy.int64),
             "position_ids": numpy.arange(seen - ids.shape[1], seen)[None], "beam_idx": numpy.zeros(1, numpy.int32)}}
    names = {{port.get_any_name() for port in request.model_inputs}}
    logits = request.infer({{name: value for name, value in given.items() if name in names}})["logits"]
    ids = logits[:, -1:].argmax(-1)
```
"""

_OPENVINO_GENAI = """
## OpenVINO GenAI

```python
import openvino_genai

print(openvino_genai.LLMPipeline("PATH", "CPU").generate("Once upon a time", max_new_tokens=50))
```

It needs `openvino_tokenizer.xml` beside the graph{tokenizer}.
"""

_PRECISION = {32: "float32", 16: "float16", 8: "eight bits", 4: "four bits"}


def graph_readme(name: str, report: ExportReport, beside: bool) -> str:
    """How to run what was written, and what is known of it.

    Args:
        name: Of the model.
        report: Of the export.
        beside: Whether ``genai_config.json``, or OpenVINO's own form of the tokenizer, was written.
    """
    onnx = report.to == "onnx"
    head = _HEAD.format(
        name=name,
        engine="ONNX" if onnx else "OpenVINO IR",
        files="`model.onnx`" if onnx else "`openvino_model.xml` and `.bin`",
        precision=_PRECISION[report.bits or 32],
    )
    lacking = "" if beside else ": `convert_tokenizer PATH --with-detokenizer -o PATH` of `openvino-tokenizers`"
    parts = (
        [_ONNX.format(), _GENAI if beside else "", _BROWSER]
        if onnx
        else [_OPENVINO.format(), _OPENVINO_GENAI.format(tokenizer=lacking)]
    )
    tail = _TAIL.format(
        parameters=report.parameters,
        bytes=report.bytes,
        stored=", ".join(f"{count:,} in {kind}" for kind, count in (report.stored or {}).items()),
        steps=report.steps,
        difference=report.difference,
        same=report.same_tokens,
        version=version(),
        name=name,
    )
    return head + "".join(parts) + tail


def write_genai_config(directory: Path, model: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    """``genai_config.json`` for onnxruntime-genai, where the graph is what it reads; whether it was.

    Args:
        directory: With the graph.
        model: It was made of.
        inputs: Shapes of the graph's inputs by name.
    """
    config: PreTrainedConfig = model.config.get_text_config()
    caches = [shape for name, shape in inputs.items() if name.endswith(".key")]
    if len({(shape[1], shape[3]) for shape in caches}) != 1 or len(caches) != config.num_hidden_layers:
        return False  # it knows one number of heads and one width for all layers
    _, heads, _, width = caches[0]
    generation = model.generation_config
    ends = _first(generation, config, "eos_token_id")
    plain = [name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs]
    described = {
        "model": {
            "type": "decoder",
            "bos_token_id": _first(generation, config, "bos_token_id") or 0,
            "eos_token_id": 0 if ends is None else ends,
            "pad_token_id": _pad(_first(generation, config, "pad_token_id"), ends),
            "context_length": context_length(config) or 2**31 - 1,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": width,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": heads,
                "inputs": {
                    **{name: name for name in plain},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context_length(config) or 2048,
            "past_present_share_buffer": False,
        },
    }
    (directory / "genai_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return True


def write_openvino_tokenizer(directory: Path, tokenizer: Any) -> bool:
    """The tokenizer as OpenVINO GenAI reads it, where ``openvino_tokenizers`` is installed; whether it was written."""
    if tokenizer is None or importlib.util.find_spec("openvino_tokenizers") is None:
        return False
    try:
        import openvino
        from openvino_tokenizers import convert_tokenizer

        both = convert_tokenizer(tokenizer, with_detokenizer=True)
        for part, name in zip(both, ("tokenizer", "detokenizer"), strict=True):
            openvino.save_model(part, str(directory / f"openvino_{name}.xml"))
        return True
    except Exception as error:  # kinds of tokenizers that it does not know; the graph is as good without
        pass_on_memory(error)
        log.warning("openvino_tokenizers cannot convert this tokenizer, so OpenVINO GenAI has none: %s", error)
        return False


def _first(generation: Any, config: PreTrainedConfig, name: str) -> Any:
    value = getattr(generation, name, None)
    return getattr(config, name, None) if value is None else value


def _pad(padding: Any, ends: Any) -> int:
    if isinstance(padding, int):
        return padding
    return ends[0] if isinstance(ends, list) else ends or 0
