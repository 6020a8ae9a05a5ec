"""What sizes mean: a fraction of a model, or bytes of a file, as the fraction of matrices to keep and bits to store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensorfold.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tensorfold.folding.plan import Plan
    from tensorfold.recipes.recipe import Recipe

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}

# Bytes of a stored number, of a matrix and of a table, by engine and bits. Graphs keep scales: ONNX Runtime four bytes
# for 32 numbers, OpenVINO two for 32 in four bits and two for a row in eight.
COSTS: dict[str, dict[int, tuple[float, float]]] = {
    "transformers": {32: (4, 4), 8: (1.01, 1.01)},
    "openvino": {32: (4, 4), 16: (2, 2), 8: (1.01, 1.01), 4: (0.5625, 1.01)},
    "onnx": {32: (4, 4), 16: (2, 2), 8: (1.125, 1.125), 4: (0.625, 1.125)},
}
_LEAST = 0.5  # of the targeted matrices; below it, fewer bits are tried first
_MARGIN = 0.98  # of the bytes asked for: graphs and scales of short rows take some


@dataclass(frozen=True)
class Aim:
    """A size to fold to.

    Attributes:
        keep: Fraction of the targeted matrices' parameters that stays.
        bits: Of a stored number afterwards.
        engine: What the result is for: ``transformers``, ``onnx`` or ``openvino``.
        plan: The plan at that size.
        tables: Parameters of tables and heads, which graphs store in eight bits at least.
        targets: What is folded, as ``--targets`` of ``plan`` and ``fold`` says it.
    """

    keep: float
    bits: int
    engine: str
    plan: Plan
    tables: int
    targets: str

    def bytes_in(self, bits: int, dense: bool = False) -> int:
        """Bytes that the model takes in these bits, about; those of the dense model if ``dense``."""
        parameters = self.plan.parameters_before if dense else self.plan.parameters_after
        matrix, table = COSTS[self.engine][bits]
        return round(matrix * (parameters - self.tables) + table * self.tables)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: ``bytes_before`` and ``bytes_after`` as the model is stored now, ``bytes_about`` in the bits."""
        planned, sizes = self.plan.to_dict(), ("parameters", "macs", "bytes")
        return {
            "targets": self.targets,
            "keep": round(self.keep, 6),
            "bits": self.bits,
            **{f"{size}_{when}": planned[f"{size}_{when}"] for size in sizes for when in ("before", "after")},
            "bytes_about": self.bytes_in(self.bits),
        }

    def __str__(self) -> str:
        from tensorfold.folding.tables import megabytes, size_lines

        before, after = self.plan.parameters_before, self.plan.parameters_after
        kinds = (("float32", 4), ("bfloat16", 2))
        floats = ", ".join(f"{megabytes(size * before, size * after)} in {name}" for name, size in kinds)
        stored = megabytes(self.bytes_in(self.bits, dense=True), self.bytes_in(self.bits))
        chosen = f"; about {stored} in {self.bits} bits for {self.engine}" if self.bits < 32 else ""
        lines = size_lines(self.plan, floats + chosen)
        return "\n".join([f"--targets {self.targets} --keep {self.keep:.4f}", *lines])


