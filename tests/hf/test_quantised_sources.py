"""Weights that another library packed are seen from the configuration, before anything is loaded."""

import json
import shutil

import pytest
from transformers import AutoConfig

import tensorfold
from tensorfold.errors import InputError

METHODS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "an unnamed method": {"load_in_8bit": True},
}
COMMANDS = {
    "plan": ("MODEL", "--keep", ".5"),
    "plan --shapes": ("MODEL", "--shapes"),
    "fold": ("MODEL", "--keep", ".5", "--out", "OUT"),
    "fold, calibrated": ("MODEL", "--keep", ".5", "--calibrate", "TEXT", "--out", "OUT"),
    "heal": ("MODEL", "--train", "TEXT", "--out", "OUT"),
    "heal, teacher": ("DENSE", "--train", "TEXT", "--teacher", "MODEL", "--out", "OUT"),
    "eval": ("MODEL", "--text", "TEXT"),
    "bench": ("MODEL",),
    "bench --against": ("DENSE", "--against", "MODEL"),
    "export": ("MODEL", "--to", "dense", "--out", "OUT"),
    "sample": ("MODEL",),
    "push": ("MODEL", "o/n", "--dry-run"),
    "report": ("MODEL", "--out", "OUT"),
}


@pytest.fixture
def quantised(dense_directory, tmp_path):
    def make(settings, key="quantization_config"):
        path = tmp_path / "quantised"
        shutil.copytree(dense_directory, path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, key: settings}))
        return path

    return make


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_named_before_loading(quantised, method, monkeypatch):
    path = quantised(METHODS[method])
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    for call in (
        lambda: tensorfold.load(path),
        lambda: tensorfold.plan(AutoConfig.from_pretrained(path), tensorfold.LowRank(keep=0.5)),
        lambda: tensorfold.fold_directory(path, tensorfold.LowRank(keep=0.5), path / "out"),
    ):
        with pytest.raises(InputError, match=rf"its weights are quantised \({method}\).*give the original model"):
            call()


def test_an_older_key_is_known(quantised):
    with pytest.raises(InputError, match=r"quantised \(sparseml\)"):
        tensorfold.load(quantised({"quant_method": "sparseml"}, key="compression_config"))


@pytest.mark.parametrize("case", COMMANDS)
def test_every_command_refuses_them(refused, quantised, dense_directory, text_file, tmp_path, case):
    places = {"MODEL": quantised(METHODS["gptq"]), "DENSE": dense_directory, "TEXT": text_file, "OUT": tmp_path / "out"}
    name = case.replace(",", "").split()[0]
    arguments = [places.get(each, each) for each in COMMANDS[case]]
    refused(name, *arguments, says=["its weights are quantised (gptq)", "give the original model"])
    assert not (tmp_path / "out").exists()
