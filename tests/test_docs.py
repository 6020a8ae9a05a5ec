"""README and docs: every command and snippet is run with small stand-ins, or parsed against the real command line."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import typer

from documents import DOCUMENTS, GIVEN, ROOT, blocks, reason_to_parse_only, stand_in, words
from tensorfold.algebra.specs import structure
from tensorfold.cli.main import app

# What peft says of every layer that it has not made itself.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:.is_gradient_checkpointing. is deprec")

COMMANDS = typer.main.get_command(app)
SHELL = [(document, command) for document in DOCUMENTS for block in blocks(document) for command in block.commands]
HOW_TO = [document for document in DOCUMENTS if document.startswith("docs/how-to/")]
OURS = [(document, command) for document, command in SHELL if command.startswith("tensorfold ")]


def run_together(document):
    """The document's commands that are run, in order: later ones use what earlier ones wrote."""
    return [c for d, c in OURS if d == document and reason_to_parse_only(c) is None]


def options_of(command):
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize(("document", "command"), OURS)
def test_commands_have_the_options_that_are_written(document, command):
    _, name, *rest = words(command)
    if name.startswith("--"):
        assert name in options_of(COMMANDS), command
        return
    known = COMMANDS.commands[name]
    for word in rest:
        if word.startswith("--"):
            assert word in options_of(known), f"{document}: {command}"
    if "[" not in command and "|" not in command and "..." not in command:
        known.make_context(name, rest)  # raises where an argument is missing or not of its kind


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Short texts of the model's own, and few measurements of speed."""
    monkeypatch.setattr("tensorfold.cli.pipeline._ROUNDS", 1)
    monkeypatch.setattr("tensorfold.cli.pipeline._DECODED", 2)
    monkeypatch.setattr("tensorfold.calibration.own_text._LENGTH", 64)


@pytest.fixture
def smaller(workplace, folded_directory):
    """A directory with the folded model that the documents call "smaller", and the examples."""
    shutil.copytree(folded_directory, workplace / "smaller")
    (workplace / "examples").symlink_to(ROOT / "examples")
    return workplace


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if run_together(d) and d not in HOW_TO])
def test_commands_run(document, command, workplace, dense_directory, folded_directory, text_file):
    made = {word for c in run_together(document) for word in re.findall(r"--out (\S+)", c)}
    if "smaller" not in made:
        shutil.copytree(folded_directory, workplace / "smaller")
    for written in run_together(document):
        arguments = words(stand_in(written, dense_directory, text_file))[1:]
        outcome = command(*arguments)
        assert outcome.status == 0, f"{written}\n{outcome.err}"


WITH_PYTHON = [d for d in DOCUMENTS if any(block.language == "python" for block in blocks(d))]


@pytest.mark.parametrize("document", [d for d in WITH_PYTHON if d not in HOW_TO])
def test_python_runs(document, smaller, dense_directory, text_file):
    scope: dict = {}
    exec(stand_in(GIVEN.get(document, ""), dense_directory, text_file), scope)
    for block in blocks(document):
        if block.language != "python" or "--8<--" in block.text:
            continue
        if "peft" in block.text and importlib.util.find_spec("peft") is None:
            pytest.skip("needs peft")
        code = "\n" * block.line + stand_in(block.text, dense_directory, text_file)
        exec(compile(code, str(ROOT / document), "exec"), scope)


def test_the_notebook_runs(workplace, dense_directory, capsys):
    """Its code cells, in one scope, on a tiny model."""
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], len(notebook["cells"]) <= 15) == (4, True)
    scope: dict = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            code = "".join(cell["source"])
            for written, run in (("smollm2-135m", str(dense_directory)), ("256", "32"), ("4096", "600"), ("=20", "=2")):
                code = code.replace(written, run)
            exec(compile(code, f"cell {number}", "exec"), scope)
    assert scope["again"].config.intermediate_size == 43
    assert scope["again"].num_parameters() == scope["report"].parameters_after
    assert "parameters in" in capsys.readouterr().out


@pytest.mark.parametrize("document", HOW_TO)
def test_a_how_to_page_runs_from_top_to_bottom(
    document, command, workplace, dense_directory, mixture_directory, text_file
):
    """Commands and Python in their order, each going on from what was written before it."""
    scope: dict = {}
    for block in blocks(document):
        if block.language == "python":
            exec(stand_in(block.text, dense_directory, text_file), scope)
        for written in block.commands:
            if written.startswith("tensorfold ") and reason_to_parse_only(written) is None:
                run = stand_in(written, dense_directory, text_file).replace("MIXTURE", str(mixture_directory))
                outcome = command(*words(run)[1:])
                assert outcome.status == 0, f"{written}\n{outcome.err}"


@pytest.mark.parametrize(("document", "command"), [pair for pair in SHELL if pair not in OURS])
def test_other_commands_name_what_there_is(document, command):
    program, *rest = words(command)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets
    elif program == "python":
        source = (ROOT / rest[0]).read_text()
        assert all(f'"{word}"' in source for word in rest if word.startswith("--")), command
    elif program.endswith("pip"):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"(?:tensorfold|\.)\[([\w,-]+)\]", command)
        assert {e for extra in extras for e in extra.split(",")} <= project["optional-dependencies"].keys()
    else:
        assert program == "torchrun"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("fold.py", "DENSE --keep 0.5 --text TEXT --tokens 300 --protocol disjoint-64 --max-tokens 256"),
        ("heal.py", "DENSE --keep 0.5 --text TEXT --steps 2 --block 32"),
        ("lora.py", "smaller --text TEXT --steps 3 --block 32"),
        ("own_method.py", "DENSE --keep 0.5"),
        ("own_structure.py", "DENSE"),
    ],
)
def test_examples_run(name, arguments, smaller, dense_directory, text_file, monkeypatch, capsys):
    path = ROOT / "examples" / name
    assert len(path.read_text().splitlines()) <= 60
    if name == "lora.py":
        pytest.importorskip("peft")
    monkeypatch.setattr(sys, "argv", [name, *stand_in(arguments, dense_directory, text_file).split()])
    # A structure that is defined again here is not to take the place of the one that other tests use.
    for kind, own in list(structure.STRUCTURES.items()):
        monkeypatch.setitem(structure.STRUCTURES, kind, own)
    spec = importlib.util.spec_from_file_location("__main__", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    out = capsys.readouterr().out
    if name == "own_method.py":
        sketch, low_rank = (float(line.rpartition(" ")[2]) for line in out.strip().splitlines())
        assert low_rank <= sketch < 1.1 * low_rank  # the best there is, and a little above it


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "reference.html").read_text()
    assert "tensorfold.folding.in_memory.fold" in reference
    assert "class Sketch" in re.sub(r"<[^>]+>", "", (tmp_path / "site" / "adding-a-method.html").read_text())


def test_every_public_name_is_in_the_reference():
    import tensorfold

    text = (ROOT / "docs" / "reference.md").read_text()
    documented = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith("::: ")}
    errors = {"InputError", "SpecError", "TensorfoldError"}  # of the module, as a whole
    assert set(tensorfold.__all__) - {"nn"} <= documented | errors
