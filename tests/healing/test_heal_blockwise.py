"""Block-by-block healing brings the states behind every block closer to the dense model's; a kill costs one block."""

import copy
import gc
import logging
import math

import pytest
import torch

import tensorfold
from tensorfold import InputError, Kronecker, LowRank, Recipe, Rule, TensorfoldError
from tensorfold.calibration.block_loss import relative_loss
from tensorfold.calibration.block_stream import BlockStream
from tensorfold.healing import blockwise
from tensorfold.healing.blockwise import heal_blocks
from tensorfold.models.anatomy import blocks
from tensorfold.models.modes import evaluation_mode
from tensorfold.nn import FoldedModule
from tensorfold.recipes.settings import HealSettings
from tensorfold.utils import activation_store as activations
from tensorfold.utils.activation_store import ActivationStore

BLOCKS = 3
ARCHITECTURES = ["gpt2", "llama", "opt", "gpt_neox", "gemma3", "phi"]


def settings(**changes):
    return HealSettings(**{"blockwise_epochs": 3, "blockwise_batch": 2, "blockwise_lr": 3e-3, **changes})


@pytest.fixture(scope="module")
def windows(tokenizer, prose):
    return torch.tensor(tokenizer(prose)["input_ids"][:1536]).reshape(48, 32)


@pytest.fixture(scope="module")
def dense(tiny):
    """A Llama whose blocks matter: freshly made weights are so small that every block is nearly the identity."""
    model = tiny("llama", num_hidden_layers=BLOCKS)
    with torch.no_grad():
        for parameter in blocks(model)[1].parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def folded(dense):
    model = copy.deepcopy(dense)
    recipe = Recipe((Rule(["gate_proj", "up_proj"], LowRank(keep=0.5)), Rule(["down_proj"], Kronecker(keep=0.6))))
    tensorfold.fold(model, recipe)
    return model


@pytest.fixture(scope="module")
def healed(folded, dense, windows):
    """The model and the report of an uninterrupted run. Read only."""
    model = copy.deepcopy(folded)
    return model, heal_blocks(model, dense, windows, settings())


def test_the_rate_rises_for_ten_steps_and_falls_to_nothing(folded, dense, windows):
    rates = []
    healing = settings(blockwise_batch=8, blockwise_epochs=4)
    heal_blocks(
        copy.deepcopy(folded), dense, windows, healing, on_step=lambda step: rates.append((step["block"], step["lr"]))
    )
    first = [rate / 3e-3 for block, rate in rates if block == 0]
    steps = len(first)
    assert steps == 24
    assert first[0] == pytest.approx(0.1), "not 1"
    expected = [min(1, (k + 1) / 10) * (1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps)]
    assert first == pytest.approx(expected)


def errors_by_depth(student, teacher, windows):
    """Relative error after each block, from hooks in whole forward passes."""
    seen = {}
    for model in (student, teacher):
        hooks = [
            block.register_forward_hook(
                lambda _m, _a, out, m=model: seen.setdefault(m, []).append(out[0] if isinstance(out, tuple) else out)
            )
            for block in blocks(model)[1]
        ]
        with torch.no_grad():
            model(windows, use_cache=False)
        for hook in hooks:
            hook.remove()
    pairs = zip(seen[student], seen[teacher], strict=True)
    return [((y - t).norm(dim=-1) ** 2 / t.norm(dim=-1) ** 2).mean().item() for y, t in pairs]


def same(one, other):
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_error_falls_at_every_depth(folded, dense, healed, windows):
    model, report = healed
    held_out = windows[-3:]
    before, after = errors_by_depth(folded, dense, held_out), errors_by_depth(model, dense, held_out)
    assert all(b < 0.8 * a for a, b in zip(before, after, strict=True)), (before, after)
    assert (report.tokens, report.held_out_tokens) == (45 * 32, 3 * 32)
    assert [block.after for block in report.blocks] == pytest.approx(after, rel=1e-4)
    # Each block is measured on the hidden states that the healed blocks before it pass on.
    assert report.blocks[0].before == pytest.approx(before[0], rel=1e-4)
    assert report.blocks[-1].before < before[-1]


