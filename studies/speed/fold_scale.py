"""Folding at scale: peak memory and time of a checkpoint larger than memory should be, and fold time against width.

    OMP_NUM_THREADS=1 python studies/speed/fold_scale.py --work /tmp/fold-scale [--quick]

Makes a Llama-shaped checkpoint of 1.5 billion random bf16 parameters, shard by shard, folds its MLPs data-free with
``tensorfold fold`` in a process of its own, and reads that process's peak resident set (``VmHWM``, Linux). Then times
the fit of one matrix (4·width × width) for widths of 512 to 8192. Appends to ``fold_scale.jsonl`` and removes what it
made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
import yaml
from facts import facts
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import tensorfold
from tensorfold import Kronecker, LowRank
from tensorfold.methods import Method
from tensorfold.models.anatomy import empty_model

LOG = Path(__file__).with_suffix(".jsonl")
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 27, "num_attention_heads": 16}
QUICK = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
SHARD_BYTES = 200_000_000
WIDEST_LOW_RANK = 2048  # a low rank of half the parameters costs the cube of the width

# Runs the command, and then says on standard error how much memory it took at most.
CHILD = """
import sys
from tensorfold.cli.main import run
try:
    run(sys.argv[1:])
finally:
    with open("/proc/self/status") as status:
        print("peak", next(line.split()[1] for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="Directory for the checkpoints: about 6 GB.")
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--note", default="", help="Written beside the results, such as what else the machine did.")
    parser.add_argument("--quick", action="store_true", help="A tiny checkpoint and small widths, to see that it runs.")
    given = parser.parse_args()
    about = {
        **facts(),
        "note": given.note,
    }
    given.work.mkdir(parents=True, exist_ok=True)
    entries = [fold_checkpoint(given.work, QUICK if given.quick else SHAPE)]
    for width in (64, 128) if given.quick else (512, 1024, 2048, 4096, 8192):
        entries.append(time_width(width, Kronecker(factor=(2 * width, width))))
        if width <= WIDEST_LOW_RANK:
            entries.append(time_width(width, LowRank(keep=0.5)))
    with given.log.open("a") as file:
        for entry in entries:
            print({**entry, **about}, flush=True)
            file.write(json.dumps({**entry, **about}) + "\n")


def fold_checkpoint(work: Path, shape: dict[str, int]) -> dict[str, object]:
    """Peak resident megabytes and seconds of the command on a fresh checkpoint."""
    source, out, recipe = work / "dense", work / "folded", work / "recipe.yaml"
    for left in (source, out):
        shutil.rmtree(left, ignore_errors=True)
    parameters = make_checkpoint(source, shape)
    factor = [shape["intermediate_size"] // 2, shape["hidden_size"]]
    recipe.write_text(yaml.safe_dump({"fold": [{"targets": "mlp", "method": "kronecker", "factor": factor}]}))
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    started = time.perf_counter()
    command = [sys.executable, "-c", CHILD, "fold", source, "--recipe", recipe, "--out", out, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    result = json.loads(done.stdout)
    peak = int(done.stderr.rpartition("peak ")[2]) / 1024
    folded = tensorfold.load(out) if parameters < 1e7 else None
    assert folded is None or folded.num_parameters() == result["parameters_after"]
    shutil.rmtree(source)
    shutil.rmtree(out)
    return {
        "what": "fold",
        "parameters_before": parameters,
        "parameters_after": result["parameters_after"],
        "checkpoint_mb": round(size / 2**20),
        "factor": factor,
        "matrices": len(result["modules"]),
        "peak_mb": round(peak),
        "seconds_of_the_command": round(seconds, 1),
        "seconds_of_the_fold": result["seconds"],
    }


def make_checkpoint(path: Path, shape: dict[str, int]) -> int:
    """Write random weights with one shard's worth of them in memory; the number of parameters."""
    path.mkdir(parents=True)
    config = transformers.LlamaConfig(vocab_size=32_000 if shape is SHAPE else 300, **shape)
    config.dtype, config.architectures = "bfloat16", ["LlamaForCausalLM"]
    config.save_pretrained(path)
    words = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(path)
    shards: list[dict[str, torch.Size]] = [{}]
    held = 0
    state = empty_model(config).state_dict()
    for name, tensor in state.items():
        size = 2 * tensor.numel()
        if held and held + size > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = tensor.shape
        held += size
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for k, shard in enumerate(shards, start=1):
        file = f"model-{k:05}-of-{len(shards):05}.safetensors"
        weights = {}
        for name, sizes in shard.items():
            weight = torch.empty(sizes, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            weights[name] = weight if len(sizes) > 1 else torch.ones(sizes, dtype=torch.bfloat16)
        save_file(weights, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(tensor.numel() for tensor in state.values())


def time_width(width: int, method: Method) -> dict[str, object]:
    """Seconds of one fit, by the clock and of the processor; the second is what a busy machine leaves comparable."""
    weight = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(0))
    spec = method.spec(*weight.shape)
    started, worked = time.perf_counter(), time.process_time()
    method.solve(weight, spec)
    return {
        "what": "fit",
        "width": width,
        "spec": str(spec),
        "parameters": spec.parameters,
        "seconds": round(time.perf_counter() - started, 4),
        "processor_seconds": round(time.process_time() - worked, 4),
    }


if __name__ == "__main__":
    main()
