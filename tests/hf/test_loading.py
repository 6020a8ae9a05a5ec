"""Saving and loading: bit-equal logits for every architecture, ties kept and stored once, dtypes, shards, copies; and
every kind of damage to a checkpoint refused."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tensorfold
from tensorfold import MPO, Kronecker, LowRank, Recipe, Rule
from tensorfold.errors import InputError
from tensorfold.hf.loading import save
from tensorfold.nn import MPOEmbedding, MPOLinear

GATE = "model.layers.0.mlp.gate_proj"
ARCHITECTURES = ["gpt2", "llama", "qwen2", "opt", "gpt_neox", "gemma3", "phi", "mistral"]


def everything(tied: bool, calibrated: bool = False) -> Recipe:
    """Every matrix of a model folded, each group by another method."""
    if calibrated:
        methods = {"embedding": MPO(keep=0.5), "mlp": LowRank(keep=0.5), "attention": Kronecker(keep=0.3)}
    else:
        methods = {"embedding": LowRank(keep=0.5), "mlp": Kronecker(keep=0.5, scalars=True),
                   "attention": MPO(keep=0.5, sites=3)}  # fmt: skip
    rules = [Rule(targets, method) for targets, method in methods.items()]
    return Recipe((*rules, *([] if tied else [Rule(["lm_head"], LowRank(keep=0.6))])))


def stored_tensors(path: Path) -> list[str]:
    names = []
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names += list(tensors.keys())
    return names


def one_module(model, kind):
    return next(module for module in model.modules() if isinstance(module, kind))


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    return torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def cast(model, dtype: torch.dtype):
    """A copy with its parameters in another dtype. ``model.to`` would also round the buffers, as loading does not."""
    duplicate = copy.deepcopy(model)
    for parameter in duplicate.parameters():
        parameter.data = parameter.data.to(dtype)
    return duplicate


@torch.no_grad()
def logits(model, inputs: torch.Tensor) -> torch.Tensor:
    return model(inputs).logits


def assert_tied(model) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    mine, its = dict(embedding.named_parameters()), dict(head.named_parameters())
    assert mine
    assert all(its[name] is mine[name] for name in mine)
    assert all(its[name].data_ptr() == mine[name].data_ptr() for name in mine)


@pytest.fixture(scope="module")
def folded(tiny) -> torch.nn.Module:
    """A tied Llama folded everywhere. Not to be changed."""
    model = tiny("llama")
    tensorfold.fold(model, everything(tied=True))
    return model


@pytest.fixture(scope="module")
def directory(folded, tmp_path_factory) -> Path:
    """The same, saved. Not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "folded"
    folded.save_pretrained(path)
    return path


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "data-aware"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_survive_saving_bit_by_bit(tiny, tokenizer, prose, inputs, tmp_path, architecture, tied, calibrated):
    model = tiny(architecture, tied=tied)
    dense = logits(model, inputs)
    settings = {"tokenizer": tokenizer, "calibration": [prose], "calibration_tokens": 256} if calibrated else {}
    report = tensorfold.fold(model, everything(tied, calibrated), **settings)
    expected = logits(model, inputs)
    assert not torch.equal(expected, dense)
    model.save_pretrained(tmp_path, max_shard_size="10KB" if calibrated else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == calibrated

    loaded = tensorfold.load(tmp_path)
    assert (logits(loaded, inputs) - expected).abs().max() == 0
    folded = {name for name, module in loaded.named_modules() if isinstance(module, MPOLinear | MPOEmbedding)}
    assert folded == set(report.modules) | ({"lm_head"} if tied else set())
    assert sum(weight.numel() for weight in loaded.parameters()) == report.parameters_after < report.parameters_before
    names = stored_tensors(tmp_path)
    assert len(names) == len(set(names)) == len(list(loaded.parameters()))
    if tied:
        assert not any(name.startswith(("lm_head.cores", "embed_out.cores")) for name in names)
        assert_tied(loaded)
        assert_tied(loaded.to(torch.bfloat16))
    else:
        assert loaded.get_input_embeddings().cores[0] is not loaded.get_output_embeddings().cores[0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_models_are_loaded_as_they_are(tiny, inputs, tmp_path, architecture, tied):
    model = tiny(architecture, tied=tied)
    model.save_pretrained(tmp_path)
    loaded = tensorfold.load(tmp_path)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert type(loaded) is type(model)
    assert not loaded.training
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


def test_what_is_loaded_can_be_saved_again(directory, tmp_path):
    tensorfold.load(directory).save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_nothing_but_safetensors_and_json_is_written(directory):
    assert {path.suffix for path in directory.iterdir()} == {".safetensors", ".json"}


def test_after_the_import_transformers_alone_loads_it(folded, directory, inputs, tmp_path):
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import tensorfold, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(directory)!r})\n"
        f"with torch.no_grad(): logits = model(torch.load({str(tmp_path / 'inputs.pt')!r})).logits\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # Another process may use another number of threads, and so another order of summation.
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(folded, inputs), rtol=1e-5, atol=1e-6)