def test_only_cores_move(folded, healed):
    start = dict(folded.named_parameters())
    cores = {
        f"{name}.{key}"
        for name, module in folded.named_modules()
        if isinstance(module, FoldedModule)
        for key, _ in module.named_parameters()
    }
    moved = {name for name, value in healed[0].named_parameters() if not torch.equal(value, start[name])}
    assert moved == cores
    assert healed[1].parameters == sum(start[name].numel() for name in cores)
    assert all(p.requires_grad for p in healed[0].parameters())
    assert all(p.grad is None for p in healed[0].parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(tiny, architecture, windows):
    """Several windows go through a block as one batch, whatever else the architecture hands its blocks."""
    teacher = tiny(architecture)
    with evaluation_mode(teacher), torch.no_grad():
        stream = BlockStream(teacher, windows[:4])
        for index in range(len(stream.blocks)):
            batch = stream.run(index, slice(None))
            stream.advance(index)
            torch.testing.assert_close(batch, stream.hidden, rtol=1e-4, atol=1e-5)
    student = copy.deepcopy(teacher).train()
    tensorfold.fold(student, LowRank(keep=0.3))
    biases = {key: value.clone() for key, value in student.named_parameters() if key.endswith("bias")}
    report = heal_blocks(student, teacher, windows[:17], settings(blockwise_epochs=2, blockwise_lr=1e-3))
    assert all(block.healed and block.after < block.before for block in report.blocks)
    assert student.training
    assert all(torch.equal(value, dict(student.named_parameters())[key]) for key, value in biases.items())


def test_scalars_stay_where_they_are_frozen(dense, windows):
    for freeze in (False, True):
        model = copy.deepcopy(dense)
        tensorfold.fold(model, Recipe((Rule(["up_proj"], Kronecker(factor=(24, 16), terms=2, scalars=True)),)))
        before = model.model.layers[0].mlp.up_proj.scalars.detach().clone()
        heal_blocks(model, dense, windows[:8], settings(freeze_scalars=freeze))
        assert torch.equal(model.model.layers[0].mlp.up_proj.scalars, before) == freeze


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [(0, 1), (1, 1), (1, 30), (2, 69)])
def test_killed_and_started_again(folded, dense, healed, windows, tmp_path, at):
    """The weights are those of the uninterrupted run, and finished blocks are not trained again."""

    def kill(step):
        if (step["block"], step["step"]) == at:
            raise Killed

    model = copy.deepcopy(folded)
    with pytest.raises(Killed):
        heal_blocks(model, dense, windows, settings(), checkpoint=tmp_path / "blocks", on_step=kill)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    seen = []
    model = copy.deepcopy(folded)
    report = heal_blocks(model, dense, windows, settings(), checkpoint=tmp_path / "blocks", on_step=seen.append)
    assert same(model, healed[0])
    assert {step["block"] for step in seen} == set(range(at[0], BLOCKS))
    assert [block.resumed for block in report.blocks] == [index < at[0] for index in range(BLOCKS)]
    assert [(b.before, b.after) for b in report.blocks] == [(b.before, b.after) for b in healed[1].blocks]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "sidecar"])
