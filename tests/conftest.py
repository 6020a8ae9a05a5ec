"""What several test files need: an offline session, tiny random models of several architectures, a tokenizer."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from byte_tokenizer import sentence_pairs

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# The command line sets it too, but here transformers is imported before the command line runs.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the small cat watches from the old wall.",
    "A good tool does one thing well, says what went wrong, and leaves nothing half done behind it.",
    "Rain fell on the river all night, and by the morning every boat in the harbour was full of water.",
    "She counted the stones twice, wrote both numbers down, and asked her brother to count them again.",
)


def pytest_configure() -> None:
    """Fail at once where the data directory is named but absent: the tests that read it would skip in silence."""
    value = os.environ.get("TENSORFOLD_DATA")
    if value is not None and not (value and os.path.isdir(value) and os.listdir(value)):
        raise pytest.UsageError(
            f"TENSORFOLD_DATA={value!r} is not a directory with files in it; correct the variable, or unset it."
        )


def pytest_collection_modifyitems(items) -> None:
    """Put the files of slow tests first, then those that fork.

    A worker that got a slow file last would let the others wait. A process forks safely only before an engine has
    started threads in it: a worker with OpenVINO in it was seen to end with SIGSEGV in a test that forks.
    """
    marked = {mark: {item.path for item in items if item.get_closest_marker(mark)} for mark in ("slow", "forks")}
    items.sort(key=lambda item: (item.path not in marked["slow"], item.path not in marked["forks"]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Scheduler of ``--dist loadfile`` that goes on after a worker was lost; see ``lost_workers``."""
    if config.getoption("dist") != "loadfile":
        return None
    from lost_workers import Scheduling

    return Scheduling(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, report, sched) -> None:
    """Count the first loss of a worker at a test as lost, not failed: the test is run again in another worker.

    A worker can be killed from outside, for want of memory say. A test that ends two workers fails.
    """
    if sched.is_first_loss(crashitem):
        report.outcome = "lost"
        print(f"\n{report.longrepr}; it is run again", flush=True)


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory):
    """A cache of the session's own, and one thread, so that results do not depend on the machine."""
    import torch

    torch.set_num_threads(1)
    previous = os.environ.get("TENSORFOLD_CACHE")
    os.environ["TENSORFOLD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["TENSORFOLD_CACHE"]
    if previous is not None:
        os.environ["TENSORFOLD_CACHE"] = previous


@pytest.fixture(scope="session")
def prose() -> str:
    """About 2,000 words, the same in every session."""
    return "\n".join(f"{number}. {SENTENCES[number * 7 % 4]}" for number in range(110))


@pytest.fixture(scope="session")
def text_file(prose, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(prose):
    """Byte-level BPE with 300 tokens, trained on the prose."""
    return sentence_pairs(prose)


def _configs():
    from transformers import (
        Gemma3TextConfig,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        MistralConfig,
        OPTConfig,
        PhiConfig,
        Qwen2Config,
        Qwen3MoeConfig,
    )

    tokens = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    common.update(tokens)
    gated = {**common, "intermediate_size": 48, "num_key_value_heads": 2}
    return {
        "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **tokens),
        "llama": lambda: LlamaConfig(**gated),
        "qwen2": lambda: Qwen2Config(**gated),
        "opt": lambda: OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **common),
        "gpt_neox": lambda: GPTNeoXConfig(intermediate_size=48, **common),
        "gemma3": lambda: Gemma3TextConfig(head_dim=8, **gated),
        "phi": lambda: PhiConfig(intermediate_size=48, **common),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=8, **gated
        ),
        "mistral": lambda: MistralConfig(**gated),
    }


