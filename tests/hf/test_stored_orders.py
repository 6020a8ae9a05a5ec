"""Orders of rows and columns: the smallest integers that fit in files, int64 in memory, once for a tied head."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import tensorfold
from tensorfold.algebra.orders.stored_orders import order_bytes, order_dtype
from tensorfold.algebra.specs.graded import GradedSpec
from tensorfold.algebra.specs.spec import Spec
from tensorfold.hf.loading import save
from tensorfold.nn import GradedEmbedding, MPOEmbedding, MPOLinear
from tensorfold.nn.base import ORDERS
from tensorfold.report.facts import read_directory
from tensorfold.report.tables import bond_rows, size_rows

IDS = torch.arange(3, 11)[None]
GRADED = {"targets": "embedding", "method": "graded", "keep": 0.6}
CLUSTERED = {"targets": "embedding", "method": "mpo", "sites": 2, "bond": 6, "order": "cluster"}
PIVOTED = {"targets": "mlp", "method": "low-rank", "keep": 0.5, "pivots": True}
PERMUTED = {"targets": "mlp", "method": "kronecker", "factor": [16, 8], "permute": "all"}


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(1, torch.uint8), (255, torch.uint8), (256, torch.int16), (32767, torch.int16), (32768, torch.int32),
     (2**31 - 1, torch.int32), (2**31, torch.int64)],
)  # fmt: skip
def test_the_smallest_type_that_fits(largest, dtype):
    assert order_dtype(largest) is dtype
    assert order_bytes(10, largest) == 10 * dtype.itemsize


SPECS = {
    "pivoted": (MPOLinear, Spec.low_rank(300, 20, 7, pivoted=True)),
    "pivoted in the basis": (MPOLinear, Spec((16, 1), (2, 8), (5,), reordered=("in",), pivoted=True)),
    "both sides": (MPOLinear, Spec.kronecker(24, 300, (6, 4), 2, reordered=("out", "in"))),
    "partial": (MPOLinear, Spec.low_rank(300, 280, 7, pivoted=True, rows=290, columns=260)),
    "table": (MPOEmbedding, Spec.kronecker(400, 16, (100, 4), 2, reordered=("out",))),
    "graded": (GradedEmbedding, GradedSpec(400, 16, ((100, 16), (300, 4)))),
}


@pytest.mark.parametrize(("module", "spec"), SPECS.values(), ids=SPECS)
def test_what_a_spec_counts_is_what_a_state_dictionary_holds(module, spec):
    layer = module(spec)
    orders = [value for key, value in layer.state_dict().items() if key in ORDERS]
    assert orders
    assert sum(order.nbytes for order in orders) == spec.order_bytes
    assert all(buffer.dtype is torch.int64 for buffer in layer.buffers())
    for assign, wide in itertools.product((False, True), repeat=2):
        state = {k: v.long() if wide and k in ORDERS else v for k, v in layer.state_dict().items()}
        other = module(spec)
        other.load_state_dict(state, assign=assign)
        assert all(buffer.dtype is torch.int64 for buffer in other.buffers())
        assert torch.equal(other.to_dense(), layer.to_dense())


def folded(tied, rules, int8=False):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    plan = tensorfold.fold(model, {"fold": rules}).plan
    if int8:
        tensorfold.quantize(model)
    return model, plan


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("table", [GRADED, CLUSTERED], ids=["graded", "clustered"])
def test_a_tied_table_stores_its_order_once(table, tied, int8, tmp_path):
    model, _ = folded(tied, [table, PIVOTED], int8)
    model.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    orders = {key: value.dtype for key, value in stored.items() if key.rpartition(".")[2] in ORDERS}
    tables = [key for key in orders if "mlp" not in key]
    assert len(tables) == 1
    assert tables[0].startswith("model.embed_tokens.")
    assert all(dtype is (torch.int16 if key in tables else torch.uint8) for key, dtype in orders.items())
    again = tensorfold.load(tmp_path / "model")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    twice = load_file(tmp_path / "again" / "model.safetensors")
    assert twice.keys() == stored.keys()
    assert all(torch.equal(twice[key], value) for key, value in stored.items())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_streamed_and_ordinary_folds_store_alike(tied, tmp_path):
    torch.manual_seed(0)
    model, _ = folded(tied, [PIVOTED])
    dense = model.dequantize()
    dense.save_pretrained(tmp_path / "dense")
    rules = {"fold": [GRADED, PIVOTED]}
    tensorfold.fold_directory(str(tmp_path / "dense"), rules, tmp_path / "streamed")
    ordinary = tensorfold.load(tmp_path / "dense")
    tensorfold.fold(ordinary, rules)
    ordinary.save_pretrained(tmp_path / "ordinary")
    files = [(tmp_path / kind / "model.safetensors").read_bytes() for kind in ("streamed", "ordinary")]
    assert files[0] == files[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rules", [[GRADED, PIVOTED], [CLUSTERED, PERMUTED]], ids=["pivoted", "permuted"])
def test_reports_give_the_bytes_that_files_hold(rules, tied, dtype, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()

    def held(model, name):
        model.save_pretrained(tmp_path / name)
        return sum(tensor.nbytes for tensor in load_file(tmp_path / name / "model.safetensors").values())

    before = held(model, "dense")
    plan = tensorfold.plan(model, {"fold": rules})
    report = tensorfold.fold(model, {"fold": rules})
    after = held(model, "folded")
    for told in (plan, report):
        assert (told.bytes_before, told.bytes_after) == (before, after)
        found = told.to_dict()
        assert (found["bytes_before"], found["bytes_after"]) == (before, after)
        assert f"{before / 1e6:,.1f} → {after / 1e6:,.1f} MB stored" in str(told)
        left = after - sum(module["bytes"] for module in found["modules"].values())
        own = {name: p for name, p in model.named_parameters() if ".cores." not in name}
        assert left == sum(parameter.nbytes for parameter in own.values())


def test_a_search_gives_the_bytes_of_what_it_chose(tokenizer, prose, tiny, tmp_path):
    model = tiny("llama")
    rule = {"targets": "all-linear", "method": "auto", "keep": 0.7}
    report = tensorfold.fold(model, {"fold": [rule]}, tokenizer, [prose], calibration_tokens=64)
    model.save_pretrained(tmp_path / "folded")
    held = load_file(tmp_path / "folded" / "model.safetensors").values()
    assert report.bytes_after == sum(tensor.nbytes for tensor in held)


def test_the_page_gives_bytes_beside_parameters(tiny, tokenizer, tmp_path):
    model = tiny("llama")
    report = tensorfold.fold(model, {"fold": [GRADED, PIVOTED]})
    save(model, tokenizer, tmp_path / "with", {"base_model": "dense", **report.to_dict()})
    model.save_pretrained(tmp_path / "without")  # no card: what it was is told by its configuration
    known, unknown = (read_directory(tmp_path / name, name) for name in ("with", "without"))
    assert known.bytes_before == unknown.bytes_before == report.bytes_before
    [row, _] = size_rows([known, unknown])
    assert row["stored before"] == f"{report.bytes_before / 1e6:,.1f} MB"
    modules = report.to_dict()["modules"]
    table, *rest = bond_rows(known)
    assert table["bytes each"] == f"{modules['model.embed_tokens']['bytes']:,}"
    assert {row["bytes each"] for row in rest} == {f"{each['bytes']:,}" for each in list(modules.values())[1:]}
    assert {row["bytes each"] for row in bond_rows(unknown)} == {"unknown"}
