"""Folders import downwards only, in one order; no import circle; no file outgrows a reader; few files at the top."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import tensorfold

PACKAGE = Path(tensorfold.__file__).parent

# Lowest first. A folder's files may import from their own folder and from those before it.
FOLDERS = [
    "utils",
    "algebra",
    "nn",
    "models",
    "methods",
    "recipes",
    "data",
    "hf",
    "calibration",
    "evaluation",
    "report",
    "folding",
    "export",
    "healing",
    "benchmark",
    "cli",
]
KNOWING_NO_TRANSFORMERS = ("utils", "algebra", "nn", "methods")


def modules():
    """Dotted name without the package's own, and path, of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"), path


NAMES = {name for name, _ in modules()}


def imports(path, lazy=True):
    """Modules of the package that a file imports; without those that are imported within functions, if not ``lazy``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if lazy else at_import(tree)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tensorfold":
            inside = node.module.removeprefix("tensorfold").removeprefix(".")
            for alias in node.names:
                name = f"{inside}.{alias.name}".removeprefix(".")
                yield name if name in NAMES else inside
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("tensorfold.") for a in node.names if a.name.startswith("tensorfold."))


def at_import(tree):
    """Statements that run when the module is imported."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield from ast.walk(node) if not isinstance(node, ast.FunctionDef | ast.ClassDef) else ()


def test_the_top_holds_folders():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(FOLDERS)
    assert len(folders) <= 16
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py"}


def test_folders_import_downwards():
    rank = {name: place for place, name in enumerate(FOLDERS)}
    wrong = [
        f"{name} imports {target}"
        for name, path in modules()
        for target in imports(path)
        if rank.get(target.partition(".")[0], -1) > rank.get(name.partition(".")[0], len(FOLDERS))
    ]
    assert not wrong


def test_no_module_imports_itself_in_a_circle():
    graph = {name: {t for t in imports(path, lazy=False) if t in NAMES and t != name} for name, path in modules()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_lower_folders_know_no_transformers():
    for name, path in modules():
        if name.partition(".")[0] in KNOWING_NO_TRANSFORMERS:
            assert "transformers" not in {
                (node.module or "").split(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom)
            }, path


# Attributes of models that transformers keeps to itself, or that hang on its versions.
INTERNALS = re.compile(
    r"_tied_weights_keys|all_tied_weights_keys|_init_weights|_is_hf_initialized|_no_split_modules|_from_config|_keys_to_.*"
)


def test_transformers_internals_are_known_in_one_folder():
    """Others ask ``hf``. PicoGPT is a model of transformers itself; a promised tie is read by name, never set."""
    touched = [
        f"{name}: {node.attr}"
        for name, path in modules()
        if not name.startswith(("hf.", "models.picogpt"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and INTERNALS.fullmatch(node.attr)
    ]
    assert not touched


# Kinds of structures, and the modules of one kind: outside the algebra all are asked through one protocol.
KINDS = {
    "Spec", "GradedSpec", "TokenMPSSpec", "MPOLinear", "MPOEmbedding", "GradedEmbedding", "GradedHead",
    "TokenMPSEmbedding", "TokenMPSHead",
}  # fmt: skip


def test_structures_are_not_told_apart_outside_the_algebra():
    told = [
        f"{name}: {ast.unparse(node)}"
        for name, path in modules()
        if not name.startswith("algebra.")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
        if KINDS & {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}
    ]
    assert not told


def test_tests_mirror_the_folders():
    tests = Path(__file__).parent
    folders = {path.name for path in tests.iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders <= set(FOLDERS)


def test_the_map_of_the_folders_is_true():
    """``docs/layout.md`` lists them in their order, and every file that it names is there."""
    page = (Path(__file__).parents[1] / "docs" / "layout.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == FOLDERS
    named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", page)
    assert len(named) > 20
    assert not [name for name in named if not (PACKAGE / name).exists() and not name.startswith(("tests/", "src/"))]


def test_files_stay_readable():
    paths = [*PACKAGE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]
    long = {str(path): n for path in paths if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_private_names_stay_in_their_files():
    borrowed = [
        f"{name} imports {alias.name} from {node.module}"
        for name, path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tensorfold")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not borrowed
