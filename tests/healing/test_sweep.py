"""Learning rates that a short run each chooses from."""

import json

import pytest
import torch

import tensorfold
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.healing.heal import heal

FAST = {"steps": 6, "batch": 4, "block": 16, "validation_fraction": 0.1, "select": "last"}


def _healed(folded_directory, tokenizer, text_file, **more):
    model = tensorfold.load(folded_directory)
    heal(model, text_file, tokenizer=tokenizer, **{**FAST, **more})
    return model.state_dict()


def test_the_best_rate_is_taken_and_trains_as_if_it_had_been_given(folded_directory, tokenizer, text_file, tmp_path):
    given = _healed(folded_directory, tokenizer, text_file, lr=1e-3)
    swept = _healed(folded_directory, tokenizer, text_file, lr_sweep=(1e-8, 1e-3, 1e9), out=tmp_path / "out")
    assert given.keys() == swept.keys()
    assert all(torch.equal(swept[name], tensor) for name, tensor in given.items())
    lines = [json.loads(line) for line in (tmp_path / "out" / "heal.jsonl").read_text().splitlines()]
    [sweep] = [line for line in lines if line.get("stage") == "sweep"]
    assert sweep["lr"] == 1e-3
    assert sweep["losses"]["0.001"] < sweep["losses"]["1e-08"]
    assert sweep["losses"]["0.001"] < sweep["losses"]["1e+09"]
    assert not [line for line in lines if "sweep" not in line.get("stage", "") and line["step"] > 6]


def test_a_sweep_that_was_killed_goes_on_where_it_was(folded_directory, tokenizer, text_file, tmp_path, monkeypatch):
    from tensorfold.healing import sweep

    whole, tried = sweep._loss_after, []

    def until_the_second(run, rate, work):
        tried.append(rate)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return whole(run, rate, work)

    monkeypatch.setattr(sweep, "_loss_after", until_the_second)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        _healed(folded_directory, tokenizer, text_file, lr_sweep=(1e-3, 1e-4), out=out)
    swept = _healed(folded_directory, tokenizer, text_file, lr_sweep=(1e-3, 1e-4), out=out)
    assert tried == [1e-3, 1e-4, 1e-4]
    given = _healed(folded_directory, tokenizer, text_file, lr=1e-3)
    assert all(torch.equal(swept[name], tensor) for name, tensor in given.items())


def test_what_cannot_be_swept_is_refused(folded_directory, tokenizer, text_file):
    with pytest.raises(InputError, match="validation_fraction above 0"):
        _healed(folded_directory, tokenizer, text_file, lr_sweep=(1e-3,), validation_fraction=0.0)
    with pytest.raises(InputError, match="no lr_sweep"):
        _healed(folded_directory, tokenizer, text_file, lr_sweep=(1e-3, 1e-4), lr=1e-3)
    with pytest.raises(TensorfoldError, match="not finite with any"):
        _healed(folded_directory, tokenizer, text_file, lr_sweep=(1e12,))
