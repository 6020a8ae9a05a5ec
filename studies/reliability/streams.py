"""Every architecture that transformers has: is each linear layer measured on what it gets in the whole model?

    python studies/reliability/streams.py --log studies/reliability/streams.jsonl

Tiny random models of each causal language model type (``tiny.py``), one a forked child. For every linear layer of every
block the inputs of the last of three windows in a pass through the whole model are compared with those that
``BlockStream`` gives it. ``--only TYPE`` shows one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from tiny import VOCABULARY, tiny_configs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tensorfold.calibration.block_calls import input_of
from tensorfold.calibration.block_stream import BlockStream
from tensorfold.errors import InputError
from tensorfold.models.anatomy import is_plain_linear
from tensorfold.models.modes import evaluation_mode

PARAMETERS = 2 * 10**7
SECONDS = 120


def build(model_type: str, ids: Tensor) -> tuple[Any, str]:
    """A tiny model that runs on token ids alone, with no weights of one value alone; or why there is none."""
    why = "no configuration"
    for config in tiny_configs(model_type, 0):
        if getattr(config, "is_encoder_decoder", False):
            return None, "encoder–decoder"
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > PARAMETERS:
                why = f"{size} parameters"
                continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            for parameter in model.parameters():  # gates that begin at zero would hide what passes through them
                if parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
                    parameter.data += 0.1 * torch.randn_like(parameter)
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
            return model, ""
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return None, why


def inputs(modules: dict[str, nn.Module], forward: Any) -> dict[str, list[Tensor]]:
    """What each module is given in one run, call by call."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.setdefault(name, []).append(input_of(args, kwargs).clone()),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]
    forward()
    for handle in handles:
        handle.remove()
    return seen


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(one, other, strict=True)
    )


def compare(model_type: str) -> dict[str, Any]:
    ids = torch.randint(10, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
    model, why = build(model_type, ids)
    if model is None:
        return {"outcome": "not built", "message": why}
    with evaluation_mode(model), torch.no_grad():
        try:
            stream = BlockStream(model, ids)
        except InputError as error:
            return {"outcome": "refused", "message": str(error)}
        prefix = f"{stream.name}."
        modules = {n: m for n, m in model.named_modules() if n.startswith(prefix) and is_plain_linear(m)}
        whole = inputs(modules, lambda: model(input_ids=ids[-1:], use_cache=False))
        alone: dict[str, list[Tensor]] = {}
        for index in range(len(stream.blocks)):
            alone |= inputs(modules, lambda index=index: stream.run(index, slice(2, 3)))
            stream.advance(index)
    wrong = [name for name in {**whole, **alone} if not same(whole.get(name, []), alone.get(name, []))]
    entry = {"blocks": stream.name, "layers": len(whole), "wrong": wrong[:5]}
    return {**entry, "outcome": "wrong" if wrong else "equal"}


def in_child(model_type: str) -> dict[str, Any]:
    read, write = os.pipe()
    if os.fork() == 0:
        signal.alarm(SECONDS)
        warnings.simplefilter("ignore")
        try:
            found = compare(model_type)
        except BaseException as error:
            found = {"outcome": "wrong", "message": f"{type(error).__name__}: {str(error)[:200]}"}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    os.wait()
    return json.loads(content) if content else {"outcome": "wrong", "message": f"no answer in {SECONDS} seconds"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    entries = []
    for model_type in [options.only] if options.only else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        entries.append({"type": model_type, **in_child(model_type)})
        print(json.dumps(entries[-1]), flush=True)
    if options.log:
        options.log.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    counts = Counter(entry["outcome"] for entry in entries)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    sys.exit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    main()
