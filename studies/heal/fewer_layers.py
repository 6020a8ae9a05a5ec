"""SmolLM2-135M with the blocks dropped that change their input least: a rival for ``mixture.py``.

    OMP_NUM_THREADS=1 python studies/heal/fewer_layers.py --keep 19 --out FOLDS/layers-19

How much a block changes its input is 1 − the mean cosine between its input and its output, token by token (block
influence: Men et al., "ShortGPT", arXiv 2403.03853), on the first 8,192 tokens of windows spread over ``mixture``.
Prints the influence of every block and which stay.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

import tensorfold
from tensorfold import Recipe
from tensorfold.calibration.windows import calibration_windows
from tensorfold.data.texts import load_text
from tensorfold.hf.sources import find_model
from tensorfold.models.anatomy import blocks

TOKENS = 8192


@torch.no_grad()
def influence(model: PreTrainedModel, windows: torch.Tensor) -> list[float]:
    """Block influence of every block, for token ids of shape (windows, length)."""
    _, chain = blocks(model)
    total = torch.zeros(len(chain), dtype=torch.float64)

    def note(index: int) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor, ...], output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            total[index] += (1 - F.cosine_similarity(given[0].float(), out.float(), dim=-1)).double().mean()

        return hook

    hooks = [block.register_forward_hook(note(index)) for index, block in enumerate(chain)]
    for window in windows:
        model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return (total / len(windows)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, required=True, help="Blocks that stay.")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    source = find_model("smollm2-135m")
    model, tokenizer = source.model(), source.tokenizer()
    text = load_text(str(Path(os.environ["TENSORFOLD_DATA"]) / "mixture"))
    found = influence(model.eval(), calibration_windows(tokenizer, text, TOKENS))
    print([round(each, 4) for each in found])
    kept = sorted(sorted(range(len(found)), key=lambda index: -found[index])[: arguments.keep])
    print("kept:", kept)
    tensorfold.fold(model, Recipe(fold=(), layers=tuple(kept)))
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
