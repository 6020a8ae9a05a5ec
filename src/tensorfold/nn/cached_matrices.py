"""Keeping the multiplied-out matrices of folded layers for inference, within a limit of memory."""

from __future__ import annotations

from torch import nn

from tensorfold.errors import InputError
from tensorfold.nn.base import FoldedModule

# Numbers of tokens that a layer's time is estimated for: generating one token, and reading a prompt.
_TOKENS = (1, 256)


def cache_matrices(model: nn.Module, megabytes: float) -> dict[str, int]:
    """Let folded layers that are faster as a dense matrix keep it between forwards, within a limit of memory.

    Layers are taken by the time they save for each byte, at 1 and at 256 tokens; those that are faster as cores, at any
    number of tokens, keep computing with the cores. A matrix is made in the first forward without gradients that uses
    it, made again when a parameter has changed, and dropped by ``train()`` and when the module moves. Values assigned
    through ``.data`` are not noticed: call this again after it.

    Args:
        model: Any module; its folded layers are looked at.
        megabytes: Limit for all matrices together, in 10⁶ bytes; 0, as models come, drops every matrix.

    Returns:
        Bytes that each chosen layer will keep, by its name.

    Raises:
        InputError: ``megabytes`` is negative.
    """
    if not megabytes >= 0:
        raise InputError(f"cache_matrices: megabytes={megabytes}; needed 0 or more.")
    gains: list[tuple[float, int, str, FoldedModule]] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, FoldedModule):
            continue
        layer.hold_matrix(False)
        size = layer.spec.dense_parameters * layer.cores[0].element_size()
        gain = sum(layer.seconds_saved(tokens) for tokens in _TOKENS)
        if gain:
            gains.append((gain / size, size, name, layer))
    left, kept = megabytes * 1e6, {}
    for _, size, name, layer in sorted(gains, key=lambda entry: (-entry[0], entry[2])):
        if size <= left:
            layer.hold_matrix(True)
            left -= size
            kept[name] = size
    return kept
