"""ONNX graphs of folded models against those of the dense models: logits, bytes and speed under onnxruntime.

    python studies/export/onnx_speed.py --work WORK --export        # writes the four graphs; minutes, once
    OMP_NUM_THREADS=2 python studies/export/onnx_speed.py --work WORK [--rounds 9]

GPT-2's shape with random weights, dense and folded by ``krony-81m``; and SmolLM2-135M (Llama's shape), dense and with
its MLP at half the size by low rank, without text, since only shapes matter to speed. Both heads are tied. One session
a graph, prompts of 16, 128 and 512 tokens taken in turn, ratios of the same round. Appends to ``onnx_speed.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from functools import partial
from os import cpu_count
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

import tensorfold
from tensorfold import LowRank, Recipe
from tensorfold.benchmark.timing import Spread, interleave
from tensorfold.export.engine_model import open_exported
from tensorfold.export.graphs import export_onnx
from tensorfold.hf.sources import find_model

LOG = Path(__file__).with_suffix(".jsonl")
LENGTHS = (16, 128, 512)
TINY = {"n_embd": 768, "n_layer": 1, "n_head": 4, "vocab_size": 500}


def pairs(quick: bool) -> dict[str, tuple[PreTrainedModel, Any]]:
    """By name of the folded form: a dense model, and what it is folded by."""
    torch.manual_seed(0)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(**TINY) if quick else GPT2Config()).eval()
    found: dict[str, tuple[PreTrainedModel, Any]] = {"krony-81m": (gpt2, Recipe.load("krony-81m"))}
    if not quick:
        found["smollm2-mlp-0.5"] = (find_model("smollm2-135m").model("float32").eval(), LowRank(keep=0.5))
    return found


def export(work: Path, quick: bool) -> None:
    """Write the graphs that are not there, with what was measured of each beside it; ``export_onnx`` checks logits."""
    for name, (model, recipe) in pairs(quick).items():
        for form in ("dense", "folded"):
            if form == "folded":
                tensorfold.fold(model, recipe)
            out = work / f"{name}-{form}"
            if not (out / "export.json").exists():
                shutil.rmtree(out, ignore_errors=True)  # of an export that was interrupted
                report = export_onnx(model, out)
                (out / "export.json").write_text(json.dumps(report.to_dict()), encoding="utf-8")
                print(name, form, report, flush=True)


def measure(graphs: dict[str, Path], rounds: int, lengths: tuple[int, ...], threads: int) -> list[dict[str, Any]]:
    """An entry a length: seconds of both graphs, and how many times as fast the folded one is."""
    torch.set_num_threads(threads)
    models = {form: open_exported(path) for form, path in graphs.items()}
    entries = []
    for length in lengths:
        ids = torch.randint(500, (1, length), generator=torch.Generator().manual_seed(0))
        calls = {form: partial(model, ids) for form, model in models.items()}
        samples = interleave(calls, rounds, time.perf_counter, lambda: None)
        ratios = [dense / folded for dense, folded in zip(samples["dense"], samples["folded"], strict=True)]
        seconds = {form: Spread.of(values).to_dict() for form, values in samples.items()}
        entries.append({"tokens": length, "seconds": seconds, "times_as_fast": str(Spread.of(ratios))})
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the graphs are, some two gigabytes")
    parser.add_argument("--export", action="store_true", help="write the graphs, and time nothing")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--quick", action="store_true", help="one tiny pair and few tokens, to see that it runs")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.export:
        export(given.work, given.quick)
        if not given.quick:
            return
    about = {"rounds": given.rounds, "threads": given.threads, "onnxruntime": onnxruntime.__version__,
             "machine": f"{platform.machine()}, {cpu_count()} cores"}  # fmt: skip
    for dense in sorted(given.work.glob("*-dense")):
        name = dense.name.removesuffix("-dense")
        graphs = {form: given.work / f"{name}-{form}" for form in ("dense", "folded")}
        if missing := [str(path) for path in graphs.values() if not (path / "export.json").exists()]:
            raise SystemExit(f"{' and '.join(missing)}: not written, or not to the end; run this with --export first.")
        written = {form: json.loads((path / "export.json").read_text()) for form, path in graphs.items()}
        kept = ("parameters", "bytes", "difference")
        facts = {key: {form: each[key] for form, each in written.items()} for key in kept}
        for entry in measure(graphs, given.rounds, (4,) if given.quick else LENGTHS, given.threads):
            print(name, entry, flush=True)
            with given.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"model": name, **entry, **facts, **about}) + "\n")


if __name__ == "__main__":
    main()
