"""Checks of a checkpoint's directory before transformers reads it: no pickles, and no file outside.

A directory may come from anyone. Pickles run code when they are read; an index of shards is a list of paths that
transformers joins to the directory and opens.
"""

from __future__ import annotations

import json
from pathlib import Path

from tensorfold.errors import InputError, pass_on_memory

_INDEX = ".safetensors.index.json"
_PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")


def check_files(directory: Path) -> None:
    """Check that a directory's weights are safetensors and lie inside it.

    Raises:
        InputError: The weights are pickles, or an index of shards names files elsewhere.
    """
    for index in sorted(directory.glob(f"*{_INDEX}")):
        shards(index)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    adapter = (directory / "adapter_config.json").is_file() and not (directory / "adapter_model.safetensors").is_file()
    if pickles and (adapter or not next(directory.glob("*.safetensors*"), None)):
        raise InputError(
            f"{directory}: its weights are pickles ({pickles[0]}), which can run code when they are read; needed "
            "safetensors. Convert them where you trust them: from_pretrained, then save_pretrained."
        )


def shards(index: Path) -> list[Path]:
    """Files that an index of shards names, all of them beside it.

    Raises:
        InputError: The index cannot be read, or names anything but safetensors files of its own directory.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        pass_on_memory(error)
        raise InputError(
            f"{index}: cannot be read as an index of shards, an object with a weight_map of names to files; copy the "
            "checkpoint again."
        ) from None
    if not names:
        raise InputError(f"{index}: its weight_map is empty; copy the checkpoint again.")
    for name in names:
        # A link to elsewhere is the owner's own doing, and how the hub's cache is laid out.
        if not isinstance(name, str) or Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: names {str(name)[:100]!r} as a file of weights; needed safetensors files beside the index."
            )
        if not (index.parent / name).is_file():
            raise InputError(f"{index}: names {name[:100]!r}, which is not there; copy the checkpoint again.")
    return [index.parent / name for name in names]
