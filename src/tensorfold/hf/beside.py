"""Files beside a model's weights, which go wherever the model goes: processors, vocabularies, licences, code.

transformers writes weights, configurations and tokenizer; all else would be lost with every directory that is written.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig

from tensorfold.errors import pass_on_memory

log = logging.getLogger(__name__)

_LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
_CARRIED = (
    "*processor_config.json",
    "preprocessor_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "generation_config.json",
    *_LICENCES,
)


def carry_over(config: PreTrainedConfig, directory: Path) -> None:
    """Copy licences, processors, vocabularies and code from beside a model's weights to a new directory.

    Files that are there already stay. Custom code that ``auto_map`` names is copied, since the new directory would not
    load without it; where it cannot be found, the map is taken out, and the model loads as transformers' own class of
    its type.

    Args:
        config: Configuration of a model that was loaded from a directory or the hub; else nothing is copied.
        directory: New directory with a ``config.json``, as ``save_pretrained`` wrote it.
    """
    source = _source(config)
    for file in _files(source, _CARRIED) if source is not None else ():
        _copy(file, directory / file.relative_to(source))  # type: ignore[arg-type]
    _carry_code(source, directory)


def _carry_code(source: Path | None, directory: Path) -> None:
    """Copy the Python files that ``auto_map`` in a new directory's config.json needs, or take the map out."""
    described = directory / "config.json"
    data = json.loads(described.read_text(encoding="utf-8"))
    classes = data.get("auto_map")
    if not isinstance(classes, dict):
        return
    named = [name for value in classes.values() for name in (value if isinstance(value, list) else [value]) if name]
    # "repository--module.Class" is code of another repository, which stays there.
    modules = {name.rpartition(".")[0].replace(".", "/") + ".py" for name in named if "--" not in name}
    if source is not None and all((source / module).is_file() for module in modules):
        for file in _files(source, ("**/*.py",)) if modules else ():
            _copy(file, directory / file.relative_to(source))
        return
    missing = sorted(module for module in modules if not (directory / module).is_file())
    if missing:
        log.warning("%s was not found beside the model, so auto_map is left out of config.json.", ", ".join(missing))
        del data["auto_map"]
        described.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _source(config: PreTrainedConfig) -> Path | None:
    """Local directory that a configuration was read from; for a model from the hub, its snapshot in the cache."""
    name = config._name_or_path or ""
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        revision = getattr(config, "_commit_hash", None)
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*_CARRIED, "*.py"]))
    except Exception as error:  # a name that is none, no network, no access: the weights are there all the same
        pass_on_memory(error)
        log.warning("What lies beside %s's weights (licence, processors) is not copied: %s", name, error)
        return None


def _files(source: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """Files below a directory that match any of some glob patterns."""
    for pattern in patterns:
        yield from (path for path in sorted(source.glob(pattern)) if path.is_file())


def _copy(file: Path, target: Path) -> None:
    """Copy a file unless its target exists."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