def test_damaged_checkpoint_is_computed_again(folded, dense, healed, windows, tmp_path, caplog, damage):
    heal_blocks(copy.deepcopy(folded), dense, windows, settings(), checkpoint=tmp_path)
    cores = tmp_path / "block-0001" / "cores.safetensors"
    content = bytearray(cores.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
        cores.write_bytes(content)
    elif damage == "truncate":
        cores.write_bytes(content[:-100])
    elif damage == "remove":
        cores.unlink()
    else:
        (tmp_path / "block-0001" / "block.json").write_text('{"run": 1')
    model = copy.deepcopy(folded)
    with caplog.at_level(logging.WARNING):
        report = heal_blocks(model, dense, windows, settings(), checkpoint=tmp_path)
    assert "block-0001" in caplog.text
    assert "computed again" in caplog.text
    # Computing the block again gives the same bytes, so later blocks are still valid.
    assert [block.resumed for block in report.blocks] == [True, False, True]
    assert same(model, healed[0])


@pytest.mark.parametrize("change", ["text", "settings", "student", "teacher"])
def test_checkpoint_of_another_run_is_refused(folded, dense, windows, tmp_path, change):
    heal_blocks(copy.deepcopy(folded), dense, windows[:4], settings(blockwise_epochs=1), checkpoint=tmp_path)
    student, teacher, other, options = copy.deepcopy(folded), copy.deepcopy(dense), windows[:4], settings()
    options = settings(blockwise_epochs=1)
    if change == "text":
        other = windows[4:8]
    elif change == "settings":
        options = settings(blockwise_epochs=1, seed=1)
    else:
        with torch.no_grad():
            next((student if change == "student" else teacher).parameters())[0, 0] += 1
    with pytest.raises(InputError, match="another healing run"):
        heal_blocks(student, teacher, other, options, checkpoint=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block-0000", "block-0001", "block-0002"]


def test_spilled_activations_give_the_same_weights(folded, dense, healed, windows, tmp_path, monkeypatch):
    made = []
    mapped = ActivationStore._mapped

    def spy(self, shape, dtype, size):
        tensor = mapped(self, shape, dtype, size)
        made.append((shape, list(activations.cache_directory("activations").iterdir())))
        return tensor

    monkeypatch.setattr(ActivationStore, "_mapped", spy)
    monkeypatch.setenv("TENSORFOLD_CACHE", str(tmp_path))
    model = copy.deepcopy(folded)
    heal_blocks(model, dense, windows, settings(activations_mb=0))
    # Mapped files have no name any more, so nothing is left behind however the process ends.
    assert made == [((48, 32, 32), [])] * 2
    assert same(model, healed[0])


def test_store_spills_over_its_limit(tmp_path, monkeypatch):
    store = ActivationStore(1, tmp_path)
    inside = store((200, 1000), torch.float32)
    outside = store((60, 1000), torch.float32)
    half = store((100, 1000), torch.bfloat16)
    assert [tensor.is_shared() for tensor in (inside, outside, half)] == [False, True, False]
    outside.copy_(torch.arange(60_000).reshape(60, 1000))
    assert outside[59, 999] == 59_999

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activations, "_reserve", full)
    with pytest.raises(TensorfoldError, match=r"disk is full.*TENSORFOLD_CACHE"):
        store((1000, 1000), torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_text(folded, dense, windows):
    """With activations on disk, memory between steps holds one block's moments and starting cores, at any depth."""

    def tensors():
        # isinstance would wake the deprecated attributes of half of torch.
        return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]

    def held(chosen):
        """Bytes in unmapped tensors that the call has made, after some steps on each block."""
        sizes = {}

        def measure(step):
            if step["step"] != 5:
                return
            live = [t for t in tensors() if id(t) not in others and not t.is_shared()]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in live}
            sizes[step["block"]] = sum(storages.values())

        student = copy.deepcopy(folded)
        known = tensors()  # held, so that no new tensor gets the identity of an old one
        others = {id(tensor) for tensor in known}
        options = settings(activations_mb=0, blockwise_epochs=1, blockwise_batch=1)
        heal_blocks(student, dense, chosen, options, on_step=measure)
        return sizes

    few, many = held(windows[:8]), held(windows)
    cores = sum(p.numel() * 4 for m in folded.model.layers[0].modules() if isinstance(m, FoldedModule) for p in m.cores)
    activation = 32 * 32 * 4
    for index in range(BLOCKS):
        # All that may differ is the order of the windows.
        assert abs(many[index] - few[index]) < activation
        assert few[index] <= 3 * cores + 7 * activation  # three of them scratch memory that pivoted layers keep