@pytest.fixture(scope="session")
def tiny() -> Callable:
    """``tiny(architecture, tied=True, **settings)``: a freshly made random model, equal for equal arguments."""
    import torch
    from transformers import AutoModelForCausalLM

    def make(architecture: str, *, tied: bool = True, **settings):
        config = _configs()[architecture]()
        config.tie_word_embeddings = tied
        for key, value in settings.items():
            assert hasattr(config, key)
            setattr(config, key, value)
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture(scope="session")
def dense_directory(tiny, tokenizer, tmp_path_factory) -> Path:
    """A tiny tied Llama with its tokenizer, as ``save_pretrained`` writes them. Not to be changed."""
    path = tmp_path_factory.mktemp("models") / "dense"
    tiny("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def mixture_directory(tiny, tokenizer, tmp_path_factory) -> Path:
    """A tiny Qwen3 mixture of experts with its tokenizer. Not to be changed."""
    path = tmp_path_factory.mktemp("models") / "mixture"
    tiny("qwen3_moe").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def folded_directory(tiny, tokenizer, tmp_path_factory) -> Path:
    """The same Llama with MLP and embedding folded. Not to be changed."""
    import tensorfold
    from tensorfold.hf.loading import save

    model = tiny("llama")
    half = tensorfold.LowRank(keep=0.5)
    report = tensorfold.fold(model, tensorfold.Recipe((tensorfold.Rule(["mlp", "embedding"], half),)))
    path = tmp_path_factory.mktemp("models") / "folded"
    save(model, tokenizer, path, {"base_model": "dense", **report.to_dict()})
    return path


@dataclass(frozen=True)
class Outcome:
    """What a command printed and the status it ended with."""

    status: int
    out: str
    err: str


@pytest.fixture
def exact_products(monkeypatch) -> None:
    """Products of float32 matrices round nothing, as on a processor without instructions for bfloat16."""
    from tensorfold.utils import torch_modes

    monkeypatch.setattr(torch_modes, "multiplies_bfloat16", lambda: False)


@pytest.fixture
def student(folded_directory):
    import tensorfold

    return tensorfold.load(folded_directory)


@pytest.fixture
def teacher(dense_directory):
    import tensorfold

    return tensorfold.load(dense_directory)


@pytest.fixture
def command(capsys) -> Callable[..., Outcome]:
    """``command("plan", path, …)`` runs the command line in this process."""
    from tensorfold.cli.main import run

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as stopped:
                run([str(argument) for argument in arguments])
        finally:
            logging.captureWarnings(False)
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def refused(command) -> Callable[..., None]:
    """``refused(*arguments, says=[…])``: exit 2, and one line on standard error that holds every word of ``says``."""

    def check(*arguments: object, says: Iterable[str]) -> None:
        outcome = command(*arguments)
        assert outcome.status == 2, outcome.err
        assert outcome.out == ""
        assert outcome.err.startswith("tensorfold: ")
        assert outcome.err.count("\n") == 1
        for words in says:
            assert words in outcome.err

    return check


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty working directory, with no data directory to find texts in."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("TENSORFOLD_DATA", raising=False)
    return work


@pytest.fixture
def fold_refused(refused, workplace):
    """``fold`` of these arguments is refused, and nothing of the output directory is there, under any name."""

    def check(*arguments, says):
        refused("fold", *arguments, "--out", "out", says=says)
        assert os.listdir(workplace) == []

    return check


@pytest.fixture
def edited(tmp_path, dense_directory, folded_directory):
    """``edited("dense", tensors=…, config=…)``: a copy of a checkpoint with its tensors or configuration changed."""

    from safetensors.torch import load_file, save_file

    def copy(kind, *, tensors=None, config=None) -> Path:
        path = tmp_path / kind
        shutil.copytree({"dense": dense_directory, "folded": folded_directory}[kind], path)
        weights = path / "model.safetensors"
        if tensors is not None:
            changed = load_file(weights)
            tensors(changed)
            save_file(changed, weights, metadata={"format": "pt"})
        if config is not None:
            settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
            config(settings)
            (path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        return path

    return copy


@pytest.fixture
def card(monkeypatch):
    """The accelerator of ``fake_card``; counts by kind of device what products and decompositions are given."""
    import fake_card
    from tensorfold.algebra.precision import has_float64

    has_float64.cache_clear()
    with fake_card.Tally():
        yield fake_card.plug_in(monkeypatch)
    has_float64.cache_clear()
