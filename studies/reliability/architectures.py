"""Every architecture that transformers has: fold, save, load with equal logits and generate, or be refused by name.

    python studies/reliability/architectures.py --log studies/reliability/architectures.jsonl

Model types are those of ``MODEL_FOR_CAUSAL_LM_MAPPING``, tiny, random and seeded (``tiny.py``), one variant of each and
more of the common ones until there are ``--count``. Each runs in a forked child with limits on time and memory. What
the dense model cannot do by itself (run, generate, come back from disk the same) is not asked of the folded one, and is
noted. The same command goes on after an interruption; ``--only TYPE`` shows one; ``--experts`` folds the experts of the
types that keep them in one tensor, and logs to ``experts.jsonl``; ``--table`` writes ``docs/architectures.md`` from
both.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from templates import PROSE, tokenizer
from tiny import VOCABULARY, tiny_configs
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tensorfold
from tensorfold import Auto, Graded, Kronecker, LowRank, Recipe, Rule
from tensorfold.errors import TensorfoldError
from tensorfold.models.experts import fused_experts

SECONDS = 600
MEMORY = 2 * 2**30  # above what the imports take
PARAMETERS = 2 * 10**7
ROOT = Path(__file__).parents[2]
EXPERTS_LOG = Path(__file__).with_name("experts.jsonl")
COMMON = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt", "phi", "phi3", "olmo2",
    "granite", "stablelm", "starcoder2", "cohere", "smollm3", "bloom", "mpt", "codegen", "gptj", "mixtral", "qwen3_moe",
)  # fmt: skip
RECIPES = {
    "low-rank": Recipe((Rule("mlp", LowRank(keep=0.5)),)),
    "kronecker": Recipe((Rule("mlp", Kronecker(keep=0.5)),)),
    "auto": Recipe((Rule("mlp", Auto(keep=0.5)),)),
    "auto, everything": Recipe((Rule("all-linear", Auto(keep=0.6)), Rule("embedding", Graded(keep=0.7)))),
    "auto, calibrated": Recipe((Rule("all-linear", Auto(keep=0.6, effort="low")),)),
}
EXPERTS = {
    "low-rank": Recipe((Rule("experts", LowRank(keep=0.6, pivots=True)),)),
    "kronecker": Recipe((Rule("experts", Kronecker(keep=0.6)),)),
    "auto, calibrated": Recipe((Rule(["all-linear", "experts"], Auto(keep=0.7, effort="low")),)),
}


def cases(count: int) -> list[tuple[str, int]]:
    """Model types and variants: each type once, then the common ones again."""
    every = [(name, 0) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
    again = [(name, variant) for variant in range(1, 20) for name in COMMON]
    return every + again[: max(0, count - len(every))]


def build(model_type: str, variant: int) -> tuple[Any, str]:
    """A tiny dense model that runs, or why there is none."""
    why = "no small configuration was found"
    ids = torch.randint(10, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    for config in tiny_configs(model_type, variant):
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
            if size > PARAMETERS:
                why = f"{size:,} parameters by a configuration made small"
                continue
            torch.manual_seed(variant)
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            if torch.isfinite(logits).all():
                return model, ""
            why = "logits that are not finite"
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None, why


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)  # some draw hashes or samples
    with torch.no_grad():
        return model(input_ids=ids).logits


def generated(model: Any, ids: torch.Tensor) -> Any:
    torch.manual_seed(0)
    try:
        return model.generate(input_ids=ids[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=1)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def attempt(model_type: str, variant: int, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """Build, fold, save, load, generate; what came of it."""
    random = Random(f"{model_type}:{variant}")
    recipe = random.choice(list(recipes))
    model, why = build(model_type, variant)
    entry: dict[str, Any] = {"recipe": recipe}
    if recipes is EXPERTS and not (model is not None and fused_experts(model)):
        return {**entry, "outcome": "no experts", "dense": why}
    if model is None:
        return _without_dense(model_type, variant, {**entry, "dense": why})
    ids = torch.randint(10, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    entry.update(kind=type(model).__name__, parameters_before=sum(p.numel() for p in model.parameters()))
    words = tokenizer() if recipe.endswith("calibrated") else None
    with tempfile.TemporaryDirectory() as scratch:
        dense, target, streamed = (Path(scratch) / name for name in ("dense", "folded", "streamed"))
        before, plain = logits_of(model, ids), generated(model, ids)
        model.save_pretrained(dense)
        try:
            again = AutoModelForCausalLM.from_pretrained(dense).eval()
            entry["dense_round_trip"] = float((logits_of(again, ids) - before).abs().max())
        except Exception as error:
            entry["dense_round_trip"] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        try:
            text = [PROSE] if words else None
            report = tensorfold.fold(model, recipes[recipe], words, text, calibration_tokens=240 if words else None)
        except TensorfoldError as error:
            return {**entry, "outcome": "refused", "message": str(error)[:300]}
        entry.update(folded=len(report.modules), parameters_after=report.parameters_after)
        first = logits_of(model, ids)
        if not torch.isfinite(first).all():
            return {**entry, "outcome": "wrong", "message": "logits that are not finite"}
        try:
            model.save_pretrained(target)
            loaded = tensorfold.load(target).eval()
        except TensorfoldError as error:
            return {**entry, "outcome": "refused on loading", "message": str(error).replace(scratch, "")[:300]}
        entry["difference"] = float((logits_of(loaded, ids) - first).abs().max())
        text_now = generated(loaded, ids)
        entry["generates"] = not isinstance(text_now, str)
        if isinstance(text_now, str) and isinstance(plain, str):
            entry["generates"] = f"not, as the dense model: {plain}"
        wrong = [f"difference {entry['difference']}"] if not entry["difference"] <= 1e-5 else []
        wrong += [f"generate: {text_now}"] if entry["generates"] is False else []
        if words is None:  # from disk to disk, the same
            try:
                tensorfold.fold_directory(dense, recipes[recipe], streamed)
                entry["from_disk"] = float((logits_of(tensorfold.load(streamed).eval(), ids) - first).abs().max())
                wrong += [f"from disk to disk: {entry['from_disk']}"] if not entry["from_disk"] <= 1e-4 else []
            except TensorfoldError as error:
                entry["from_disk"] = f"refused: {str(error)[:160]}".replace(scratch, "")
    return {**entry, "outcome": "wrong" if wrong else "folded", **({"message": "; ".join(wrong)} if wrong else {})}


def _without_dense(model_type: str, variant: int, entry: dict[str, Any]) -> dict[str, Any]:
    """No dense model runs by its tokens alone: whether planning and folding say something clear all the same."""
    for config in tiny_configs(model_type, variant):
        try:
            planned = tensorfold.plan(config, RECIPES["low-rank"])
        except TensorfoldError as error:
            # An encoder–decoder is refused for what it is; anything else for its tiny configuration, our own doing.
            outcome = "not built" if "can be built" in str(error) else "refused"
            return {**entry, "outcome": outcome, "message": str(error)[:300]}
        return {**entry, "outcome": "planned only", "folded": len(planned.modules)}
    return {**entry, "outcome": "not built"}


def in_child(model_type: str, variant: int, show: bool, recipes: Mapping[str, Recipe] = RECIPES) -> dict[str, Any]:
    """The outcome, from a forked process with limits of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        signal.alarm(SECONDS)
        if not show:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        warnings.simplefilter("ignore")
        try:
            found = attempt(model_type, variant, recipes)
        except BaseException as error:
            if show:
                traceback.print_exc()
            where = traceback.extract_tb(error.__traceback__)
            ours = next(
                (f"{Path(f.filename).name}:{f.lineno}" for f in reversed(where) if "tensorfold/" in f.filename), ""
            )
            found = {"outcome": "wrong", "message": f"{type(error).__name__}: {str(error)[:200]} ({ours})"}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    if not content:
        return {"outcome": "wrong", "message": f"ended by signal {os.WTERMSIG(status)}"}
    return json.loads(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=220)
    parser.add_argument("--only", action="append", help="this model type, with what goes wrong shown")
    parser.add_argument("--log", type=Path, default=Path(__file__).with_name("architectures.jsonl"))
    parser.add_argument(
        "--experts", action="store_true", help="fold experts in one tensor, of the types that have them"
    )
    parser.add_argument("--table", action="store_true", help="write docs/architectures.md and do nothing else")
    args = parser.parse_args()
    if args.table:
        text = table(read(args.log), read(EXPERTS_LOG))
        (ROOT / "docs/architectures.md").write_text(text, encoding="utf-8")
        return
    recipes = EXPERTS if args.experts else RECIPES
    if args.experts:
        args.log, args.count = EXPERTS_LOG, 0
    torch.set_num_threads(1)
    if args.only:
        for name in args.only:
            for model_type, variant in cases(args.count):
                if model_type == name:
                    print(name, variant, json.dumps(in_child(name, variant, True, recipes), indent=1))
        return
    done = {(entry["type"], entry["variant"]) for entry in read(args.log)} if args.log.exists() else set()
    for model_type, variant in cases(args.count):
        if (model_type, variant) in done:
            continue
        entry = {"type": model_type, "variant": variant, **in_child(model_type, variant, False, recipes)}
        with args.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if entry["outcome"] not in ("folded", "refused", "no experts"):
            print(entry, file=sys.stderr)
    print(Counter(entry["outcome"] for entry in read(args.log)))


