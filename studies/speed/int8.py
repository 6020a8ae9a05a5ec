"""What int8 and folding save and cost, each alone and together: bytes, decode speed and perplexity.

    OMP_NUM_THREADS=2 python studies/speed/int8.py [--model smollm2-135m] [--keep 0.8] [--quick]

Of the dense model in float32 and in int8, and of the folded one (MLP by low rank, calibrated) in float32 and in int8:
bytes of the stored weights, tokens a second when one token is generated at a time, and perplexity by ``hf-1024`` on the
first 8,192 tokens of ``wikitext-2`` (test). The four take turns in the timing; ratios are of one round. Appends to
``int8.jsonl``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from facts import facts
from transformers import PreTrainedModel

import tensorfold
from tensorfold import LowRank, Recipe, Rule
from tensorfold.benchmark.timing import Spread, interleave
from tensorfold.data.texts import describe, load_text
from tensorfold.hf.sources import find_model
from tensorfold.models.sizes import stored_bytes

LOG = Path(__file__).with_suffix(".jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="wikitext-2")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--note", default="", help="Written beside the results, such as what else the machine did.")
    parser.add_argument("--quick", action="store_true", help="Few tokens, no calibration, to see that it runs.")
    given = parser.parse_args()
    source = find_model(given.model)
    tokenizer, dense = source.tokenizer(), source.model("float32")
    folded = copy.deepcopy(dense)
    calibration = None if given.quick else load_text(given.text, split="validation")
    recipe = Recipe((Rule("mlp", LowRank(keep=given.keep)),))
    tensorfold.fold(folded, recipe, tokenizer, calibration, calibration_tokens=24_000 if calibration else None)
    forms = {"dense fp32": dense, "folded fp32": folded}
    for name, model in list(forms.items()):
        eight = copy.deepcopy(model)
        tensorfold.quantize(eight)
        forms[name.replace("fp32", "int8")] = eight
    speeds = decode_speeds(forms, 1 if given.quick else given.rounds, 4 if given.quick else 32)
    text, protocol, tokens = load_text(given.text), "disjoint-64" if given.quick else "hf-1024", 8192
    for name, model in forms.items():
        result = tensorfold.evaluate(
            model, tokenizer, text, protocol, max_tokens=256 if given.quick else tokens, text_name=describe(given.text)
        )
        entry = {
            "model": source.name,
            "form": name,
            "keep": given.keep if name.startswith("folded") else 1.0,
            "bytes": stored_bytes(model),
            "share": round(stored_bytes(model) / stored_bytes(dense), 4),
            "perplexity": round(result.perplexity, 4),
            "protocol": protocol,
            "tokens": result.tokens,
            **speeds[name],
            **facts(),
            "note": given.note,
        }
        print(entry, flush=True)
        with given.log.open("a") as file:
            file.write(json.dumps(entry) + "\n")


@torch.inference_mode()
def decode_speeds(forms: dict[str, PreTrainedModel], rounds: int, tokens: int) -> dict[str, dict[str, object]]:
    """Tokens a second after a prompt of 16, and the time over that of the dense model in the same round."""
    prompt = torch.arange(2, 18)[None]

    def decode(model: PreTrainedModel) -> Callable[[], torch.Tensor]:
        return lambda: model.generate(
            prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )

    calls = {name: decode(model) for name, model in forms.items()}
    samples = interleave(calls, rounds, time.perf_counter, lambda: None)
    dense = samples["dense fp32"]
    return {
        name: {
            "decode_tokens_per_second": round(tokens / Spread.of(times).median, 2),
            "time_over_dense": str(Spread.of([a / b for a, b in zip(times, dense, strict=True)])),
        }
        for name, times in samples.items()
    }


if __name__ == "__main__":
    main()
