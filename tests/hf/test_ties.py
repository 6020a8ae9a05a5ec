"""The weights decide whether the head is tied to the table; the configuration follows, and that is said."""

import tempfile

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tensorfold
from tensorfold import InputError
from tensorfold.export.checkpoints import export_dense, export_int8

IDS = torch.arange(3, 11)[None]
MLP = {"targets": "mlp", "method": "low-rank", "rank": 32}  # full rank: nothing is lost
TABLE = {"targets": "embedding", "method": "low-rank", "rank": 32}
RULES = {"mlp": [MLP], "table": [TABLE], "both": [MLP, TABLE]}


def llama(tied):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=tied)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(tied):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=4, tie_word_embeddings=tied,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def own_head(make):
    """Promised to be tied, with a head of its own."""
    model = make(True)
    model.lm_head.weight = nn.Parameter(torch.randn(300, 32))
    return model


def tied_by_hand(make):
    model = make(False)
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


def equal_values(make):
    """Promised to be tied, and two tensors of the same values, as a careless copy leaves them."""
    model = make(True)
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    return model


def read_with_own_head(make):
    """As transformers reads a directory whose configuration promises a tie that its weights do not keep."""
    model = own_head(make)
    with tempfile.TemporaryDirectory() as directory:
        model.config.tie_word_embeddings, model.all_tied_weights_keys = False, {}
        model.save_pretrained(directory)
        model.config.tie_word_embeddings = True
        model.config.save_pretrained(directory)
        return type(model).from_pretrained(directory)


def said_otherwise_since(make):
    """Tied when it was made, and a configuration that was changed afterwards."""
    model = make(True)
    model.config.tie_word_embeddings = False
    return model


MODELS = {
    f"{state.__name__}-{make.__name__}": (state, make)
    for state in (own_head, tied_by_hand, equal_values, read_with_own_head, said_otherwise_since)
    for make in (llama, gpt2)
}


@pytest.fixture(params=MODELS, ids=str)
def state(request):
    state, make = MODELS[request.param]
    return lambda: state(make)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_no_head_is_lost_in_a_fold(state, rules, tmp_path):
    model = state()
    before, shared = logits(model), model.lm_head.weight.equal(model.get_input_embeddings().weight)
    said = [w for w in tensorfold.plan(model, {"fold": rules}).warnings if "configuration" in w]
    assert torch.equal(logits(model), before)  # a plan changes nothing
    plan = tensorfold.fold(model, {"fold": rules}).plan
    assert [w for w in plan.warnings if "configuration" in w] == said
    assert bool(said) is (state().config.tie_word_embeddings is not shared)
    model.save_pretrained(tmp_path / "folded")
    for folded in (model, tensorfold.load(tmp_path / "folded")):
        torch.testing.assert_close(logits(folded), before, rtol=1e-4, atol=1e-5)
        assert folded.config.tie_word_embeddings is shared
    numbers = sum(parameter.numel() for parameter in tensorfold.load(tmp_path / "folded").parameters())
    assert numbers == plan.parameters_after


@pytest.mark.parametrize("write", [export_dense, export_int8])
def test_no_head_is_lost_in_an_export(state, write, tmp_path):
    model = state()
    before = logits(model)
    write(model, tmp_path / "out")
    written = tensorfold.load(tmp_path / "out")
    error = (logits(written) - before).norm() / before.norm()
    assert error < (1e-5 if write is export_dense else 0.02)


def test_untying_is_asked_of_the_weights(state, tmp_path):
    model = state()
    before = logits(model)
    tensorfold.fold(model, {"fold": [TABLE], "untie": True})
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "folded")
    torch.testing.assert_close(logits(tensorfold.load(tmp_path / "folded")), before, rtol=1e-4, atol=1e-5)


def test_a_tie_that_cannot_be_said_is_refused_and_nothing_changed():
    class Untied(LlamaForCausalLM):
        _tied_weights_keys = None

    torch.manual_seed(0)
    model = Untied(llama(False).config)
    model.lm_head.weight = model.model.embed_tokens.weight
    before = logits(model)
    with pytest.raises(InputError, match=r"lm_head shares.*--untie"):
        tensorfold.fold(model, {"fold": [MLP]})
    assert torch.equal(logits(model), before)
    assert model.config.tie_word_embeddings is False


def test_a_tie_that_cannot_be_said_leaves_all_layers_where_they_are():
    class Untied(LlamaForCausalLM):
        _tied_weights_keys = None

    model = Untied(LlamaConfig(**{**llama(False).config.to_dict(), "num_hidden_layers": 2}))
    model.lm_head.weight = model.model.embed_tokens.weight
    for act in (tensorfold.plan, tensorfold.fold):
        with pytest.raises(InputError, match=r"lm_head shares.*--untie"):
            act(model, {"fold": [MLP], "layers": [0]})
    assert len(model.model.layers) == model.config.num_hidden_layers == 2


def test_int8_that_is_refused_leaves_the_configuration_as_it_was():
    model = own_head(llama)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"up_proj holds NaN"):
        tensorfold.quantize(model)
    assert model.config.tie_word_embeddings is True
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def pruned(model):
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(model.model.layers[0].mlp, name)
        layer.weight = nn.Parameter(layer.weight[:, :48] if name == "down_proj" else layer.weight[:48])


def cut(model):
    model.model.layers = nn.ModuleList()


def grown(model):
    model.model.layers.append(llama(False).model.layers[0])


def renamed(model):
    model.model.extra = nn.Linear(4, 4)


@pytest.mark.parametrize("change", [pruned, cut, grown, renamed])
@pytest.mark.parametrize(
    "act", [lambda m: tensorfold.fold(m, {"fold": [TABLE]}), tensorfold.quantize], ids=["fold", "int8"]
)
def test_a_model_that_its_configuration_does_not_describe_is_refused_unchanged(change, act):
    model = llama(False)
    change(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=r"by the model's configuration"):
        act(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
