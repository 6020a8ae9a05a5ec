"""push: what is uploaded, and the card that goes with it. The hub itself is replaced at its client's two calls."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml

import tensorfold
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.export.hub import hub_card, push_to_hub
from tensorfold.hf.model_card import model_card
from tensorfold.utils.records import EVALUATIONS, record_evaluation

EVALUATED = {
    "perplexity": 52.59, "accuracy": 0.338, "tokens": 8191, "protocol": "hf-1024", "text": "wikitext-2-test",
    "parameters": 118_565_568, "seconds": 9.0,
}  # fmt: skip
HARNESS = {
    "perplexity": None, "tokens": 12, "protocol": "lm-eval", "text": "arc_easy", "parameters": 118_565_568,
    "results": {"arc_easy": {"acc": 0.5}}, "versions": {"lm_eval": "0.4.13"},
}  # fmt: skip


@pytest.fixture
def directory(folded_directory, tmp_path):
    path = tmp_path / "folded"
    shutil.copytree(folded_directory, path)
    return path


@pytest.fixture
def hub(monkeypatch):
    """What reached the hub: repositories made, and the files of each commit."""
    reached = SimpleNamespace(repos=[], files={}, private=True)

    def create_repo(self, repo, *, private, exist_ok):
        reached.repos.append((repo, private, exist_ok))

    def create_commit(self, repo, operations, *, commit_message):
        for operation in operations:
            with operation.as_file() as file:
                reached.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_: SimpleNamespace(private=reached.private))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    return reached


def test_what_is_uploaded_loads_again(command, hub, directory, tmp_path):
    record_evaluation(directory, EVALUATED)
    (directory / ".hidden").write_text("stays")
    (directory / "README.md").write_text("edited")
    outcome = command("push", directory, "somebody/folded", "--private", "--json")
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["url"] == "https://hub/somebody/folded/commit/1"
    assert hub.repos == [("somebody/folded", True, True)]
    assert set(hub.files) == set(result["files"]) == {f.name for f in directory.iterdir()} - {".hidden"}
    assert {"README.md", "model.safetensors", "config.json", "tensorfold.json", EVALUATIONS} <= set(hub.files)
    assert result["bytes"] == sum(map(len, hub.files.values()))
    readme = hub.files["README.md"].decode()
    assert 'import tensorfold\n\nmodel = tensorfold.load("somebody/folded")' in readme
    assert (directory / "README.md").read_text() == "edited"
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in hub.files.items():
        (copy / name).write_bytes(content)
    before = tensorfold.load(directory).state_dict()
    assert all(before[name].equal(tensor) for name, tensor in tensorfold.load(copy).state_dict().items())


def test_nothing_private_goes_to_a_repository_that_is_public_already(refused, hub, directory):
    hub.private = False
    refused("push", directory, "somebody/folded", "--private", says=["somebody/folded", "is public", "--private"])
    assert not hub.files


def test_the_card_has_metadata_sizes_and_numbers(directory):
    for evaluated in ({**EVALUATED, "perplexity": 99.0}, EVALUATED, HARNESS):
        record_evaluation(directory, evaluated)
    card = json.loads((directory / "tensorfold.json").read_text())
    (directory / "tensorfold.json").write_text(json.dumps({**card, "base_model": "org/base", "recipe": "low-rank-80"}))
    text = hub_card(directory, "somebody/folded")
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["base_model"] == "org/base"
    assert metadata["library_name"] == "tensorfold"
    assert body.startswith("\n```python\nimport tensorfold\n")
    for line in (
        "- base model: org/base",
        "- recipe: low-rank-80",
        f"- parameters: {card['parameters_before']:,} → {card['parameters_after']:,}",
        "- weight files: ",
        f"- folded: {len(card['modules'])} matrices",
        "| hf-1024 | wikitext-2-test | 8191 | 52.59 | 0.338 | 118,565,568 |",
        "| lm-eval 0.4.13 | arc_easy | acc | 0.5 |",
    ):
        assert line in body
    assert "99" not in body.partition("## What was measured")[2]


def test_a_local_base_model_is_not_linked(directory):
    assert "base_model: " not in hub_card(directory, "a/b")


def test_a_card_takes_whatever_is_in_the_files():
    odd = [{}, {"perplexity": "much"}, {"perplexity": 2.0, "text": "a|b\nc"}, {"results": {"t": None}, "versions": 3}]
    text = model_card({"modules": [], "heal": "no"}, odd)
    assert "| None | a/b c | None | 2 |  |  |" in text


def test_a_dry_run_reaches_nothing(command, hub, directory):
    outcome = command("push", directory, "somebody/folded", "--dry-run")
    assert outcome.status == 0
    assert "import tensorfold" in outcome.out
    assert "not uploaded to somebody/folded" in outcome.out
    assert hub.repos == []
    assert hub.files == {}


def test_nothing_incomplete_is_published(hub, edited):
    path = edited("folded", tensors=lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(InputError, match=r"lacks the tensors model\.norm\.weight"):
        push_to_hub(path, "somebody/folded")
    assert hub.repos == []


@pytest.mark.parametrize("repo", ["folded", "a/b/c", "some body/x", ""])
def test_repositories_are_named_owner_and_name(refused, hub, directory, repo):
    refused("push", directory, repo, says=["needed owner/name"])


def test_a_directory_is_needed(refused, tmp_path):
    refused("push", tmp_path / "absent", "a/b", says=["no directory"])


def test_an_unreachable_hub_is_named(directory):
    with pytest.raises(TensorfoldError, match="hf auth login"):  # the session is offline
        push_to_hub(directory, "somebody/folded")
