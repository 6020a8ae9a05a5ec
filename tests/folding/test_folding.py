"""Folding: right solutions in the right metric, block after block, in place."""

import copy

import pytest
import torch

import tensorfold
from tensorfold import MPO, InputError, Kronecker, LowRank, Recipe, Rule
from tensorfold.algebra.solvers.solve import relative_error
from tensorfold.calibration.block_stream import BlockStream, input_moments
from tensorfold.calibration.windows import calibration_windows
from tensorfold.models.anatomy import dense_weight
from tensorfold.models.modes import evaluation_mode
from tensorfold.nn import MPOLinear

ARCHITECTURES = ["gpt2", "llama", "opt", "gpt_neox", "gemma3", "phi"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_rank_changes_nothing(tiny, architecture):
    """At full rank the folded model is the dense one, whatever the architecture stores its weights as."""
    model = tiny(architecture)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        before = model(ids).logits
        full = Recipe(fold=(Rule("all-linear", MPO(bond=1, sites=1)), Rule("embedding", LowRank(rank=32))))
        report = tensorfold.fold(model, full)
        after = model(ids).logits
    assert max(report.errors.values()) < 1e-5
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_conv1d_is_turned_once(tiny):
    model = tiny("gpt2")
    dense = dense_weight(model.transformer.h[0].mlp.c_fc).detach().clone()
    assert dense.shape == (128, 32)
    tensorfold.fold(model, Kronecker(factor=(32, 16), terms=4))
    folded = model.transformer.h[0].mlp.c_fc
    assert relative_error(dense, folded.to_dense().detach()) == pytest.approx(
        relative_error(dense, MPOLinear.from_dense(dense, folded.spec).to_dense().detach()), rel=1e-6
    )


def reference_sequential(model, windows, rank):
    """The textbook form of sequential whitened low rank for a Llama: run everything, Cholesky, SVD, block by block."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.model.layers:
            inputs = {}

            def keep(name, inputs=inputs):
                return lambda module, args: inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

            linears = {"gate": layer.mlp.gate_proj, "up": layer.mlp.up_proj, "down": layer.mlp.down_proj}
            hooks = [module.register_forward_pre_hook(keep(name)) for name, module in linears.items()]
            for window in windows:
                model(window[None], use_cache=False)
            for hook in hooks:
                hook.remove()
            for name, module in linears.items():
                x = torch.cat(inputs[name]).double()
                factor = torch.linalg.cholesky(x.T @ x / len(x) + 1e-12 * torch.eye(x.shape[1]))
                u, s, v = torch.linalg.svd(module.weight.double() @ factor)
                low = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(factor)
                module.weight.copy_(low.float())
    return model


def test_calibrated_low_rank_is_the_sequential_whitened_svd(tiny, tokenizer, prose):
    """The folded model equals an independent implementation of SVD-LLM run block after block."""
    model = tiny("llama")
    windows = calibration_windows(tokenizer, [prose], 1000, 128)
    assert windows.shape == (8, 125)
    expected = reference_sequential(model, windows, 6)
    report = tensorfold.fold(model, LowRank(rank=6), tokenizer, [prose], calibration_tokens=1000)
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-3)
    assert set(report.metrics.values()) == {"activation"}
    assert report.calibration_tokens == 1000


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stream_sees_what_the_model_sees(tiny, tokenizer, prose, architecture):
    """Moments from the block stream equal those of hooks in whole forward passes, for every block."""
    model = tiny(architecture)
    windows = calibration_windows(tokenizer, [prose], 256, 64)
    with evaluation_mode(model), torch.no_grad():
        stream = BlockStream(model, windows)
        modules = {
            name: module
            for name, module in model.named_modules()
            if name.startswith(stream.name + ".") and hasattr(module, "weight") and module.weight.dim() == 2
        }
        expected = input_moments(lambda: [model(w[None], use_cache=False) for w in windows], modules)
        for index in range(len(stream.blocks)):
            inside = {n: m for n, m in modules.items() if n.startswith(f"{stream.name}.{index}.")}
            for name, moment in stream.input_moments(index, inside).items():
                torch.testing.assert_close(moment, expected[name], rtol=1e-4, atol=1e-5)
            stream.advance(index)


def test_calibration_lowers_the_error_that_matters(tiny, tokenizer, prose):
    dense = tiny("llama", num_hidden_layers=1)
    ids = calibration_windows(tokenizer, [prose], 500, 100)
    outputs = {}
    for name, text in (("free", None), ("aware", [prose])):
        model = copy.deepcopy(dense)
        recipe = Recipe(fold=(Rule(["down_proj"], LowRank(rank=4)), Rule(["gate_proj"], Kronecker(keep=0.5))))
        tensorfold.fold(model, recipe, tokenizer, text, calibration_tokens=500 if text else None)
        seen = []
        hook = model.model.layers[0].mlp.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(ids)
        hook.remove()
        outputs[name] = seen[0]
    reference = []
    hook = dense.model.layers[0].mlp.register_forward_hook(lambda m, a, out: reference.append(out))
    with torch.no_grad():
        dense(ids)
    hook.remove()
    assert (outputs["aware"] - reference[0]).norm() < 0.95 * (outputs["free"] - reference[0]).norm()


def test_untied_head_is_calibrated_on_final_hidden_states(tiny, tokenizer, prose):
    model = tiny("llama", tied=False)
    weight = model.lm_head.weight.detach().clone()
    hidden = []
    windows = calibration_windows(tokenizer, [prose], 300, 100)
    with torch.no_grad():
        for window in windows:
            hidden.append(model.model(window[None]).last_hidden_state.reshape(-1, 32))
    x = torch.cat(hidden)
    report = tensorfold.fold(
        model, Recipe(fold=(Rule(["lm_head"], LowRank(rank=8)),)), tokenizer, [prose], calibration_tokens=300
    )
    metric = x.T @ x / len(x)
    expected = relative_error(weight, model.lm_head.to_dense().detach(), metric)
    assert report.errors["lm_head"] == pytest.approx(expected, rel=1e-3)


def test_same_input_same_bytes(tiny, tokenizer, prose):
    states = []
    for _ in range(2):
        model = tiny("gpt2")
        tensorfold.fold(model, LowRank(keep=0.5), tokenizer, [prose], calibration_tokens=300)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_every_module_keeps_its_mode_and_new_ones_get_the_models(tiny):
    model = tiny("gpt2").train()
    frozen = model.transformer.h[1].attn.eval()
    tensorfold.fold(model, LowRank(keep=0.5))
    assert not any(module.training for module in frozen.modules())
    assert all(module.training for name, module in model.named_modules() if "h.1.attn" not in name)
    model = tiny("gpt2").eval()
    tensorfold.fold(model, LowRank(keep=0.5))
    assert not any(module.training for module in model.modules())


def test_training_mode_and_bias_are_kept(tiny):
    model = tiny("gpt2").train()
    bias = model.transformer.h[0].mlp.c_fc.bias.detach().clone()
    tensorfold.fold(model, LowRank(keep=0.5))
    assert model.training
    assert torch.equal(model.transformer.h[0].mlp.c_fc.bias, bias)
    llama = tiny("llama")
    tensorfold.fold(llama, LowRank(keep=0.5))
    assert llama.model.layers[0].mlp.gate_proj.bias is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_half(tiny, dtype):
    model = tiny("llama").to(dtype)
    tensorfold.fold(model, LowRank(keep=0.8))
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_scaled_embedding_keeps_its_scale(tiny):
    """Gemma multiplies its embeddings; at full rank the folded table must too."""
    model = tiny("gemma3")
    index = torch.arange(10)
    before = model.model.embed_tokens(index)
    tensorfold.fold(model, Recipe(fold=(Rule("embedding", LowRank(rank=32)),)))
    torch.testing.assert_close(model.model.embed_tokens(index), before, rtol=1e-4, atol=1e-4)


def test_calibration_windows_are_equal_and_hold_the_tokens(tokenizer, prose):
    windows = calibration_windows(tokenizer, [prose], 2400, 1024)
    assert windows.shape == (3, 800)
    whole = tokenizer(prose)["input_ids"][:2400]
    assert windows.flatten().tolist() == whole
    with pytest.raises(InputError, match="needed at least"):
        calibration_windows(tokenizer, ["too short"], 2400, 1024)


@pytest.mark.parametrize("lengths", [(300, 300, 300), (300, 20, 300), (20, 20, 300)])
def test_documents_have_equal_shares_of_the_windows(tokenizer, lengths):
    """What a short document lacks comes from the others, so that the number of tokens is what was asked for."""
    documents = [" ".join([word] * count) for word, count in zip(("cat", "dog", "fox"), lengths, strict=True)]
    lone = [tokenizer(document)["input_ids"] for document in documents]
    windows = calibration_windows(tokenizer, documents, 240, 40)
    assert windows.shape == (6, 40)
    short = sum(len(ids) for ids in lone if len(ids) < 80)
    full = sum(len(ids) >= 80 for ids in lone)
    shares = [len(ids) if len(ids) < 80 else (240 - short) // full for ids in lone]
    assert windows.flatten().tolist() == [
        token for ids, share in zip(lone, shares, strict=True) for token in ids[:share]
    ]


def test_of_many_documents_some_begin_windows(tokenizer, prose):
    documents = prose.splitlines()[:40]
    windows = calibration_windows(tokenizer, documents, 120, 40)
    assert windows.shape == (3, 40)
    for row, start in zip(windows, (0, 13, 26), strict=True):
        assert row.tolist() == tokenizer("\n\n".join(documents[start:]))["input_ids"][:40]
    with pytest.raises(InputError, match="the text has"):
        calibration_windows(tokenizer, ["one", "two"], 240, 40)
    few = calibration_windows(tokenizer, documents[:2], 400, 20)  # less than was asked for, and all there is
    assert (
        few.flatten().tolist()
        == [token for document in documents[:2] for token in tokenizer(document)["input_ids"]][: few.numel()]
    )


@pytest.mark.parametrize("words", [300, 20])
def test_texts_have_equal_shares_of_the_windows_however_many_documents_they_have(tokenizer, words):
    """The second text is of ten documents; the first is of one, whose lack it makes up for."""
    cat = tokenizer(" ".join(["cat"] * words))["input_ids"][:120]
    texts = [[" ".join(["cat"] * words)], [" ".join(["dog"] * 300)] * 10]
    windows = calibration_windows(tokenizer, texts, 240, 40)
    assert windows.shape == (6, 40)
    assert windows.flatten()[: len(cat)].tolist() == cat
    rest = tokenizer.decode(windows.flatten()[len(cat) :])
    assert "dog" in rest
    assert "cat" not in rest
    assert len(calibration_windows(tokenizer, texts, 60, 1024)) == 2  # one window would be of the first alone


def test_what_is_no_text_is_refused(tokenizer):
    for wrong in ([1, 2], [["text"], [1]], [["text"], 1]):
        with pytest.raises(InputError, match="no text; needed a list of documents"):
            calibration_windows(tokenizer, wrong, 240, 40)


def test_calibration_needs_a_tokenizer(tiny, prose):
    with pytest.raises(InputError, match="tokenizer"):
        tensorfold.fold(tiny("llama"), LowRank(keep=0.5), None, [prose])
