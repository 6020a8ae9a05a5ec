"""The house in order: layers import downwards only, and no file outgrows a reader."""

import ast
from pathlib import Path

import tensorfold

PACKAGE = Path(tensorfold.__file__).parent

# Lowest first. A module may import from its own layer and from those before it.
LAYERS = [
    ["errors"],
    ["strict", "cache", "effects", "fingerprints", "memory", "ranks", "evaluation_mode", "finite", "terminal"],
    ["block_checkpoints", "records"],
    ["seen_text"],
    ["settings"],
    ["algebra"],
    ["nn"],
    ["method"],
    ["methods", "auto"],
    ["direct_reads"],
    ["anatomy", "picogpt"],
    ["surgery", "ties", "sizes"],
    ["recipe"],
    ["shapes"],
    ["module_table"],
    ["planning"],
    ["text_forms"],
    ["texts", "tokens"],
    ["protocols"],
    ["hf"],
    ["block_calls"],
    ["calibrate", "evaluation", "gradients", "harness", "hub", "sampling"],
    ["value_heads"],
    ["budgets"],
    ["feedback", "search"],
    ["batches", "fold_inputs", "solving"],
    ["folding"],
    ["streaming"],
    ["onnx_graph"],
    ["export"],
    ["healing", "benchmark"],
    ["demo", "html_report"],
    [
        "cli_errors",
        "cli_options",
        "cli_bench",
        "cli_eval",
        "cli_export",
        "cli_heal",
        "cli_push",
        "cli_report",
        "cli_sample",
    ],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tensorfold."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "tensorfold":
            yield from (alias.name for alias in node.names if alias.name in RANK)
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("tensorfold."))


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.parts != ("__init__.py",):
            yield relative.parts[0].removesuffix(".py"), path


def test_every_module_has_a_layer():
    assert {name for name, _ in modules()} <= RANK.keys()


def test_imports_point_downwards():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {target}"
        for name, path in modules()
        for target in imports(path)
        if target in RANK and RANK[target] > RANK[name]
    ]
    assert not wrong


def test_algebra_and_modules_know_no_transformers():
    for name, path in modules():
        if RANK[name] <= RANK["methods"]:
            assert "transformers" not in {
                (node.module or "").split(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom)
            }, path


def test_files_stay_readable():
    paths = [*PACKAGE.rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    long = {str(path): n for path in paths if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_private_names_stay_in_their_files():
    borrowed = [
        f"{path.relative_to(PACKAGE)} imports {alias.name} from {node.module}"
        for _, path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tensorfold")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not borrowed
