"""Loading checkpoints strictly, and saving them whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tensorfold.data.seen_text import with_notes
from tensorfold.errors import InputError, TensorfoldError, pass_on_memory, reason
from tensorfold.hf.beside import carry_over
from tensorfold.hf.checks import check_files
from tensorfold.hf.config import NAME, TensorfoldConfig
from tensorfold.hf.int8_modules import install_int8
from tensorfold.hf.model_card import is_plain, model_card
from tensorfold.hf.modules import install
from tensorfold.models.anatomy import check_not_quantised, count_parameters, empty_model
from tensorfold.nn import FoldedModule
from tensorfold.utils.atomic_files import atomic_directory
from tensorfold.utils.records import CARD
from tensorfold.utils.torch_modes import in_usual_modes
from tensorfold.utils.validation import check_types

CAUSAL_LM = "needed a decoder-only causal language model"

# Options that say where a model's files are, for transformers and huggingface_hub.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@in_usual_modes
def load(path: str | Path, *, dtype: torch.dtype | str | None = None, **options: Any) -> PreTrainedModel:
    """Load a folded or dense causal language model from a directory (or hub id), refusing anything incomplete.

    ``from_pretrained`` only warns about missing weights and fills them with random numbers; this raises. Pickles are
    never read, and code that comes with a checkpoint is run with ``trust_remote_code=True`` alone.

    Args:
        path: Directory that ``save_pretrained`` wrote, or a hub id.
        dtype: Dtype of the weights; as stored if None.
        options: Passed to ``from_pretrained``. Options that say where on the hub, or in the directory, the model lies
            (``revision``, ``subfolder``, ``cache_dir``, ``token``, …) hold for its configuration as well.

    Raises:
        InputError: No such model, or a tensor is missing, unexpected, truncated or of the wrong shape.
    """
    check_types("load", path=(path, str | Path), dtype=(dtype, torch.dtype | str | None))
    options = {"use_safetensors": True, "trust_remote_code": False, **options}
    place = {name: options[name] for name in HUB_OPTIONS if name in options}
    config = load_config(path, trust_remote_code=options["trust_remote_code"], **place)
    directory = Path(path, options.get("subfolder") or "")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        check_files(directory)
        if not options["trust_remote_code"]:
            _check_size(directory, config)
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except TensorfoldError as error:
        pass_on_memory(error)
        raise InputError(f"{path}: {error}") from error
    except (SafetensorError, json.JSONDecodeError, EOFError) as error:
        pass_on_memory(error)
        raise InputError(f"{path}: its weights cannot be read ({reason(error)}); copy the checkpoint again.") from error
    except (OSError, KeyError) as error:
        pass_on_memory(error)
        raise InputError(f"{path}: cannot be loaded: {reason(error)}") from error
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        pass_on_memory(error)
        raise InputError(f"{path}: not a loadable causal language model: {reason(error)}; {CAUSAL_LM}.") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    _check_complete(path, info)
    _check_sound(path, model)
    return model


def _check_size(path: Path, config: PreTrainedConfig) -> None:
    """Refuse a configuration far larger than its weights before ``from_pretrained`` allocates what is not there.

    Raises:
        InputError: The configuration describes more than twice the parameters in the files, or cannot be built at all.
        SafetensorError: A file is truncated or damaged.
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        return
    model = folded_skeleton(config)
    stored = sum(_stored_parameters(file) for file in files)
    described = count_parameters(model)
    if described > 2 * stored:
        raise InputError(
            f"config.json describes {described:,} parameters, the weight files hold {stored:,}; the files are "
            "incomplete or do not belong together. Copy the checkpoint again."
        )


