"""Situations that are neither bad files nor bad arguments, by number: each must work, or be refused and change nothing.

    python studies/reliability/situations.py --cases 40 --log studies/reliability/situations.jsonl
    python studies/reliability/situations.py --only offload-3

``--cases`` is of each kind; ``--kinds`` names some of them. A case follows from its kind and number, and those in the
log are not run again. Kinds:

A kind is a generator: what it is about, then the verdict (accepted, refused or wrong) and what happened.

dtypes     a structure in a dtype, its weights at a scale, exported: what was written gives the model's logits
ids        token ids outside the table, to modules and to models: an error, never an answer
options    an option more on a command line: another result, or an error that names it
memory     a command in a process whose address space ends soon: done, or status 1 and a line that says memory
offload    blocks offloaded to the CPU or the disk: the logits of the model that is not
unchanged  an operation that is refused: weights, configuration and modules are as they were
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    os.environ.update(TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
    os.environ.pop("TENSORFOLD_DATA", None)

sys.path.insert(0, str(Path(__file__).parent))

import torch
from inputs import captured, fresh, timed
from templates import PROSE, llama, make_templates, tokenizer

import tensorfold
from tensorfold.export.checkpoints import export_dense, export_int8

MODELS = ("dense", "folded", "graded", "int8", "gpt2")
SECONDS = 120


def ids_of(model: Any, count: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (2, count), generator=generator)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=ids_of(model), use_cache=False).logits.float()


def dtypes(random: Random, templates: Path) -> Iterator[Any]:
    name, dtype = random.choice(MODELS), random.choice(("float32", "float16", "bfloat16", "float64"))
    to, scale = random.choice(("dense", "int8", "int8", "dense")), random.choice((1.0, 8.0, 64.0))
    model = tensorfold.load(templates / name, dtype=dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if scale > 1 and parameter.is_floating_point() and "norm" not in key and "ln_" not in key:
                parameter.mul_(scale ** (1 / 3))
    what = f"{name} in {dtype}, weights × {scale ** (1 / 3):.0f}, --to {to}"
    yield what
    own, exact = logits_of(model), logits_of(copy.deepcopy(model).to(torch.float64))
    export = export_int8 if to == "int8" else export_dense
    try:
        export(model, "out")
    except tensorfold.TensorfoldError as error:
        yield ("wrong", "out is there") if Path("out").exists() else ("refused", str(error))
        return
    got = logits_of(tensorfold.load("out"))
    difference = float((got - own).abs().max() / own.abs().max())
    # Rounding to half precision, which a few layers of large weights make much of, is as far from the truth either way.
    rounding = float((own - exact).abs().max() / own.abs().max())
    most = 0.5 if to == "int8" else 1e-3 if dtype in ("float32", "float64") else 0.2 + 2 * rounding
    fine = got.isfinite().all() and difference <= most
    yield ("accepted" if fine else "wrong", f"differs by {difference:.1e} of the largest logit")


def ids(random: Random, templates: Path) -> Iterator[Any]:
    model = tensorfold.load(templates / random.choice(MODELS))
    rows = model.config.vocab_size
    wrong = random.choice((-1, -2, -rows, -rows - 1, rows, rows + 1, 2 * rows, 10**9, -(2**31)))
    given = ids_of(model, 6)
    given[random.randrange(2), random.randrange(6)] = wrong
    target = random.choice(("model", "table", "generate"))
    calls: dict[str, Callable[[], Any]] = {
        "model": lambda: model(input_ids=given),
        "table": lambda: model.get_input_embeddings()(given),
        "generate": lambda: model.generate(given, max_new_tokens=1, do_sample=False, pad_token_id=1),
    }
    what = f"{type(model.get_input_embeddings()).__name__}: id {wrong} of {rows} to the {target}"
    yield what
    try:
        with torch.no_grad():
            calls[target]()
    except (IndexError, tensorfold.TensorfoldError) as error:
        yield ("refused", str(error))
        return
    yield ("wrong", "an answer")


OPTIONS: tuple[tuple[str, list[str], list[list[str]]], ...] = (
    ("fold", ["dense", "--keep", "0.5", "--targets", "mlp", "--out", "out"],
     [["--effort", "high"], ["--effort", "low"], ["--tokens", "200"], ["--untie"]]),
    ("fold", ["dense", "--recipe", "low-rank-80", "--calibrate", "none", "--out", "out"], [["--tokens", "200"]]),
    ("eval", ["folded", "--text", "prose.txt", "--protocol", "disjoint-64", "--max-tokens", "200"],
     [["--limit", "3"], ["--tasks", "wikitext"], ["--include-path", "."]]),
    ("heal", ["folded", "--train", "prose.txt", "--steps", "1", "--batch", "1", "--block", "32", "--out", "out"],
     [["--set", "kl=1"], ["--set", "hidden=1"], ["--set", "attention=1"], ["--set", "blockwise_epochs=2"],
      ["--set", "temperature=3"]]),
    ("sample", ["folded", "--tokens", "3", "--prompt", "Rain", "--temperature", "0"],
     [["--top-k", "2"], ["--seed", "3"]]),
    ("report", ["folded", "--no-samples", "--out", "out.html"], [["--prompt", "Rain"], ["--tokens", "3"]]),
    ("export", ["folded", "--to", "dense", "--out", "out"], [["--to", "int8"]]),
    ("plan", ["dense", "--keep", "0.5"], [["--targets", "mlp,embedding"], ["--untie"]]),
)  # fmt: skip


def options(random: Random, templates: Path) -> Iterator[Any]:
    """Twice, without and with the option: a result that is equal to the byte says that it had no effect."""
    command, words, more = random.choice(OPTIONS)
    option = random.choice(more)
    names = {name: str(templates / name) for name in (*MODELS, "prose.txt")}
    line = [command, *(names.get(word, word) for word in words)]
    what = " ".join([command, *words, *option])
    yield what
    results = []
    for arguments in (line, [*line, *option]):
        status, out, err = command_line(arguments)
        results.append(
            (status, "\n".join(_timeless(out)), {str(p): _contents(p) for p in sorted(Path("out").rglob("*.s*"))})
        )
        shutil.rmtree("out", ignore_errors=True)
        Path("out.html").unlink(missing_ok=True)
    if status == 2:
        named = option[0] in err or option[0].strip("-") in err or option[1].partition("=")[0] in err
        yield ("refused" if named else "wrong", err)
        return
    yield ("wrong", "no effect") if results[0] == results[1] else ("accepted", f"status {status}")


def _timeless(text: str) -> list[str]:
    return [line for line in text.splitlines() if " s" not in line and "out" not in line]


def _contents(path: Path) -> bytes:
    return path.read_bytes() if path.suffix == ".safetensors" else b""


def command_line(arguments: list[str]) -> tuple[int, str, str]:
    from tensorfold.cli.main import run

    status: Any = 0
    printed = Path("../printed").resolve()
    with captured(printed):
        try:
            run(arguments)
        except SystemExit as stopped:
            status = stopped.code or 0
    return (
        int(status),
        Path(f"{printed}.out").read_text(errors="replace"),
        Path(f"{printed}.err").read_text(errors="replace"),
    )


@cache
def _warm(lines: tuple[tuple[str, ...], ...]) -> None:
    """What libraries import late has its memory before the limit is set."""
    for line in lines:
        command_line(list(line))
        shutil.rmtree("out", ignore_errors=True)


def memory(random: Random, templates: Path) -> Iterator[Any]:
    room = random.choice((0, 1, 4, 16, 64)) * 2**20
    text, name = str(templates / "prose.txt"), str(templates / random.choice(MODELS[:4]))
    lines = [
        ["eval", name, "--text", text, "--protocol", "disjoint-64", "--max-tokens", "400"],
        ["fold", str(templates / "dense"), "--keep", "0.5", "--out", "out"],
        ["fold", str(templates / "dense"), "--keep", "0.5", "--calibrate", text, "--tokens", "200", "--out", "out"],
        ["export", str(templates / "folded"), "--to", "dense", "--out", "out"],
        ["sample", name, "--tokens", "2", "--prompt", "Rain"],
        ["heal", str(templates / "folded"), "--train", text, "--steps", "1", "--batch", "8", "--block", "64",
         "--out", "out"],
    ]  # fmt: skip
    line = random.choice(lines)
    _warm(tuple(map(tuple, lines[1:4] + lines[5:])))
    what = f"{line[0]} {Path(line[1]).name}, {room / 2**20:.0f} MB of room"
    yield what
    child = os.fork()
    if not child:
        with open("/proc/self/statm") as sizes:
            used = int(sizes.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
        try:
            status, _, err = command_line(line)
            Path("said").write_text(err)
        except BaseException as error:
            status = 99
            os.write(2, f"{type(error).__name__}\n".encode())
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = Path("said").read_text(errors="replace") if Path("said").exists() else ""
    if status == 0:
        yield ("accepted", "")
        return
    left = [path.name for path in Path.cwd().iterdir() if path.name not in ("said", "out.fold", "out.heal")]
    if "Traceback" in said or left:
        yield ("wrong", f"left {left}: {said}")
        return
    yield ("refused" if status == 1 and "memory" in said.lower() else "wrong", f"status {status}: {said}")


def offload(random: Random, templates: Path) -> Iterator[Any]:
    from accelerate import cpu_offload, disk_offload, dispatch_model

    name, way = random.choice(MODELS), random.choice(("cpu", "disk", "blocks on disk"))
    model = tensorfold.load(templates / name)
    own = logits_of(model)
    what = f"{name}, {way}"
    yield what
    try:
        if way == "cpu":
            cpu_offload(model, torch.device("cpu"))
        elif way == "disk":
            disk_offload(model, "offloaded", torch.device("cpu"))
        else:
            top = {key: "cpu" for key, _ in model.named_children()}
            body = next(key for key in top if key != "lm_head")
            places = {f"{body}.{key}": "cpu" for key, _ in getattr(model, body).named_children()} | {"lm_head": "cpu"}
            blocks = next(key for key in places if key.endswith((".layers", ".h")))
            count = len(model.get_submodule(blocks))
            del places[blocks]
            on_disk = random.randrange(count)
            places |= {f"{blocks}.{k}": "disk" if k == on_disk else "cpu" for k in range(count)}
            dispatch_model(model, places, main_device="cpu", offload_dir="offloaded", force_hooks=True)
        got = logits_of(model)
    except tensorfold.TensorfoldError as error:
        yield ("refused", str(error))
        return
    difference = float((got - own).abs().max())
    yield ("accepted" if difference <= 1e-5 else "wrong", f"logits differ by {difference:.1e}")


def state_of(model: Any) -> dict[str, Any]:
    return {
        "weights": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        "modules": {key: type(module).__name__ for key, module in model.named_modules()},
        "configuration": model.config.to_dict(),
        "training": model.training,
        "gradients": {key: parameter.requires_grad for key, parameter in model.named_parameters()},
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    found = [key for key in before if key != "weights" and before[key] != after[key]]
    if before["weights"].keys() != after["weights"].keys():
        return [*found, "names of weights"]
    return found + [key for key, tensor in before["weights"].items() if not _same(tensor, after["weights"][key])]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the bit, NaN included."""
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def unchanged(random: Random, templates: Path) -> Iterator[Any]:
    name = random.choice(MODELS)
    model = tensorfold.load(templates / name)
    if random.random() < 0.3:
        with torch.no_grad():
            parameters = [p for p in model.parameters() if p.is_floating_point()]
            random.choice(parameters).view(-1)[0] = torch.nan
    words, other = tokenizer(), llama(width=64)
    keep, width = tensorfold.LowRank(keep=0.5), model.config.hidden_size
    mlp, nowhere = tensorfold.Rule("mlp", keep), tensorfold.Rule("nowhere", keep)
    tiny = {"tokenizer": words, "steps": 1, "batch": 1, "block": 32}
    operations: dict[str, Callable[[], Any]] = {
        "fold, two rules that meet": lambda: tensorfold.fold(model, tensorfold.Recipe((mlp, mlp))),
        "fold, no such target": lambda: tensorfold.fold(model, tensorfold.Recipe((mlp, nowhere))),
        "fold, rank too high": lambda: tensorfold.fold(model, tensorfold.LowRank(rank=10**4)),
        "fold, too little text": lambda: tensorfold.fold(model, keep, words, ["a"]),
        "fold": lambda: tensorfold.fold(model, keep, words, [PROSE], calibration_tokens=120),
        "quantize": lambda: tensorfold.quantize(model),
        "append_tokens, other width": lambda: tensorfold.append_tokens(model, torch.ones(2, 7)),
        "append_tokens, NaN": lambda: tensorfold.append_tokens(model, torch.full((2, width), torch.nan)),
        "resize_token_embeddings": lambda: model.resize_token_embeddings(model.config.vocab_size + 7),
        "heal, other teacher": lambda: tensorfold.heal(model, text=[PROSE], teacher=other, hidden=1.0, **tiny),
        "heal, too little text": lambda: tensorfold.heal(model, text=["a"], **tiny),
        "evaluate, too little text": lambda: tensorfold.evaluate(model, words, "a", "disjoint-64"),
    }
    operation = random.choice(sorted(operations))
    model.train(random.random() < 0.5)
    before = copy.deepcopy(state_of(model))
    what = f"{name}: {operation}"
    yield what
    try:
        operations[operation]()
    except (tensorfold.TensorfoldError, NotImplementedError) as error:
        changed = differences(before, state_of(model))
        yield ("wrong", f"refused ({error}), but changed {changed[:4]}") if changed else ("refused", str(error))
        return
    yield ("accepted", "")


