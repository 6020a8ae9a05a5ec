"""Files beside a model's weights go with it, whichever command writes the next directory."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tensorfold
from tensorfold.hf.beside import carry_over

CARRIED = {
    "preprocessor_config.json": '{"size": 28}',
    "processor_config.json": '{"processor_class": "Own"}',
    "video_preprocessor_config.json": "{}",
    "tokenizer.model": "pieces",
    "LICENSE": "a licence",
    "NOTICE.txt": "a notice",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}
LEFT = {"pytorch_model.bin": "a pickle", "optimizer.pt": "a state", "README.md": "of the dense model", "notes.txt": ""}
CODE = """from transformers import LlamaConfig, LlamaForCausalLM
from .parts import NOTHING
class OwnConfig(LlamaConfig):
    model_type = "llama"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def dense(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    for name, text in {**CARRIED, **LEFT}.items():
        (tmp_path / "dense" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "dense" / name).write_text(text)
    return tmp_path / "dense"


def check(directory):
    assert {name: (directory / name).read_text() for name in CARRIED} == CARRIED
    assert (directory / "tokenizer.json").is_file()
    assert not {*LEFT} & {path.name for path in directory.iterdir()} - {"README.md"}
    assert "of the dense model" not in (directory / "README.md").read_text()


def test_every_command_that_writes_a_model_carries_them_on(command, dense, text_file, tmp_path):
    folded, calibrated = tmp_path / "folded", tmp_path / "calibrated"
    command("fold", dense, "--keep", "0.5", "--calibrate", "none", "--out", folded)  # from disk to disk
    assert (
        command("fold", dense, "--keep", "0.5", "--calibrate", text_file, "--tokens", "128", "--out", calibrated).status
        == 0
    )
    assert (
        command(
            "heal", folded, "--train", text_file, "--steps", "1", "--block", "16", "--out", tmp_path / "healed"
        ).status
        == 0
    )
    assert command("export", folded, "--to", "dense", "--out", tmp_path / "plain").status == 0
    assert command("export", folded, "--to", "int8", "--out", tmp_path / "int8").status == 0
    for directory in (folded, calibrated, tmp_path / "healed", tmp_path / "plain", tmp_path / "int8"):
        check(directory)


def own_code(dense):
    config = json.loads((dense / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (dense / "config.json").write_text(json.dumps(config))
    (dense / "own.py").write_text(CODE)
    (dense / "parts.py").write_text("NOTHING = None\n")


def test_custom_code_comes_along(command, dense, tmp_path):
    own_code(dense)
    assert command("fold", dense, "--keep", "0.5", "--out", tmp_path / "folded").status == 0
    assert command("export", tmp_path / "folded", "--to", "dense", "--out", tmp_path / "plain").status == 0
    for directory in (tmp_path / "folded", tmp_path / "plain"):
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        assert type(model).__name__ == "Own"


def test_a_map_without_its_code_goes(command, dense, tmp_path):
    own_code(dense)
    (dense / "own.py").unlink()
    assert command("fold", dense, "--keep", "0.5", "--out", tmp_path / "folded").status == 0
    assert "auto_map" not in json.loads((tmp_path / "folded" / "config.json").read_text())
    for trust in (False, True):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", trust_remote_code=trust)
        assert type(again) is LlamaForCausalLM


def test_code_of_another_repository_stays_there(dense, tmp_path):
    config = json.loads((dense / "config.json").read_text())
    elsewhere = {"AutoConfig": "someone/model--own.OwnConfig"}
    (dense / "config.json").write_text(json.dumps({**config, "auto_map": elsewhere}))
    model = tensorfold.load(dense)
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    (tmp_path / "again" / "config.json").write_text(json.dumps({**saved, "auto_map": elsewhere}))
    carry_over(model.config, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == elsewhere
    check_carried = {name for name in CARRIED if (tmp_path / "again" / name).is_file()}
    assert check_carried == {*CARRIED}


def test_a_model_from_nowhere_has_nothing_beside_it(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2))  # fmt: skip
    model.save_pretrained(tmp_path / "made")
    before = {path.name for path in (tmp_path / "made").iterdir()}
    carry_over(model.config, tmp_path / "made")
    assert {path.name for path in (tmp_path / "made").iterdir()} == before
