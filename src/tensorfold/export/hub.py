"""Putting a model's directory on the Hugging Face hub, with a card that says how to load it and what was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from tensorfold.errors import InputError, TensorfoldError, pass_on_memory, reason
from tensorfold.hf.loading import load
from tensorfold.hf.model_card import is_plain, model_card
from tensorfold.utils.atomic_files import check_path
from tensorfold.utils.records import CARD, EVALUATIONS, read_lines, read_object
from tensorfold.utils.validation import check_types


@dataclass(frozen=True)
class Pushed:
    """What :func:`push_to_hub` uploaded. ``url``: of the commit; None for a dry run. ``bytes``: of all files."""

    repo: str
    files: tuple[str, ...]
    bytes: int
    card: str
    url: str | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        listed = f"{len(self.files)} files, {self.bytes / 1e6:.1f} MB: {', '.join(self.files)}"
        return f"{listed}\n{self.url}" if self.url else f"{self.card}\nnot uploaded to {self.repo}: {listed}"


def hub_card(directory: str | Path, repo: str) -> str:
    """The model card of a directory as ``repo`` would show it: its metadata, then as :func:`~.report.model_card`.

    Base model, recipe and sizes are those of ``tensorfold.json``, numbers what ``tensorfold eval --record`` noted.

    Raises:
        InputError: A file of the directory cannot be read.
    """
    path = Path(directory)
    card = read_object(path / CARD) or {}
    evaluations, _ = read_lines(path / EVALUATIONS)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    plain = is_plain(path)
    metadata = [
        f"library_name: {'transformers' if plain else 'tensorfold'}",
        "pipeline_tag: text-generation",
        "tags: [tensorfold, compression]",
    ]
    base = card.get("base_model")
    # The name of a directory or a file would be a link to nowhere.
    if isinstance(base, str) and "/" in base and _is_repo_id(base):
        metadata.append(f"base_model: {base}")
    return "\n".join(["---", *metadata, "---", "", model_card(card, evaluations, path=repo, size=size, plain=plain)])


def push_to_hub(
    directory: str | Path, repo: str, *, private: bool = False, token: str | None = None, dry_run: bool = False
) -> Pushed:
    """Upload a directory that ``fold``, ``heal`` or ``save_pretrained`` wrote, in one commit.

    The model is loaded first, so that nothing incomplete is ever published. All files of the directory go along, hidden
    ones and folders excepted; its README is replaced by :func:`hub_card`, and stays as it is on disk.

    Args:
        directory: The model.
        repo: ``owner/name``; made if it does not exist.
        private: Make it a private one.
        token: Access token of the hub; the one that ``hf auth login`` stored by default.
        dry_run: Upload nothing, and say what would be.

    Raises:
        InputError: The directory is no complete model, or ``repo`` is no name of a repository.
        TensorfoldError: The hub cannot be reached, or does not take it.
    """
    check_types("push", directory=(directory, str | Path), repo=(repo, str), dry_run=(dry_run, bool))
    check_path(directory)
    path = Path(directory)
    if not path.is_dir():
        raise InputError(
            f"push: {directory} is no directory; needed one that tensorfold fold or save_pretrained wrote."
        )
    if "/" not in repo or not _is_repo_id(repo):
        raise InputError(f"push: got the repository {repo!r}; needed owner/name, in letters, digits, '-', '_' and '.'.")
    load(path)
    card = hub_card(path, repo)
    contents: dict[str, bytes | Path] = {
        file.name: file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")
    }
    contents["README.md"] = card.encode()
    size = sum(each.stat().st_size if isinstance(each, Path) else len(each) for each in contents.values())
    pushed = Pushed(repo, tuple(contents), size, card, None)
    if dry_run:
        return pushed
    api = huggingface_hub.HfApi(token=token, library_name="tensorfold")
    operations = [huggingface_hub.CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise InputError(
                f"push: {repo} exists and is public, so that --private has no effect; name another repository, or make "
                "it private on the hub first. Nothing was uploaded."
            )
        commit = api.create_commit(repo, operations, commit_message="Upload a model folded with tensorfold")
    except (HfHubHTTPError, OSError) as error:
        pass_on_memory(error)
        raise TensorfoldError(
            f"push: {path} could not be uploaded to {repo}: {reason(error)}; log in with `hf auth login`, and check "
            "the name and the network."
        ) from error
    return Pushed(repo, tuple(contents), size, card, str(commit.commit_url))


def _is_repo_id(name: str) -> bool:
    try:
        huggingface_hub.utils.validate_repo_id(name)  # type: ignore[attr-defined]
    except HFValidationError:
        return False
    return True