def read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def table(entries: list[dict[str, Any]], experts: list[dict[str, Any]]) -> str:
    """The page of the documentation: a row for every model type."""
    mixtures = {entry["type"]: entry for entry in experts if entry["outcome"] != "no experts"}
    folded = sum(entry["outcome"] == "folded" for entry in mixtures.values())
    by_type: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        by_type.setdefault(entry["type"], []).append(entry)
    counts = Counter(entry["outcome"] for entry in entries)
    shown = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    lines = [
        "# Architectures",
        "",
        "No architecture is known to Tensorfold by name. This page says what happens to each causal language model "
        f"type of transformers {transformers.__version__}: {len(entries)} tiny random models of {len(by_type)} types, "
        "by `studies/reliability/architectures.py`, which writes it.",
        "",
        f"Outcomes: {shown}.",
        "",
        "*Folded* means folded, saved, loaded by `tensorfold.load` with the same logits, and, where the dense model "
        "does, generating. *Refused* means an `InputError` that says why. *Planned only*: no tiny dense model was "
        "found that runs on token ids alone, so the fold was planned and not made; *not built*: none that can be "
        "built, which says nothing about the type. Sizes are tiny: quality is not what this page is about.",
        "",
        f"*Experts*: {len(mixtures)} types keep the experts of a layer in one tensor, which `mlp` and `all-linear` "
        f"pass over and `experts` means. A model of each has these folded, by the recipe that is named: {folded} fold, "
        "load with the same logits and generate where the dense model does.",
        "",
        "| model type | recipes tried | outcome | experts |",
        "|---|---|---|---|",
    ]
    for name in sorted(by_type):
        mine = by_type[name]
        recipes = ", ".join(dict.fromkeys(entry.get("recipe", "") for entry in mine))
        outcomes = "; ".join(dict.fromkeys(_outcome(entry) for entry in mine))
        own = mixtures.get(name)
        said = "" if own is None else f"{own['recipe']}: {_outcome(own).partition(' (')[0]}"
        lines.append(f"| `{name}` | {recipes} | {outcomes} | {said} |")
    return "\n".join(lines) + "\n"


def _outcome(entry: dict[str, Any]) -> str:
    outcome, said = entry["outcome"], entry.get("message") or entry.get("dense") or ""
    if outcome == "folded":
        return f"folded ({entry['kind']})"
    said = re.sub(r"^/\S+: ", "", said).partition("; needed")[0].partition("; known are")[0]
    return f"{outcome}: {' '.join(said.replace('|', '/').replace('<', '').replace('>', '').split())[:130]}"


if __name__ == "__main__":
    main()