def folded_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a checkpoint's configuration on the meta device, with its folded modules in place.

    Raises:
        InputError: No model can be built from the configuration.
    """
    model = empty_model(config)
    folding = folding_of(config)
    if folding is not None:
        install(model, folding.specs, folding.tied, folding.split)
        install_int8(model, folding.int8)
    return model


def folding_of(config: PreTrainedConfig) -> TensorfoldConfig | None:
    """Read the description of folded modules in a checkpoint's configuration; None where it is not folded.

    Raises:
        InputError: The description is damaged, or of a newer format.
    """
    stored_as = getattr(config, "quantization_config", None)
    if not isinstance(stored_as, dict) or stored_as.get("quant_method") != NAME:
        return None
    return TensorfoldConfig(**stored_as)


def _stored_parameters(file: Path) -> int:
    """Count of numbers in a safetensors file, by its header."""
    with safe_open(file, framework="pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def _check_complete(path: str | Path, info: Mapping[str, Any]) -> None:
    """Check that ``from_pretrained`` made up no tensor, dropped none, and that all fitted.

    Args:
        path: The checkpoint, for messages.
        info: Loading information that ``from_pretrained`` returned.

    Raises:
        InputError: It did; the message names up to five tensors.
    """
    found = {
        "lacks the tensors": [str(name) for name in info["missing_keys"]],
        "has the unexpected tensors": [str(name) for name in info["unexpected_keys"]],
        "has tensors of the wrong shape:": [
            f"{name} {tuple(got)}, needed {tuple(needed)}" for name, got, needed in info["mismatched_keys"]
        ],
    }
    for verdict, names in found.items():
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise InputError(f"{path}: the checkpoint {verdict} {shown}; it is incomplete or not of this model.")


def _check_sound(path: str | Path, model: PreTrainedModel) -> None:
    """Check that folded weights are in floating point and that all ties of the configuration were made.

    transformers gives a head its own weight, against the configuration, where the files hold one that differs.

    Raises:
        InputError: A weight is stored as whole numbers, or a tie was not made.
    """
    for name, module in model.named_modules():
        if isinstance(module, FoldedModule) and not all(p.is_floating_point() for p in module.parameters()):
            raise InputError(f"{path}: {name} is stored as whole numbers; needed floating point. Write it again.")
    untied = model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys.keys()
    if untied:
        raise InputError(
            f"{path}: the checkpoint has values of its own for {', '.join(sorted(untied))}, which its configuration "
            "ties to other weights; set tie_word_embeddings to false in config.json if that is meant."
        )


def load_config(path: str | Path, *, trust_remote_code: bool = False, **place: Any) -> PreTrainedConfig:
    """Read the configuration of a model, without its weights.

    Args:
        path: Directory or hub id.
        trust_remote_code: Whether code that comes with the model may run.
        place: Any of ``HUB_OPTIONS``.

    Raises:
        InputError: There is no such model, or it is an encoder–decoder or quantised.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **place)
    # A damaged config.json fails in as many ways as there are checks in transformers.
    except Exception as error:
        pass_on_memory(error)
        if isinstance(error, TensorfoldError):
            raise
        if "trust_remote_code" in str(error):
            raise InputError(
                f"model {str(path)!r} comes with code of its own, which is not run; needed a type that transformers "
                "knows. If you have read the code, tensorfold.load(path, trust_remote_code=True) runs it."
            ) from error
        missing = "has no usable config.json" if Path(path).exists() else "no such directory, and not on the hub"
        raise InputError(
            f"model {str(path)!r}: {missing}; needed a directory written by save_pretrained, a .gguf file, a hub id or "
            f"smollm2-135m. ({reason(error)})"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"model {str(path)!r} is an encoder–decoder model; {CAUSAL_LM}.")
    check_not_quantised(config, f"model {str(path)!r}")
    return config


def save(
    model: PreTrainedModel, tokenizer: Any, path: str | Path, card: dict[str, Any], *, replace: bool = False
) -> None:
    """Write model, tokenizer, files from beside the weights, and a README that says how to load it; all or nothing.

    Args:
        model: Folded or dense.
        tokenizer: The model's, or None.
        path: New directory.
        card: Facts that the README reports, see ``hf.model_card.model_card``. Also written as ``tensorfold.json``.
        replace: Whether a directory that is there is replaced.

    Raises:
        InputError: ``path`` exists and is not an empty directory, or cannot be written.
        TensorfoldError: The disk is full, or refuses to take the files.
    """
    with new_directory(path, replace=replace) as partial:
        model.save_pretrained(partial)
        save_beside(partial, model.config, tokenizer, with_notes(card, model))


@contextmanager
def new_directory(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Directory to fill that becomes ``path`` when the block ends without an error.

    Args:
        path: New directory.
        replace: Whether a directory that is there is replaced.

    Raises:
        InputError: ``path`` exists and is not an empty directory, or cannot be written.
        TensorfoldError: The disk is full, or refuses to take the files.
    """
    try:
        with atomic_directory(Path(path), replace=replace) as partial:
            yield partial
    except (SafetensorError, OSError) as error:
        pass_on_memory(error)
        raise TensorfoldError(f"{path}: could not be written: {reason(error)}; nothing was left of it.") from error


def save_beside(directory: Path, config: PreTrainedConfig, tokenizer: Any, card: dict[str, Any]) -> None:
    """Write the files beside weights and configuration: tokenizer, README, ``tensorfold.json``, licences and the like.

    Args:
        directory: Directory with the weights and a ``config.json``.
        config: Configuration of their model; see :func:`tensorfold.hf.beside.carry_over`.
        tokenizer: The model's, or None.
        card: Facts that the README reports.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    carry_over(config, directory)
    (directory / "README.md").write_text(model_card(card, plain=is_plain(directory)), encoding="utf-8")
    (directory / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