def test_transformers_and_load_agree(directory, inputs):
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(logits(theirs, inputs), logits(tensorfold.load(directory), inputs))
    assert_tied(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_asked_for_in_another_dtype(folded, directory, inputs, dtype):
    for asked in (dtype, str(dtype).removeprefix("torch.")):
        loaded = tensorfold.load(directory, dtype=asked)
        assert {weight.dtype for weight in loaded.parameters()} == {dtype}
        assert_tied(loaded)
        assert torch.equal(logits(loaded, inputs), logits(cast(folded, dtype), inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_stored_in_another_dtype(tiny, inputs, tmp_path, dtype, when):
    """Rounded before folding, or after it."""
    model = tiny("llama")
    if when == "before":
        model = cast(model, dtype)
    tensorfold.fold(model, everything(tied=True))
    model = cast(model, dtype)
    model.save_pretrained(tmp_path)
    loaded = tensorfold.load(tmp_path)
    assert {weight.dtype for weight in loaded.parameters()} == {dtype}
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert {weight.dtype for weight in tensorfold.load(tmp_path, dtype="float32").parameters()} == {torch.float32}


def test_copies_are_whole_and_their_own(directory, inputs):
    loaded = tensorfold.load(directory)
    duplicate = copy.deepcopy(loaded)
    assert torch.equal(logits(duplicate, inputs), logits(loaded, inputs))
    assert_tied(duplicate)
    ours = {weight.data_ptr() for weight in loaded.parameters()}
    assert not ours & {weight.data_ptr() for weight in duplicate.parameters()}


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
def test_generate_continues_greedily(tiny, inputs, tmp_path, architecture):
    model = tiny(architecture)
    tensorfold.fold(model, everything(tied=True))
    model.save_pretrained(tmp_path)
    loaded = tensorfold.load(tmp_path)
    expected = inputs[:1]
    for _ in range(6):
        following = logits(loaded, expected)[:, -1:].argmax(-1)
        expected = torch.cat([expected, following], 1)
    ids = loaded.generate(inputs[:1], min_new_tokens=6, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(ids, expected)


def test_gradients_reach_every_loaded_weight(directory, inputs):
    loaded = tensorfold.load(directory)
    loaded(inputs, labels=inputs).loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in loaded.parameters())


def test_biases_stay_as_they_were(tiny, tmp_path):
    biased, plain = tiny("gpt2"), tiny("llama")
    kept = torch.arange(128.0)
    biased.transformer.h[1].mlp.c_fc.bias.data.copy_(kept)
    for model, path in ((biased, tmp_path / "biased"), (plain, tmp_path / "plain")):
        tensorfold.fold(model, LowRank(keep=0.5))
        model.save_pretrained(path)
    assert torch.equal(tensorfold.load(tmp_path / "biased").transformer.h[1].mlp.c_fc.bias, kept)
    assert one_module(tensorfold.load(tmp_path / "plain"), MPOLinear).bias is None


def test_config_says_what_is_folded(folded, directory):
    stored = json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert stored["quant_method"] == "tensorfold"
    assert stored["tied"] == {"model.embed_tokens": "lm_head"}
    specs = {name: tensorfold.Spec.from_dict(data) for name, data in stored["modules"].items()}
    assert all(folded.get_submodule(name).spec == spec for name, spec in specs.items())


def test_tensors_that_old_checkpoints_carry_are_no_surprise(tiny, inputs, tmp_path):
    """GPT-2 files on the hub hold causal masks, which transformers names as ignorable."""
    model = tiny("gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(tensorfold.load(tmp_path), inputs), logits(model, inputs))


def test_a_tied_head_stored_twice_but_equal_is_tied(tiny, tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_tied(tensorfold.load(tmp_path))


def test_save_replaces_only_when_told_to(folded, tokenizer, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(InputError, match="not empty"):
        save(folded, tokenizer, target, {})
    assert [path.name for path in target.iterdir()] == ["old"]
    save(folded, tokenizer, target, {"base_model": "tiny"}, replace=True)
    assert not (target / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert tensorfold.load(target).num_parameters() == folded.num_parameters()


def core_or_weight(kind):
    return f"{GATE}.weight" if kind == "dense" else f"{GATE}.cores.0"


@pytest.fixture
def checkpoint_refused(fold_refused, refused, text_file):
    """Neither ``fold``, ``eval`` nor ``load`` takes this checkpoint, and all name what is wrong with it."""

    def check(path, says):
        fold_refused(path, "--keep", "0.5", says=[str(path), *says])
        refused("eval", path, "--text", text_file, "--protocol", "disjoint-64", says=[str(path), *says])
        with pytest.raises(InputError) as caught:
            tensorfold.load(path)
        assert all(words in str(caught.value) for words in says)

    return check


@pytest.mark.parametrize("kind", ["dense", "folded"])
class TestDamagedCheckpoints:
    def test_missing_tensor(self, checkpoint_refused, edited, kind):
        name = core_or_weight(kind)
        checkpoint_refused(edited(kind, tensors=lambda tensors: tensors.pop(name)), ["lacks", name])

    def test_extra_tensor(self, checkpoint_refused, edited, kind):
        path = edited(kind, tensors=lambda tensors: tensors.update({f"{GATE}.extra": torch.ones(2)}))
        checkpoint_refused(path, ["unexpected", f"{GATE}.extra"])

    def test_head_beside_the_embedding_it_is_tied_to(self, checkpoint_refused, edited, kind):
        path = edited(kind, tensors=lambda tensors: tensors.update({"lm_head.weight": torch.ones(300, 32)}))
        checkpoint_refused(path, ["lm_head.weight"])

    @pytest.mark.parametrize("shape", [(3, 5), (48,), ()])
    def test_wrong_shape(self, checkpoint_refused, edited, kind, shape):
        name = core_or_weight(kind)
        path = edited(kind, tensors=lambda tensors: tensors.update({name: torch.ones(shape)}))
        needed = {"dense": "needed (48, 32)", "folded": "needed (1, 48, 1, 9)"}[kind]
        checkpoint_refused(path, ["wrong shape", name, str(shape), needed])

    @pytest.mark.parametrize("kept", [0, 3, 100, -1])
    def test_truncated_file(self, checkpoint_refused, edited, kind, kept):
        path = edited(kind)
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:kept])
        checkpoint_refused(path, ["cannot be read"])

    def test_no_weights(self, checkpoint_refused, edited, kind):
        path = edited(kind)
        (path / "model.safetensors").unlink()
        checkpoint_refused(path, ["model.safetensors"])

    @pytest.mark.parametrize("damage", ["missing", "truncated", "index"])
    def test_shards(self, checkpoint_refused, edited, kind, damage):
        path = edited(kind)
        model = tensorfold.load(path)
        (path / "model.safetensors").unlink()
        model.save_pretrained(path, max_shard_size="30KB")
        shards = sorted(path.glob("model-*.safetensors"))
        assert len(shards) > 2
        if damage == "missing":
            shards[1].unlink()
        elif damage == "truncated":
            shards[1].write_bytes(shards[1].read_bytes()[:-1])
        else:
            (path / "model.safetensors.index.json").write_text("{")
        checkpoint_refused(path, [])

    @pytest.mark.parametrize("layers", [1, 3])
    def test_config_with_another_number_of_blocks(self, checkpoint_refused, edited, kind, layers):
        path = edited(kind, config=lambda config: config.update(num_hidden_layers=layers))
        checkpoint_refused(path, [f"model.layers.{2 if layers == 3 else 1}."])


def of_gate(**settings):
    return lambda folding: folding["modules"][GATE].update(settings)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folding: folding["modules"].update({"model.layers.7.x": folding["modules"][GATE]}), ["layers.7.x"]),
        (lambda folding: folding["modules"].pop(GATE), [f"{GATE}.weight"]),
        (of_gate(ranks=[3]), ["wrong shape", f"{GATE}.cores.0", "(1, 48, 1, 9)", "(1, 48, 1, 3)"]),
        (of_gate(ranks=[300]), ["300", "largest attainable", "32"]),
        (of_gate(ranks=[]), ["ranks", "2 sites"]),
        (of_gate(ranks="nine"), ["ranks"]),
        (of_gate(rank=9), ["rank"]),
        (of_gate(in_modes=[1, 33]), [GATE, "48×33", "48×32"]),
        (of_gate(out_modes=[10**12, 1], out_features=48), ["32,000,000,000,000 numbers for a matrix of 1,536"]),
        (lambda folding: folding.update(modules=[GATE]), ["modules"]),
        (lambda folding: folding["modules"].update({GATE: 9}), []),
        (lambda folding: folding.update(format=3), ["format 3"]),
        (lambda folding: folding.update(tied={}), ["model.embed_tokens", "lm_head"]),
    ],
)  # fmt: skip
def test_folded_configuration_at_odds_with_its_tensors(refused, edited, text_file, change, says):
    path = edited("folded", config=lambda config: change(config["quantization_config"]))
    refused("eval", path, "--text", text_file, "--protocol", "disjoint-64", says=[str(path), *says])
    with pytest.raises(InputError):
        tensorfold.load(path)


@pytest.mark.parametrize("settings", [{"tie_word_embeddings": False}, {"quantization_config": None}], ids=str)
def test_folded_checkpoint_with_a_dense_configuration(edited, settings):
    with pytest.raises(InputError, match=r"lm_head|model\.embed_tokens"):
        tensorfold.load(edited("folded", config=lambda config: config.update(settings)))


def test_whole_numbers_for_a_core(edited):
    def spoil(tensors):
        tensors[f"{GATE}.cores.0"] = tensors[f"{GATE}.cores.0"].int()

    with pytest.raises(InputError, match=rf"{GATE}.*floating point"):
        tensorfold.load(edited("folded", tensors=spoil))
