"""Dense against folded in the same engine and precision: sizes, prompts and steps, the two taken in turn.

    python studies/engines/run.py --work WORK --export [--only openvino-8 …]    # writes the graphs that are not there
    python studies/engines/run.py --work WORK [--only …] [--rounds 9] [--threads 2]
    python studies/engines/run.py --model llama-1.1b …          # the same for a larger shape
    python studies/engines/table.py                             # into README.md

SmolLM2-135M, or random weights of TinyLlama's shape with 1.1 billion parameters, dense and with all linear layers of
the blocks at half their parameters by plain low rank, without text, since only shapes matter to speed, or with half of
the hidden units of every MLP (``--fold units``, SmolLM2's shapes alone). Engines: ONNX Runtime and OpenVINO in 32, 8
and 4 bits; with ``--fold units``, which leaves a plain model, also llama.cpp in 16, 8 and 4, where llama-cpp-python is
installed.

A round reads a prompt of 512 tokens into an empty cache, for the logits of its last token, and then feeds 32 tokens one
by one, with each of the two; ratios are of the same round, medians and quartiles are reported. Graphs compute in
float32; in bfloat16 by ``--dtype bfloat16`` in OpenVINO, which on processors with instructions for it is its default.
Appends to ``run.jsonl``; what is there for the same model, fold, engine, bits, dtype and threads is not measured again.
Times mean something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import sys
import time
from os import cpu_count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))

import torch
from layers import folded
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tensorfold
from tensorfold import LowRank, Recipe, Rule
from tensorfold.benchmark.report import processor
from tensorfold.benchmark.timing import Spread
from tensorfold.export.engine_model import is_exported, open_exported
from tensorfold.export.gguf_file import export_gguf
from tensorfold.export.graphs import export_onnx, export_openvino
from tensorfold.export.kept_graphs import KeptGraphs
from tensorfold.hf.sources import find_model

LOG = Path(__file__).with_suffix(".jsonl")
ENGINES = {"onnx": export_onnx, "openvino": export_openvino, "llama.cpp": export_gguf}
BITS = {"onnx": (32, 8, 4), "openvino": (32, 8, 4), "llama.cpp": (16, 8, 4)}
FORMS = ("dense", "folded")
LARGE = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4,
}  # fmt: skip
TINY = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}


def model_of(name: str, form: str, fold: str, multiple: int) -> PreTrainedModel:
    """The dense or the folded model in float32; random cores or weights where only shapes are known."""
    method = LowRank(keep=0.5, pivots=False, multiple=multiple)
    recipe = Recipe((Rule(["all-linear"], method),))
    if name == "smollm2-135m":
        model = find_model(name).model("float32").eval()
        if form == "folded" and fold == "units":
            model.config.intermediate_size //= 2
            torch.manual_seed(0)
            return LlamaForCausalLM(model.config).float().eval()
        if form == "folded":
            tensorfold.fold(model, recipe)
        return model
    config = LlamaConfig(**(TINY if name == "tiny" else LARGE), tie_word_embeddings=name == "tiny")
    if form == "folded":
        return folded(config, recipe)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def graphs(work: Path, name: str, engine: str, bits: int, fold: str, multiple: int) -> dict[str, Path]:
    """Where the dense graph and the folded one are."""
    ranks = ("" if fold == "low-rank" else f"-{fold}") + ("" if multiple == 1 else f"-{multiple}")
    return {form: work / f"{name}-{engine}-{bits}-{form}{ranks if form == 'folded' else ''}" for form in FORMS}


def export(work: Path, name: str, kinds: list[tuple[str, int]], fold: str, multiple: int) -> None:
    """Write the graphs that are not there, of engines and bits."""
    for form in FORMS:
        missing = [k for k in kinds if not is_exported(graphs(work, name, *k, fold, multiple)[form])]
        model = model_of(name, form, fold, multiple) if missing else None
        with KeptGraphs(work / "kept") as kept:
            for engine, bits in missing:
                out = graphs(work, name, engine, bits, fold, multiple)[form]
                shutil.rmtree(out, ignore_errors=True)
                more = {"tokenizer": find_model(name).tokenizer()} if engine == "llama.cpp" else {"kept": kept}
                print(out.name, ENGINES[engine](model, out, bits=bits, **more), flush=True)


@torch.inference_mode()
def measure(paths: dict[str, Path], dtype: str, rounds: int, prompt: int, steps: int) -> dict[str, Any]:
    """Seconds of a prompt and of a step with each form, and times as fast as dense, from rounds in turn."""
    models = {form: open_exported(path, getattr(torch, dtype)) for form, path in paths.items()}
    ids = torch.randint(300, (1, prompt + steps), generator=torch.Generator().manual_seed(0))
    samples: dict[str, dict[str, list[float]]] = {form: {"prompt": [], "step": []} for form in models}
    for number in range(rounds + 1):
        for form, model in models.items():
            start = time.perf_counter()
            cache = model(ids[:, :prompt], logits_to_keep=1).past_key_values
            between = time.perf_counter()
            for place in range(prompt, prompt + steps):
                model(ids[:, place : place + 1], past_key_values=cache)
            end = time.perf_counter()
            if number:  # the first round warms up
                samples[form]["prompt"].append(between - start)
                samples[form]["step"].append((end - between) / steps)
    ratios = {
        what: [a / b for a, b in zip(samples["dense"][what], samples["folded"][what], strict=True)]
        for what in ("prompt", "step")
    }
    return {
        "seconds": {
            form: {what: Spread.of(values).to_dict() for what, values in found.items()}
            for form, found in samples.items()
        },
        "times_as_fast": {what: str(Spread.of(values)) for what, values in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2-135m", "llama-1.1b"], default="smollm2-135m")
    parser.add_argument("--work", type=Path, required=True, help="where the graphs are, some three gigabytes")
    parser.add_argument("--export", action="store_true", help="write the graphs, and time nothing")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="such as openvino-8 or onnx-*")
    parser.add_argument("--fold", choices=["low-rank", "units"], default="low-rank")
    parser.add_argument("--multiple", type=int, default=1, help="what divides the ranks of the folded model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="what OpenVINO computes in")
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few tokens, to see that it runs")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    engines = [engine for engine in ENGINES if engine != "llama.cpp" or given.fold == "units"]
    kinds = [(engine, bits) for engine in engines for bits in BITS[engine]]
    kinds = [kind for kind in kinds if any(fnmatch.fnmatch("{}-{}".format(*kind), each) for each in given.only)]
    name = "tiny" if given.quick else given.model
    if given.export:
        export(given.work, name, kinds, given.fold, given.multiple)
        return
    torch.set_num_threads(given.threads)
    done = (
        [json.loads(line) for line in given.log.read_text(encoding="utf-8").splitlines()] if given.log.exists() else []
    )
    known = {
        (e["model"], e["engine"], e["bits"], e["fold"], e["threads"], e["multiple"], e.get("dtype", "float32"))
        for e in done
    }
    for engine, bits in kinds:
        paths = graphs(given.work, name, engine, bits, given.fold, given.multiple)
        kind = (name, engine, bits, given.fold, given.threads, given.multiple, given.dtype)
        if given.dtype != "float32" and engine != "openvino":
            continue
        if kind in known or not all(map(is_exported, paths.values())):
            continue
        manifests = {form: json.loads((path / "engine.json").read_text()) for form, path in paths.items()}
        sizes = {form: open_exported(path).stored_bytes for form, path in paths.items()}
        entry = {
            "model": name,
            "engine": engine,
            "bits": bits,
            "fold": given.fold,
            "threads": given.threads,
            "multiple": given.multiple,
            "dtype": given.dtype,
            "rounds": given.rounds,
            "machine": f"{processor()}, {cpu_count()} cores",
            "bytes": sizes,
            "stored": {form: manifest["stored"] for form, manifest in manifests.items()},
            **measure(paths, given.dtype, given.rounds, *((8, 4) if given.quick else (512, 32))),
        }
        with given.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        print(engine, bits, entry["times_as_fast"], flush=True)


if __name__ == "__main__":
    main()
