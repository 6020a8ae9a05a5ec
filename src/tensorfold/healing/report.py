"""The report of a healing run, and the directory with the healed model, its log and a plot."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tensorfold.data.seen_text import note, noted
from tensorfold.healing.checkpoints import digest
from tensorfold.healing.log import StepLog, loss_plot
from tensorfold.hf.loading import load, save
from tensorfold.utils.atomic_files import atomic_directory, check_target
from tensorfold.utils.records import read_card


@dataclasses.dataclass(frozen=True)
class HealReport:
    """The result of healing.

    Attributes:
        steps: Steps taken end to end; fewer than the settings ask for where patience ended.
        step: The step whose weights were kept; 0 is before the first.
        tokens: Tokens trained on in all steps.
        validation_loss_before: Cross-entropy on the held-out windows of the text before healing, in nats a token; None
            without a validation split.
        validation_loss: That cross-entropy after healing.
        text: Name of the training text.
        seconds: Wall time.
        parameters: Parameters of the model.
        trained_parameters: Parameters that were trained.
        blockwise: Report of block-by-block healing; None without it.
        out: Directory that was written; None without one.
        kept: Whose weights were kept: those of ``steps``, of ``blocks`` alone, or of the ``start``, where nothing was
            better.
        helped: Whether the validation loss is lower than before; None without a validation split.
        window: Tokens in a window.
        prefix: Token ids that every window begins with: what the tokenizer puts before a document.
        bytes: Bytes of the model in its files.
    """

    steps: int
    step: int
    tokens: int
    validation_loss_before: float | None
    validation_loss: float | None
    text: str
    seconds: float
    parameters: int
    trained_parameters: int
    blockwise: dict[str, Any] | None = None
    out: str | None = None
    kept: str | None = None
    helped: bool | None = None
    window: int | None = None
    prefix: tuple[int, ...] = ()
    bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", tuple(self.prefix))  # JSON gives a list

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the field names, ready for JSON."""
        return {**dataclasses.asdict(self), "prefix": list(self.prefix)}

    def __str__(self) -> str:
        before, after = (
            "unknown" if each is None else f"{each:.4f}" for each in (self.validation_loss_before, self.validation_loss)
        )
        lines = [f"validation loss {before} → {after} on the end of {self.text}"]
        if self.helped is False:
            what = "the model is as it came in" if self.kept == "start" else "this is worse than what came in, or equal"
            lines = [f"nothing helped: {what} ({lines[0]})"]
        if self.prefix:
            lines += [f"every window of {self.window} tokens begins with token {' '.join(map(str, self.prefix))}"]
        if self.blockwise is not None:
            healed = sum(block["healed"] for block in self.blockwise["blocks"])
            lines += [f"{healed} of {len(self.blockwise['blocks'])} blocks, {self.blockwise['tokens']:,} tokens a pass"]
        if self.steps:
            kept = f"kept those of step {self.step}" if self.step else "kept none of them"
            lines += [f"{self.steps} steps, {self.tokens:,} tokens; {kept}"]
        lines += [f"{self.trained_parameters:,} of {self.parameters:,} parameters trained, {self.seconds:.0f} s"]
        return "\n".join([*lines, f"written to {self.out}"] if self.out else lines)


def card_of(directory: Path) -> dict[str, Any]:
    """The card in a model's directory, ``tensorfold.json``; empty where there is none that can be read.

    A ``heal`` entry that is not the report of a healing run is replaced by None.
    """
    card = read_card(directory)
    needed = {field.name for field in dataclasses.fields(HealReport) if field.default is dataclasses.MISSING}
    healed = card.get("heal", ...)
    return card if healed is ... or (isinstance(healed, dict) and needed <= healed.keys()) else {**card, "heal": None}


def finished(target: Path, identity: Mapping[str, Any], model: PreTrainedModel) -> HealReport:
    """The report of a run that finished before, whose weights are loaded into ``model``.

    Args:
        target: Directory that the run wrote.
        identity: Identity of this call.
        model: The model that was to be healed.

    Raises:
        InputError: The directory was written by a run with another identity.
    """
    done = card_of(target)["heal"]
    if done.get("identity") != digest(identity):
        check_target(target)
    result = load(target)
    model.load_state_dict(result.state_dict())
    note(model, noted(result))
    shutil.rmtree(f"{target}.heal", ignore_errors=True)
    return HealReport(
        **{field.name: done[field.name] for field in dataclasses.fields(HealReport) if field.name in done}
    )


def write(target: Path, work: Path, model: PreTrainedModel, tokenizer: Any, card: dict[str, Any]) -> None:
    """Write the healed model, the log and the plot into a directory, then remove the working directory.

    Args:
        target: Directory to write, whole or not at all.
        work: The run's working directory.
        model: The healed model.
        tokenizer: Its tokenizer.
        card: Its card.

    Raises:
        InputError: ``target`` is not empty, or cannot be created.
        TensorfoldError: The disk is full.
    """
    with atomic_directory(target) as partial:
        save(model, tokenizer, partial / "model", card)
        for path in (partial / "model").iterdir():
            path.rename(partial / path.name)
        (partial / "model").rmdir()
        shutil.copy(work / "log.jsonl", partial / "heal.jsonl")
        (partial / "loss.svg").write_text(loss_plot(StepLog(work / "log.jsonl").records), encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
