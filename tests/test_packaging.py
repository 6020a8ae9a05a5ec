"""What a wheel and an sdist hold, what is bounded, and what importing the command line costs."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import tensorfold

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "compress",
    "plan",
    "fold",
    "heal",
    "eval",
    "bench",
    "export",
    "sample",
    "report",
    "push",
    "recipes",
    "demo",
)
NAMED_OTHERWISE = {"llama_cpp": ["llama-cpp-python"]}  # where it is not installed
LATE = ("lora.py", "figures.py")  # modules that are imported where their extra is known to be there
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """``built("wheel")``: the names in what hatchling, the build backend, makes of the repository."""
    build = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling")
    from hatchling.builders.sdist import SdistBuilder

    out = str(tmp_path_factory.mktemp("dist"))

    def names(kind):
        builder = {"wheel": build.WheelBuilder, "sdist": SdistBuilder}[kind](str(ROOT))
        path = next(builder.build(directory=out, versions=["standard"]))
        if kind == "sdist":
            with tarfile.open(path) as archive:
                return {name.partition("/")[2] for name in archive.getnames()}
        return set(zipfile.ZipFile(path).namelist())

    return names


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = built("wheel")
    info = f"tensorfold-{tensorfold.__version__}.dist-info/"
    package = ROOT / "src" / "tensorfold"
    wanted = {f"tensorfold/{path.relative_to(package)}" for path in package.rglob("*") if path.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    assert {name for name in names if not name.startswith(info)} == wanted
    assert {f"{info}licenses/LICENSE", f"{info}entry_points.txt"} <= names
    for part in ("py.typed", "recipes/demo.yaml", "report/templates/page.html", "report/templates/page.js"):
        assert f"tensorfold/{part}" in names


def test_the_sdist_can_be_built_and_read(built):
    names = built("sdist")
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "src/tensorfold/py.typed"} <= names
    assert not any("__pycache__" in name for name in names)


def test_every_requirement_is_bounded():
    for requirement in [*PROJECT["dependencies"], *extras()]:
        if not requirement.startswith("tensorfold["):
            assert re.search(r">=[\d.]+,<\d", requirement), requirement


def test_every_import_is_declared():
    """Whatever the package imports is a dependency or, where it is imported in a function, perhaps of an extra."""
    wanted, optional = (set(map(distribution, each)) for each in (PROJECT["dependencies"], extras()))
    owners = importlib.metadata.packages_distributions()
    for path in (ROOT / "src" / "tensorfold").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_once = {name for node in tree.body for name in imported(node)}
        for name in {name for node in ast.walk(tree) for name in imported(node)}:
            if name in sys.stdlib_module_names or name == "tensorfold":
                continue
            given = {distribution(name), *map(distribution, owners.get(name, NAMED_OTHERWISE.get(name, ())))}
            needed = name in at_once and path.name not in LATE
            assert given & (wanted if needed else wanted | optional), f"{path}: {name}"


def extras():
    return [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]


def distribution(requirement):
    """Its name, as names are compared."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def imported(node):
    """First parts of what a statement imports from other packages."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return [node.module.partition(".")[0]] if isinstance(node, ast.ImportFrom) and not node.level else []


def test_the_command_line_starts_without_the_heavy_libraries():
    """--help and usage errors answer at once: neither torch nor transformers is imported for them."""
    program = """
import sys
from tensorfold.cli.main import run
for arguments in (["--help"], ["fold", "--help"], ["eval", "--help"], ["fold"], ["--version"]):
    try:
        run(arguments)
    except SystemExit:
        pass
heavy = {"torch", "transformers", "numpy", "scipy", "huggingface_hub", "matplotlib", "plotly", "datasets"}
sys.exit(",".join(sorted(heavy & sys.modules.keys())) or 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: tensorfold" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands(tmp_path, shell):
    """The script that each shell is given, and the words it gets for a half-typed command."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    typed = {"COMP_WORDS": "tensorfold re", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "tensorfold re"}

    def answer(what):
        program = [sys.executable, "-c", "from tensorfold.cli.main import app; app(prog_name='tensorfold')"]
        asked = {"_TENSORFOLD_COMPLETE": f"{what}_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        done = subprocess.run(
            program, capture_output=True, text=True, timeout=120, env={**environment, **typed, **asked}, check=False
        )
        return done.stdout

    assert f"_TENSORFOLD_COMPLETE=complete_{shell}" in answer("source")
    found = answer("complete")
    assert {"report", "recipes"} == {name for name in COMMANDS if re.search(rf"\b{name}\b", found)}, found


def test_the_changelog_opens_with_what_is_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", text, re.MULTILINE) == ["Unreleased", tensorfold.__version__]