KINDS = {each.__name__: each for each in (dtypes, ids, options, memory, offload, unchanged)}


def run_one(kind: str, number: int, scratch: Path, templates: Path) -> dict[str, Any]:
    fresh(scratch)
    random = Random(f"{kind}-{number}")
    torch.manual_seed(0)
    what = ""
    try:
        with timed(SECONDS):
            case = KINDS[kind](random, templates)
            what = next(case)
            verdict, message = next(case)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        verdict, message = "wrong", f"{type(error).__name__}: {error}"
    message = " ".join(message.replace(f"{scratch}/", "").split())[:160]
    return {"case": f"{kind}-{number}", "what": what.replace(f"{scratch}/", ""), "verdict": verdict, "message": message}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", action="append", help="run this case, such as offload-3, and note nothing")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "tensorfold-situations")
    parser.add_argument("--log", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    args = parser.parse_args()
    args.scratch, args.log = args.scratch.resolve(), args.log.resolve()
    os.environ["TENSORFOLD_CACHE"] = str(args.scratch / "cache")
    torch.set_num_threads(1)
    templates = make_templates(args.scratch / "templates")
    if args.only:
        for case in args.only:
            kind, _, number = case.rpartition("-")
            print(json.dumps(run_one(kind, int(number), args.scratch, templates), indent=1))
        return
    done = {json.loads(line)["case"] for line in args.log.read_text().splitlines()} if args.log.exists() else set()
    for number in range(args.cases):
        for kind in args.kinds:
            if f"{kind}-{number}" not in done:
                entry = run_one(kind, number, args.scratch, templates)
                if entry["verdict"] == "wrong":
                    print(entry, file=sys.stderr)
                with args.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    entries = [json.loads(line) for line in args.log.read_text().splitlines()]
    print(Counter((entry["case"].rpartition("-")[0], entry["verdict"]) for entry in entries))


if __name__ == "__main__":
    main()