def bytes_of(text: str) -> int:
    """Bytes from text such as ``60MB``, ``1.5GiB`` or ``60000000``.

    >>> bytes_of("60MB"), bytes_of("1.5 KiB"), bytes_of("42")
    (60000000, 1536, 42)

    Raises:
        InputError: It is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kMG]i?|Ki)?B)?", text.strip())
    if not found or float(found[1]) <= 0:
        raise InputError(f"--bytes {text!r:.60}; needed a number above 0 with a unit, such as 60MB, 1.5GB or 512MiB.")
    return round(float(found[1]) * _UNITS[(found[2] or "").replace("ki", "Ki")])


def targets_of_size(config: PreTrainedConfig, engine: str, plain: bool = False) -> str:
    """What is folded for a size where nobody names targets: every linear layer, and experts in one tensor.

    Args:
        config: Configuration of the dense model.
        engine: What the result is for; graphs of folded experts cannot be traced, and so leave them as they are.
        plain: Whether only MLPs become narrower.
    """
    from tensorfold.folding.plan import skeleton
    from tensorfold.models.experts import fused_experts

    if plain:
        return "mlp"
    experts = engine == "transformers" and bool(fused_experts(skeleton(config)))
    return "all-linear,experts" if experts else "all-linear"


def aim_at(
    config: PreTrainedConfig, recipe: Recipe, engine: str, bits: int | None, size: float | None, most: int | None
) -> Aim:
    """The fraction to keep, and the bits, for a size.

    Args:
        config: Configuration of the dense model.
        recipe: A recipe of one rule, whose method's ``keep`` is what is looked for.
        engine: What the result is for.
        bits: Of a stored number; None for 8 (32 for transformers), or for fewer where ``most`` would leave less than
            half of the matrices' numbers.
        size: Fraction of the whole model's parameters that stays.
        most: Bytes that the file may have, where ``size`` is None.

    Raises:
        InputError: The size cannot be had, or the dense model has it already.
    """
    from tensorfold.folding.plan import plan, skeleton
    from tensorfold.models.anatomy import count_parameters

    model = skeleton(config)
    tables = sum({id(t): t.numel() for t in _tables(model)}.values())
    half = plan(model, _keeping(recipe, 0.5))
    whole, targeted = count_parameters(model), half.targeted_before
    known = COSTS[engine]
    if bits is not None and bits not in known:
        raise InputError(f"--bits {bits} with --to {engine}; needed one of {', '.join(map(str, known))}.")

    def keep_in(each: int) -> float:
        if most is None:
            assert size is not None
            return (size * whole - (whole - targeted)) / targeted
        matrix, table = known[each]
        return (_MARGIN * most - table * tables - matrix * (whole - tables - targeted)) / (matrix * targeted)

    if bits is None and most is None:
        bits = 32 if engine == "transformers" else 8
    if bits is None:
        tried = [32, 8] if engine == "transformers" else [8, 4]
        bits = next((each for each in tried if keep_in(each) >= _LEAST), min(known))
    keep = keep_in(bits)
    asked = f"--size {size}" if most is None else f"--bytes {most:,}"
    if keep >= 1:
        to = "int8" if engine == "transformers" else f"{engine} --bits {bits}"
        done = (
            "there is nothing to fold" if to == "int8" and bits == 32 else f"tensorfold export MODEL --to {to} does it"
        )
        raise InputError(f"{asked}: the dense model in {bits} bits has that size already; {done}.")
    if keep <= 0:
        least = (whole - targeted) / whole
        raise InputError(
            f"{asked}: what is not folded takes more than that in {bits} bits; needed more than {least:.2f} of the "
            f"model{'' if most is None else f', {_floor(known[bits], whole, targeted, tables) / 1e6:,.1f} MB'}, or "
            "fewer --bits."
        )
    return Aim(keep, bits, engine, plan(model, _keeping(recipe, keep)), tables, str(recipe.fold[0].targets))


def _floor(costs: tuple[float, float], whole: int, targeted: int, tables: int) -> float:
    return (costs[0] * (whole - tables - targeted) + costs[1] * tables) / _MARGIN


def _tables(model: Any) -> list[Any]:
    """Weights of the input table and of the head."""
    from tensorfold.models.tied_heads import tied_head

    ends = (model.get_input_embeddings(), None if tied_head(model) is not None else model.get_output_embeddings())
    return [end.weight for end in ends if end is not None]


def _keeping(recipe: Recipe, keep: float) -> Recipe:
    """The recipe with another fraction that its one rule keeps."""
    import dataclasses

    [rule] = recipe.fold
    method = dataclasses.replace(rule.method, keep=keep)  # type: ignore[call-arg]
    return dataclasses.replace(recipe, fold=(dataclasses.replace(rule, method=method),))
