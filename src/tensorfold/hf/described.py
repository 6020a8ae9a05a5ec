"""Check of a model in memory against its configuration, so that what is saved can be loaded."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from tensorfold.errors import InputError, pass_on_memory


def check_described(model: PreTrainedModel) -> None:
    """Check that a dense model has the weights, by name and shape, that its configuration describes.

    A model whose widths were pruned, or whose layers were deleted or added by hand, is written by ``save_pretrained``
    and cannot be loaded again.

    Raises:
        InputError: A weight is missing, too many, or of another shape.
    """
    try:
        with torch.device("meta"):
            described = type(model)(copy.deepcopy(model.config))
    except Exception as error:  # a class not built from its configuration alone; what is wrong with one shows elsewhere
        pass_on_memory(error)
        return
    own, wanted = (
        {name: tuple(p.shape) for name, p in m.named_parameters(remove_duplicate=False)} for m in (model, described)
    )
    for name in [*own, *wanted]:
        got, needed = own.get(name), wanted.get(name)
        if got != needed:
            raise InputError(
                f"{type(model).__name__}: {name} is {_shape(got)}, and by the model's configuration {_shape(needed)}; "
                "what is saved could not be loaded. Let the configuration say what was changed (intermediate_size, "
                "num_hidden_layers, …); tensorfold drops layers itself with layers: in a recipe."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "×".join(map(str, shape))
