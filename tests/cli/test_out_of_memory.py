"""Running out of memory ends with exit status 1 and advice on less memory, not as an error of the input."""

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import tensorfold
from tensorfold.cli.errors import can_be_put_right, explain
from tensorfold.errors import InputError, TensorfoldError, is_out_of_memory

PACKAGE = Path(tensorfold.__file__).parent
TORCH = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9"
WANTS = {
    "MemoryError": MemoryError(),
    "torch, processor": RuntimeError(TORCH),
    "torch, processor, Windows' words": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    "torch, accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
    "torch, cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    "torch, mmap": RuntimeError(f"unable to mmap 9 bytes from file <x>: {os.strerror(errno.ENOMEM)} (12)"),
    "system": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "safetensors": SafetensorError(f"Error while deserializing header: {os.strerror(errno.ENOMEM)} (os error 12)"),
    "C++": RuntimeError("std::bad_alloc"),
}


@pytest.mark.parametrize("error", WANTS.values(), ids=WANTS)
def test_every_want_of_memory_is_known_through_what_was_made_of_it(error):
    assert is_out_of_memory(error)
    for wrapped in (InputError, TensorfoldError, OSError):
        caught = wrapped("config.json cannot be read")
        caught.__cause__ = error
        assert is_out_of_memory(caught)
        assert not can_be_put_right(caught)
        assert explain(caught, "sample").startswith("out of memory (")


@pytest.mark.parametrize(
    "error",
    [InputError("no file 'out of memory.txt'"), FileNotFoundError(errno.ENOENT, "No such file", "out of memory"),
     OSError(errno.ENOSPC, "full"), RuntimeError("shapes cannot be multiplied"), ValueError("x")],
)  # fmt: skip
def test_other_errors_are_no_want_of_memory(error):
    assert not is_out_of_memory(error)


@pytest.fixture
def starved(monkeypatch, request):
    """Let reading the weights, or the first forward pass, run out of memory."""

    def starve(where, error):
        def fail(*_, **__):
            raise error

        target = {
            "weights": (torch.nn.Module, "load_state_dict"),
            "reading": ("transformers.AutoModelForCausalLM.from_pretrained", None),
            "headers": ("tensorfold.hf.loading.safe_open", None),
            "configuration": ("transformers.AutoConfig.from_pretrained", None),
            "skeleton": ("transformers.AutoModelForCausalLM.from_config", None),
            "tokenizer": ("transformers.AutoTokenizer.from_pretrained", None),
            "forward": ("transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward", None),
            "saving": ("transformers.PreTrainedModel.save_pretrained", None),
            "tracing": ("torch.onnx.export", None),
            "solving": ("tensorfold.folding.in_memory.solve_matrix", None),
        }[where]
        monkeypatch.setattr(target[0], fail) if target[1] is None else monkeypatch.setattr(*target, fail)

    return starve


CASES = [
    ("plan", "configuration", ("--keep", ".5"), "smaller model"),
    ("plan", "skeleton", ("--keep", ".5"), "smaller model"),
    ("fold", "configuration", ("--keep", ".5", "--out", "OUT"), "--tokens"),
    ("fold", "reading", ("--keep", ".5", "--untie", "--out", "OUT"), "--tokens"),
    ("fold", "headers", ("--keep", ".5", "--calibrate", "TEXT", "--out", "OUT"), "--tokens"),
    ("fold", "tokenizer", ("--keep", ".5", "--calibrate", "TEXT", "--out", "OUT"), "--tokens"),
    ("fold", "forward", ("--keep", ".5", "--calibrate", "TEXT", "--out", "OUT"), "--tokens"),
    ("fold", "solving", ("--keep", ".5", "--calibrate", "TEXT", "--out", "OUT"), "--tokens"),
    ("fold", "saving", ("--keep", ".5", "--calibrate", "TEXT", "--out", "OUT"), "--tokens"),
    ("heal", "reading", ("--train", "TEXT", "--out", "OUT"), "--micro-batch"),
    ("heal", "forward", ("--train", "TEXT", "--out", "OUT", "--steps", "1", "--block", "16"), "--micro-batch"),
    ("eval", "reading", ("--text", "TEXT", "--protocol", "disjoint-64"), "shorter windows"),
    ("eval", "forward", ("--text", "TEXT", "--protocol", "disjoint-64"), "shorter windows"),
    ("sample", "reading", (), "--tokens"),
    ("sample", "tokenizer", (), "--tokens"),
    ("sample", "forward", (), "--tokens"),
    ("bench", "reading", ("--no-memory",), "--prefill"),
    ("bench", "forward", ("--no-memory", "--rounds", "1"), "--prefill"),
    ("export", "reading", ("--to", "dense", "--out", "OUT"), "--to dense"),
    ("export", "forward", ("--to", "int8", "--out", "OUT"), "--to dense"),
    ("export", "saving", ("--to", "dense", "--out", "OUT"), "--to dense"),
]


@pytest.mark.parametrize(("name", "where", "arguments", "lower"), CASES)
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(TORCH), OSError(errno.ENOMEM, "x")], ids=repr)
def test_a_command_without_memory_fails_with_1_and_says_what_to_lower(
    name, where, arguments, lower, error, command, starved, dense_directory, text_file, tmp_path
):
    starved(where, error)
    given = [{"OUT": tmp_path / "out", "TEXT": text_file}.get(each, each) for each in arguments]
    outcome = command(name, dense_directory, *given)
    assert outcome.status == 1, outcome.err
    assert outcome.err.startswith("tensorfold: out of memory ("), outcome.err
    assert lower in outcome.err
    assert not (tmp_path / "out").exists()


def test_loading_raises_the_want_itself(starved, dense_directory):
    starved("reading", RuntimeError(TORCH))
    with pytest.raises(RuntimeError, match="can't allocate"):
        tensorfold.load(dense_directory)


def test_every_handler_of_broad_errors_lets_a_want_of_memory_pass():
    broad = {"Exception", "BaseException", "RuntimeError", "OSError", "SafetensorError"}
    notes_only = {
        "benchmark/memory.py", "benchmark/report.py", "benchmark/rivals.py", "cli/main.py",
        "nn/machine_speeds.py", "utils/atomic_files.py", "utils/distributed.py", "utils/memory.py",
    }  # fmt: skip
    lax = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler) or path.relative_to(PACKAGE).as_posix() in notes_only:
                continue
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            body = ast.unparse(ast.Module(node.body, []))
            again = any(isinstance(each, ast.Raise) and each.exc is None for each in node.body)
            if {getattr(kind, "id", "") for kind in kinds} & broad and not again and "pass_on_memory" not in body:
                lax.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not lax


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_under_a_real_limit(tmp_path):
    """Loading 128 MB of weights fails within 60 MB of address space beyond what imports take."""
    code = (
        "import resource, sys, torch, transformers, tensorfold\n"
        "from tensorfold.cli.main import run\n"
        "from tensorfold.hf.loading import load\n"
        "torch.set_num_threads(1)\n"
        "config = transformers.LlamaConfig(vocab_size=65536, hidden_size=1024, intermediate_size=8,\n"
        "    num_hidden_layers=1, num_attention_heads=1, tie_word_embeddings=True)\n"
        "config.save_pretrained(sys.argv[1])\n"
        "from safetensors.torch import save_file\n"
        "model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)\n"
        "model.save_pretrained(sys.argv[1]); del model\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20,) * 2)\n"
        "run(['eval', sys.argv[1], '--text', 'python-docs'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "tensorfold: out of memory (" in done.stderr