def test_a_sink_counts_as_one_token():
    target = torch.randn(4, 32, 16)
    output = target + 0.1 * torch.randn(4, 32, 16)
    plain = relative_loss(output, target)
    target[:, 0] *= 1000
    output[:, 0] *= 1000
    torch.testing.assert_close(relative_loss(output, target), plain)


def with_sinks(dense, windows, count=8):
    """A one-block model with ``count`` tokens of giant activations, and windows that each open with one of them."""
    model = copy.deepcopy(dense)
    del model.model.layers[1:]
    layer, sinks = model.model.layers[0], torch.arange(count)
    own = torch.eye(32)[:count]
    with torch.no_grad():
        # Each sink alone has its feature, and one hidden unit that reads the feature and writes giant values.
        model.model.embed_tokens.weight[:, :count] = 0
        model.model.embed_tokens.weight[:count] = own
        layer.self_attn.v_proj.weight[:, :count] = 0
        layer.self_attn.o_proj.weight[:count] = 0
        for reader in (layer.mlp.gate_proj, layer.mlp.up_proj):
            reader.weight[:count] = own
        layer.mlp.down_proj.weight[:, :count] *= 8
    opened = windows.clamp_min(count)
    opened[:, 0] = sinks[torch.arange(len(windows)) % count]
    return model, opened


def test_sinks_do_not_dominate(dense, windows, monkeypatch):
    """With the squared error in place of the relative one, all effort goes to one token in 32."""
    # The model is made by hand, and not saved.
    monkeypatch.setattr(tensorfold.folding.in_memory, "check_described", lambda _: None)
    teacher, opened = with_sinks(dense, windows)
    folded = copy.deepcopy(teacher)
    tensorfold.fold(folded, LowRank(keep=0.5))

    def outputs(model):
        caught = []
        hook = model.model.layers[0].register_forward_hook(lambda _m, _a, out: caught.append(out))
        with torch.no_grad():
            model(opened[-3:], use_cache=False)
        hook.remove()
        return caught[0]

    target = outputs(teacher)
    assert target[:, 0].norm(dim=-1).min() > 50 * target[:, 1:].norm(dim=-1).max()

    def of_the_others(model):
        return relative_loss(outputs(model)[:, 1:], target[:, 1:]).item()

    left = {}
    for name, loss in (("relative", relative_loss), ("squared", lambda y, t, _: (y - t).square().mean())):
        monkeypatch.setattr(blockwise, "relative_loss", loss)
        student = copy.deepcopy(folded)
        heal_blocks(student, teacher, opened, settings(blockwise_epochs=10))
        left[name] = of_the_others(student)
    assert left["relative"] < 0.8 * of_the_others(folded)
    assert left["relative"] < 0.8 * left["squared"]


def test_block_that_training_harms_keeps_its_cores(folded, dense, windows, caplog):
    """Exploding steps change nothing."""
    model = copy.deepcopy(folded)
    with caplog.at_level(logging.WARNING):
        report = heal_blocks(model, dense, windows[:8], settings(blockwise_lr=1e6))
    assert same(model, folded)
    assert not any(block.healed for block in report.blocks)
    assert all(block.after == block.before for block in report.blocks)
    assert "keeps the cores it came with" in caplog.text


def test_tokens_of_no_activation_do_not_dominate():
    target = torch.ones(8, 4)
    target[0] = 0
    assert relative_loss(target + 0.1, target, floor=0.04) < 0.15


def test_what_cannot_work_is_said_first(tiny, folded, dense, windows, tmp_path):
    untouched = copy.deepcopy(folded)
    cases = [
        (dense, dense, windows, "no block has folded matrices"),
        (untouched, tiny("llama"), windows, r"3 blocks of width 32, the teacher 2"),
        (untouched, dense, windows[:1], "at least 2 windows"),
        (copy.deepcopy(folded).to(torch.bfloat16), dense, windows, r"needed torch\.float32"),
    ]
    for student, teacher, text, message in cases:
        with pytest.raises(InputError, match=message):
            heal_blocks(student, teacher, text, settings(), checkpoint=tmp_path / "never")
    assert same(untouched, folded)
    assert not (tmp_path / "never").exists()
