"""Folded models in the hands of accelerate and of DataParallel: the logits are those of the model in memory."""

import copy
import pickle

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch

import tensorfold
from tensorfold import MPO, Graded, InputError, Kronecker, LowRank, Recipe, Rule, TokenMPS
from tensorfold.export.checkpoints import export_dense, export_int8
from tensorfold.models.sizes import stored_bytes

IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
LAYERS = {
    "low-rank": LowRank(keep=0.5),
    "pivots": LowRank(keep=0.6, pivots=True),
    "scalars": Kronecker(keep=0.4, scalars=True, permute="all"),
    "mpo": MPO(bond=6, sites=3),
}
TABLES = {
    "low-rank": LowRank(keep=0.5),
    "ordered": Kronecker(factor=(30, 8), terms=9, order="cluster"),
    "graded": Graded(keep=0.5),
    "token-mps": TokenMPS(rank=4),
}
# A structure for the layers, one for the table, whether the head is tied, whether all of it is in int8.
MARKET = [
    ("low-rank", "graded", True, False),
    ("pivots", "low-rank", True, False),
    ("scalars", "token-mps", True, False),
    ("mpo", "ordered", True, False),
    ("low-rank", "token-mps", False, False),
    ("low-rank", "graded", True, True),
    ("pivots", "ordered", True, True),
    ("scalars", "token-mps", True, True),
    ("mpo", "low-rank", False, True),
]


def folded(tiny, layers, table, tied, int8):
    model = tiny("llama", tied=tied)
    rules = [Rule("all-linear", LAYERS[layers]), Rule("embedding", TABLES[table])]
    tensorfold.fold(model, Recipe(rules))
    if int8:
        tensorfold.quantize(model)
    return model.eval()


@pytest.fixture(params=MARKET, ids=lambda row: "-".join(map(str, row)))
def model(request, tiny):
    return folded(tiny, *request.param)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def halves(model, first, second):
    """A device map of a block here and a block there."""
    names = {"model.embed_tokens": second, "model.norm": first, "lm_head": second, "model.rotary_emb": first}
    return {**names, **{f"model.layers.{k}": (second, first)[k % 2] for k in range(len(model.model.layers))}}


def place(form, model, folder):
    """The model, offloaded in one of accelerate's forms."""
    if form == "cpu_offload":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if form == "disk_offload":
        return disk_offload(model, str(folder / "off"), execution_device=torch.device("cpu"))
    if form == "dispatch_model":
        return dispatch_model(model, halves(model, "cpu", "disk"), main_device="cpu", offload_dir=str(folder / "off"))
    model.save_pretrained(folder / "saved")
    if form == "load_checkpoint_and_dispatch":
        meta = {id(p): torch.nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
        empty = copy.deepcopy(model, meta)
        # accelerate looks for both names of a tied weight on the disk, of dense models too.
        ends = dict.fromkeys(("model.embed_tokens", "lm_head"), "cpu") if model.config.tie_word_embeddings else {}
        where = {**halves(model, "cpu", "disk"), **ends}
        off = str(folder / "off")
        return load_checkpoint_and_dispatch(empty, str(folder / "saved"), where, offload_folder=off)
    how = {"device_map": halves(model, "cpu", "disk")}
    if form == "max_memory":
        how = {"device_map": "auto", "max_memory": {"cpu": int(0.6 * stored_bytes(model))}}
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder / "saved", offload_folder=str(folder / "off"), **how)


@pytest.mark.parametrize(
    "form",
    ["cpu_offload", "disk_offload", "dispatch_model", "load_checkpoint_and_dispatch", "device_map", "max_memory"],
)
def test_offloaded_models_compute_as_those_in_memory(form, model, tmp_path):
    want = logits(model)
    placed = place(form, model, tmp_path).eval()
    assert any(p.device.type == "meta" for p in placed.parameters())
    torch.testing.assert_close(logits(placed), want, rtol=0, atol=0)
    torch.testing.assert_close(logits(placed), want, rtol=0, atol=0)


def replica(network):
    """What ``torch.nn.parallel.replicate`` makes for one device."""
    copies = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, copied in copies.items():
        copied._former_parameters = {}
        for name, child in module._modules.items():
            setattr(copied, name, copies[child])
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            setattr(copied, name, None if tensor is None else tensor.clone())
    return copies[network]


def test_replicas_compute_as_the_model(model):
    want, copied = logits(model), replica(model)
    assert not list(copied.parameters())
    torch.testing.assert_close(logits(copied), want)


def test_replicas_give_their_gradients_to_the_model(tiny):
    model = folded(tiny, "pivots", "graded", True, False)
    replica(model)(IDS, labels=IDS).loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


def test_models_are_copied_and_pickled(model):
    want = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(copied), want, rtol=0, atol=0)


def test_modules_are_hooked_as_units(model):
    """No device map may part the cores of one module, which compute together."""
    parts = {type(module).__name__ for module in model.modules() if hasattr(module, "spec")}
    assert parts
    assert parts <= set(model._no_split_modules)


NEEDS_ALL_WEIGHTS = {
    "dense": lambda model, path: export_dense(model, path / "out"),
    "int8": lambda model, path: export_int8(model, path / "out"),
    "quantize": lambda model, path: tensorfold.quantize(model),
    "heal": lambda model, path: tensorfold.heal(model, path, steps=1),
}


@pytest.mark.parametrize("doing", NEEDS_ALL_WEIGHTS)
def test_offloaded_models_are_saved_and_refused_where_all_weights_are_needed(doing, tiny, tmp_path):
    model = folded(tiny, "low-rank", "graded", True, False)
    want = logits(model)
    placed = place("device_map", model, tmp_path)
    with pytest.raises(InputError, match="meta device"):
        NEEDS_ALL_WEIGHTS[doing](placed, tmp_path)
    torch.testing.assert_close(logits(placed), want, rtol=0, atol=0)
    placed.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(tensorfold.load(tmp_path / "again")), want, rtol=0, atol=0)
