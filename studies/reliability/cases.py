"""Bad input for every command, by number: each case is what :func:`make_case` makes of a seed in an empty directory."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml
from mutate import mutate_bytes, mutate_json, mutate_safetensors, mutate_text, mutate_tree, odd

HALF = ["--keep", "0.5"]
EVAL = ["--protocol", "disjoint-64", "--max-tokens", "200"]
HEAL = ["--steps", "1", "--batch", "1", "--block", "32", "--out", "out"]
KINDS = (
    "config",
    "quantization",
    "weights",
    "index",
    "tokenizer",
    "record",
    "recipe",
    "text",
    "option",
    "gguf",
    "path",
)
SHARES = (16, 16, 18, 5, 7, 8, 14, 9, 15, 3, 3)


@dataclass(frozen=True)
class Case:
    """A command line and what is wrong about it. ``may_change``: files that the command may write beside ``out``."""

    kind: str
    arguments: list[str]
    what: str
    may_change: tuple[str, ...] = ()


def make_case(number: int | str, seed: int, templates: Path) -> Case:
    """The case of this number, with its files in the working directory; ``"onnx-3"`` is number 3 of a kind by name."""
    random = Random(f"{seed}:{number}")
    kind = str(number).rpartition("-")[0] or random.choices(KINDS, SHARES)[0]
    makers = {
        "onnx": _onnx,
        "tasks": _tasks,
        "recipe": _recipe,
        "text": _text,
        "option": _option,
        "gguf": _gguf,
        "path": _path,
        "record": _record,
    }
    if kind in makers:
        return makers[kind](random, templates)
    return _checkpoint(kind, random, templates)


def _copy(templates: Path, name: str) -> Path:
    target = Path(name)
    shutil.copytree(templates / name, target)
    return target


def _edit(path: Path, mutated: tuple[bytes, str]) -> str:
    path.write_bytes(mutated[0])
    return f"{path.name}: {mutated[1]}"


def _on_model(random: Random, model: str, folded: bool, text: str, quick: bool = False) -> list[str]:
    """A command that reads a model."""
    choices: list[tuple[int, list[str]]] = [
        (4, ["plan", model, *HALF]),
        (6, ["fold", model, *HALF, "--targets", random.choice(("mlp", "mlp,embedding", "all-linear")), "--out", "out"]),
        (2, ["fold", model, *HALF, "--calibrate", text, "--tokens", "100", "--effort", "low", "--out", "out"]),
        (4, ["eval", model, "--text", text, *EVAL]),
        (4, ["export", model, "--to", "dense", "--out", "out"]),
        (3, ["export", model, "--to", "int8", "--out", "out"]),
        (3, ["sample", model, "--tokens", "2", "--prompt", "Rain"]),
        (4, ["report", model, "--no-samples", "--out", "out.html"]),
        (2, ["report", model, "--tokens", "2", "--out", "out.html"]),
        (3, ["push", model, "owner/name", "--dry-run"]),
        (1, ["bench", model, "--tokens", "1", "--prefill", "4", "--decode", "1", "--rounds", "1", "--no-memory"]),
        (2, ["heal", model, "--train", text, *HEAL]),
        (1, ["plan", model, "--shapes"]),
    ]
    if folded:  # what takes folded models says more of them
        choices = [(weight, c) for weight, c in choices if c[0] not in ("plan", "fold")] + choices[:2]
    arguments = random.choices([c for _, c in choices], [weight for weight, _ in choices])[0]
    return [*arguments, *(["--json"] if random.random() < 0.2 and arguments[0] != "recipes" else [])]


def _checkpoint(kind: str, random: Random, templates: Path) -> Case:
    names = {"quantization": ("folded", "graded", "int8"), "index": ("sharded",)}.get(
        kind, ("dense", "gpt2", "folded", "graded", "int8")
    )
    name, what = _damaged(kind, random, templates, names)
    folded = name in ("folded", "graded", "int8")
    arguments = _on_model(random, name, folded, str(templates / "prose.txt"))
    if kind == "tokenizer" and arguments[0] in ("plan", "bench", "report"):
        arguments = ["eval", name, "--text", str(templates / "prose.txt"), *EVAL]
    return Case(kind, arguments, what)


def _damaged(kind: str, random: Random, templates: Path, names: tuple[str, ...]) -> tuple[str, str]:
    """A copy of one of the models with one file damaged: its name, and what was done."""
    name = random.choice(names)
    path = _copy(templates, name)
    if kind in ("config", "quantization"):
        file = path / random.choice(("config.json",) * 6 + (("generation_config.json",) if kind == "config" else ()))
        below = ("quantization_config",) if kind == "quantization" else ()
        return name, _edit(file, mutate_json(random, file.read_bytes(), below))
    if kind == "weights":
        file = path / "model.safetensors"
        return name, _edit(file, mutate_safetensors(random, file.read_bytes()))
    if kind != "index":
        file = path / random.choice(("tokenizer.json", "tokenizer_config.json"))
        return name, _edit(file, mutate_json(random, file.read_bytes()))
    file = path / "model.safetensors.index.json"
    if random.random() >= 0.5:
        return name, _edit(file, mutate_json(random, file.read_bytes()))
    index = json.loads(file.read_text())
    key = random.choice(list(index["weight_map"]))
    index["weight_map"][key] = random.choice(
        ("../../etc/passwd", "/etc/passwd", "../dense/model.safetensors", "absent.safetensors", "", ".", 3,
         None, "config.json", str(templates / "dense" / "model.safetensors"), "a\x00b", [], "x" * 5000)
    )  # fmt: skip
    return name, _edit(file, (json.dumps(index).encode(), f"{key} -> {str(index['weight_map'][key])[:60]}"))


def _onnx(random: Random, templates: Path) -> Case:
    """``export --to onnx``; of the folded models the one that is traced soonest."""
    kind = random.choice(("config", "quantization", "weights", "index", "tokenizer", "place"))
    if kind == "place":
        Path("file").write_text("mine")
        Path("loop").symlink_to("loop")
        out = random.choice(("file", "file/below", "loop", "a" * 300, "", ".", "/proc/x"))
        return Case("onnx", ["export", str(templates / "gpt2"), "--to", "onnx", "--out", out], f"--out {out[:40]!r}")
    names = {"quantization": ("graded", "int8"), "index": ("sharded",)}.get(kind, ("gpt2", "graded", "int8"))
    name, what = _damaged(kind, random, templates, names)
    return Case("onnx", ["export", name, "--to", "onnx", "--out", "out"], what)


def _tasks(random: Random, templates: Path) -> Case:
    """``eval --protocol lm-eval`` on a task of a local file: its YAML, its data or the options are wrong."""
    Path("tasks").mkdir()
    task: dict[str, Any] = {
        "task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "tasks/pages.jsonl"}},
        "output_type": random.choice(("loglikelihood_rolling", "loglikelihood")), "test_split": "test",
        "doc_to_text": "", "doc_to_target": "{{text}}", "metadata": {"version": 1.0},
    }  # fmt: skip
    rolling = task["output_type"] == "loglikelihood_rolling"
    task["metric_list"] = [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
        if rolling
        else {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    ]
    pages = b"".join(line + b"\n" for line in (templates / "lines.jsonl").read_bytes().splitlines()[:3])
    names, rest, what = "own", ["--include-path", "tasks"], ""
    how = random.choice(("tree", "tree", "tree", "yaml", "data", "option"))
    if how == "tree":
        what = mutate_tree(random, task)
    elif how == "data":
        pages, what = mutate_text(random, pages)
    elif how == "option":
        names, rest = random.choice(
            (("", rest), (",", rest), ("owm", rest), ("own,own", rest), ("own", ["--include-path", "absent"]),
             ("own", ["--include-path", "tasks/own.yaml"]), ("own", [*rest, "--limit", "0"]), ("../own", rest),
             ("own", [*rest, "--limit", "-1"]), ("own", [*rest, "--limit", "x"]), ("own", [*rest, "--text", "x"]),
             ("own", [*rest, "--batch-size", "0"]), ("own", [*rest, "--max-tokens", "5"]), ("own" * 2000, rest))
        )  # fmt: skip
        what = " ".join(["--tasks", names[:40], *rest])
    source = yaml.safe_dump(task).encode("utf-8", "surrogatepass")
    if how == "yaml":
        source, what = mutate_bytes(random, source)
    Path("tasks/own.yaml").write_bytes(source)
    Path("tasks/pages.jsonl").write_bytes(pages)
    model = str(templates / random.choice(("folded", "gpt2")))
    return Case("tasks", ["eval", model, "--protocol", "lm-eval", "--tasks", names, *rest], f"{how}: {what}")


def _record(random: Random, templates: Path) -> Case:
    name = random.choice(("folded", "graded", "int8"))
    path = _copy(templates, name)
    records = ("tensorfold.json", "tensorfold-evaluations.jsonl", "heal.jsonl", "tensorfold-bench.json", "README.md")
    file = path / random.choice(records[:4] * 3 + records[4:])
    data = file.read_bytes()
    what = _edit(file, mutate_bytes(random, data) if file.suffix == ".md" else mutate_json(random, data))
    text = str(templates / "prose.txt")
    commands: list[list[str]] = [
        ["report", name, "--no-samples", "--out", "out.html"],
        ["report", name, str(templates / "dense"), "--no-samples", "--out", "out.html"],
        ["push", name, "owner/name", "--dry-run"],
        ["eval", name, "--text", text, *EVAL, "--record"],
        ["heal", name, "--train", text, *HEAL],
    ]
    arguments = random.choices(commands, (6, 3, 4, 2, 1))[0]
    return Case("record", arguments, what, (f"{name}/tensorfold-evaluations.jsonl",) if "--record" in arguments else ())


def random_recipe(random: Random) -> Any:
    """A recipe that is nearly right: one entry of each method, mutated."""
    entries: list[dict[str, Any]] = [
        {"targets": "mlp", "method": "low-rank", "keep": 0.5, "pivots": True},
        {"targets": ["q_proj", "v_proj"], "method": "low-rank", "rank": 4},
        {"targets": "mlp", "method": "kronecker", "factor": [16, 4], "terms": 2, "init": "van-loan", "scalars": True},
        {"targets": "mlp", "method": "kronecker", "keep": 0.5, "permute": "hidden"},
        {"targets": "attention", "method": "mpo", "bond": 4, "sites": 3},
        {"targets": {"regex": "down"}, "method": "mpo", "out_modes": [4, 8], "in_modes": [6, 8], "keep": 0.5},
        {"targets": "embedding", "method": "token-mps", "modes": [2, 2, 2, 2, 2], "rank": 2},
        {"targets": "embedding", "method": "graded", "keep": 0.5},
        {"targets": "all-linear", "method": "auto", "keep": 0.5, "effort": "low"},
        {"targets": "attention", "method": "low-rank", "keep": 0.5, "exclude": "o_proj", "split": 2},
    ]
    recipe: dict[str, Any] = {"fold": random.sample(entries, random.choice((1, 1, 2)))}
    extras = {
        "model": "dense", "untie": True, "layers": [0, 1], "calibrate": {"text": "python-docs", "tokens": 100},
        "heal": {"steps": 1, "batch": 1, "block": 32, "betas": [0.9, 0.95]}, "eval": {"protocol": "disjoint-64"},
    }  # fmt: skip
    for key in random.sample(list(extras), random.choice((0, 0, 1, 2))):
        recipe[key] = extras[key]
    return recipe


def _recipe(random: Random, templates: Path) -> Case:
    recipe = random_recipe(random)
    if random.random() < 0.12:
        source = yaml.safe_dump(recipe).encode()
        odd_yaml = (b"a: &a [*a]", b"a: &a [x]\nb: *a", b"!!python/object/apply:os.system ['true']", b"? [a]\n: b",
                    b"&a [*a, *a]", b"fold: [{<<: 3}]", b"fold: 2001-01-01", b"%YAML 9.9\n---\nfold", b"[" * 3000,
                    b"fold: [{targets: mlp, method: low-rank, keep: 1e-400}]", b"{1: 2}", b"fold: !!binary x",
                    b"a: &a {b: &b [1,1,1,1,1,1,1,1,1]}\nfold: *a", b"fold:\n\t- x",
                    b"fold: [{? {a: b} : c}]")  # fmt: skip
        content, what = (random.choice(odd_yaml), "odd YAML") if random.random() < 0.6 else mutate_bytes(random, source)
    else:
        what = "; ".join(mutate_tree(random, recipe) for _ in range(random.choice((1, 1, 1, 2))))
        try:
            content = yaml.safe_dump(recipe, allow_unicode=random.random() < 0.5).encode("utf-8", "surrogatepass")
        except yaml.YAMLError:
            content = json.dumps(recipe).encode()
    Path("own.yaml").write_bytes(content)
    name = random.choice(("dense", "dense", "gpt2"))
    model = str(templates / name)
    commands = [
        ["plan", model, "--recipe", "own.yaml"],
        ["fold", model, "--recipe", "own.yaml", "--out", "out"],
        ["fold", model, "--recipe", "own.yaml", "--calibrate", "none", "--out", "out"],
        ["fold", model, "--recipe", "own.yaml", "--calibrate", str(templates / "prose.txt"), "--out", "out"],
        ["heal", str(templates / "folded"), "--recipe", "own.yaml", "--train", str(templates / "prose.txt"),
         "--out", "out", "--steps", "1", "--batch", "1", "--block", "32"],
    ]  # fmt: skip
    return Case("recipe", random.choices(commands, (5, 4, 4, 2, 1 + 2 * isinstance(recipe.get("heal"), dict)))[0], what)


def _text(random: Random, templates: Path) -> Case:
    suffix = random.choice(("txt", "jsonl"))
    template = templates / ("prose.txt" if suffix == "txt" else "lines.jsonl")
    file = Path(f"own.{suffix}")
    content, what = mutate_text(random, template.read_bytes())
    file.write_bytes(content)
    name = str(file)
    if random.random() < 0.2:
        name = "texts"
        Path(name).mkdir()
        file.rename(Path(name) / file.name)
        if random.random() < 0.3:
            Path("texts/loop").symlink_to(Path.cwd())
    dense, folded = str(templates / "dense"), str(templates / "folded")
    commands = [
        ["eval", dense, "--text", name, *EVAL],
        ["eval", folded, "--text", name, "--protocol", "lambada"],
        ["fold", dense, *HALF, "--calibrate", name, "--tokens", "100", "--effort", "low", "--out", "out"],
        ["heal", folded, "--train", name, *HEAL],
    ]
    return Case("text", random.choices(commands, (4, 3, 3, 2))[0], f"{name}: {what}")


NUMBERS = ("0", "-1", "1e400", "nan", "inf", "1.5", "", " ", "x", "0x10", "1_0", "٣", "9" * 400, "-0", "1,2", "1,,2",
           "true", "½")  # fmt: skip
WORDS = ("", " ", "x", "../../etc/passwd", "/etc/passwd", "é" * 300, "a" * 5000, "-", "--", "mlp", "mlp,", ",",
         "\udcff", "dense", "\n", "[", "{", "~", "$HOME", "con", "no/such", "a b", "*", "owner/name",
         "owner/na me")  # fmt: skip


def _option(random: Random, templates: Path) -> Case:
    dense, folded, text = (str(templates / name) for name in ("dense", "folded", "prose.txt"))
    lines: list[list[str]] = [
        ["plan", dense, *HALF, "--targets", "mlp"],
        ["plan", dense, "--recipe", "low-rank-80"],
        ["fold", dense, *HALF, "--targets", "mlp", "--effort", "low", "--out", "out"],
        ["fold", dense, *HALF, "--calibrate", text, "--tokens", "100", "--effort", "low", "--out", "out"],
        ["eval", folded, "--text", text, "--protocol", "disjoint-64", "--max-tokens", "200"],
        ["eval", folded, "--protocol", "lm-eval", "--tasks", "wikitext", "--limit", "2", "--include-path", "x"],
        ["heal", folded, "--train", text, "--steps", "1", "--lr", "0.001", "--batch", "1", "--micro-batch", "1",
         "--block", "32", "--set", "schedule=linear", "--set", "betas=[0.9,0.95]", "--out", "out"],
        ["heal", folded, "--train", text, "--teacher", dense, "--steps", "1", "--batch", "1", "--block", "32",
         "--set", "kl=1", "--blockwise-tokens", "64", "--report-to", "none", "--out", "out"],
        ["bench", folded, "--against", dense, "--tokens", "1", "--prefill", "4", "--decode", "1", "--rounds", "1",
         "--threads", "1", "--no-memory", "--dtype", "float32", "--way", "chain"],
        ["export", folded, "--to", "dense", "--out", "out"],
        ["sample", folded, "--prompt", "Rain", "--tokens", "2", "--temperature", "1", "--top-k", "3", "--seed", "1"],
        ["report", folded, dense, "--out", "out.html", "--prompt", "Rain", "--tokens", "2"],
        ["push", folded, "owner/name", "--dry-run"],
        ["recipes", "low-rank-80", "--copy", "own.yaml"],
    ]  # fmt: skip
    line = list(random.choice(lines))
    places = [index for index in range(1, len(line)) if not line[index].startswith("--")]
    how = random.choice(("value", "value", "value", "value", "drop", "twice", "unknown", "command", "missing value"))
    at = random.choice(places)
    if how == "value":
        old = line[at]
        number = old.replace(".", "").isdigit()
        line[at] = random.choice(NUMBERS if number else WORDS + NUMBERS[:5])
        if line[at - 1] == "--set":
            key = random.choice(
                ("lr", "steps", "betas", "seed", "precision", "workers", "windows", "text", "x", "", "clip")
            )
            value = json.dumps(odd(random)) if random.random() < 0.7 else random.choice(WORDS)
            if key == "workers":
                value = random.choice(("-1", "x", "nan", "[]"))
            if key == "steps":
                value = random.choice(("-1", "x", "nan", "[]", "0"))
            line[at] = f"{key}={value}"
        what = f"{line[at - 1]} {line[at][:60]!r}"
    elif how == "drop":
        what = f"without {line.pop(at)[:40]}"
    elif how == "twice":
        line += line[at - 1 : at + 1] if line[at - 1].startswith("--") else [line[at]]
        what = "an argument twice"
    elif how == "unknown":
        line.insert(at, random.choice(("--nonsense", "--kep", "-k", "--", "-", "--out=", "--keep=", "--json=1", "-é")))
        what = "an unknown option"
    elif how == "command":
        line[0] = random.choice(("", "folds", "Fold", "--fold", "é", "-", "quantize"))
        what = f"command {line[0]!r}"
    else:
        line = line[:at]
        what = "the end is missing"
    return Case("option", line, what)


def _gguf(random: Random, templates: Path) -> Case:
    import gguf
    import numpy

    writer = gguf.GGUFWriter("own.gguf", random.choice(("llama", "gpt2", "x", "")))
    writer.add_block_count(random.choice((1, 0, 10**6)))
    writer.add_embedding_length(random.choice((8, 0, 2**31)))
    writer.add_tensor("token_embd.weight", numpy.zeros((8, 8), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    what = _edit(Path("own.gguf"), mutate_bytes(random, Path("own.gguf").read_bytes()))
    text = str(templates / "prose.txt")
    commands = (
        ["plan", "own.gguf", *HALF],
        ["eval", "own.gguf", "--text", text],
        ["fold", "own.gguf", *HALF, "--out", "out"],
    )
    return Case("gguf", list(random.choice(commands)), what)


def _path(random: Random, templates: Path) -> Case:
    dense, folded = str(templates / "dense"), str(templates / "folded")
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full/mine").write_text("mine")
    Path("dangling").symlink_to("nowhere/at/all")
    Path("loop").symlink_to("loop")
    outs = ("file", "full", "file/below", "loop", "loop/x", "a" * 300, "x/" * 2000 + "y", "", ".", "/", "..", "full/..",
            "/dev/null", "/proc/x", "a\x00b", "é" * 200, "\udcff" * 3, "/dev/full")  # fmt: skip
    out = random.choice(outs)
    commands = (
        ["fold", dense, *HALF, "--out", out],
        ["fold", dense, *HALF, "--calibrate", str(templates / "prose.txt"), "--tokens", "100", "--out", out],
        ["export", folded, "--to", "dense", "--out", out],
        ["report", folded, "--no-samples", "--out", out],
        ["heal", folded, "--train", str(templates / "prose.txt"), *HEAL[:-1], out],
        ["recipes", "low-rank-80", "--copy", out],
        ["bench", folded, "--plot", out],
    )
    arguments = list(random.choice(commands))
    if random.random() < 0.1:  # the demo would take minutes where it can write
        out = random.choice(("file", "full", "file/below", "loop", "a" * 300, "/dev/null", "/dev/null/x"))
        arguments = ["demo", "--out", out]
    return Case("path", arguments, f"--out {out[:40]!r}")
