"""Settings of the commands, as recipes carry them: calibration, healing, evaluation."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from tensorfold.errors import InputError
from tensorfold.utils.effects import ALWAYS, Need, Needs
from tensorfold.utils.validation import strict

Count = Annotated[int, Ge(1), Le(2**31 - 1)]
Natural = Annotated[int, Ge(0), Le(2**31 - 1)]
Weight = Annotated[float, Ge(0)]


@strict
class CalibrateSettings:
    """Calibration text (the Contract's ``TEXT``, its validation split where named) and how many tokens of it."""

    text: str = "wikitext-2"
    tokens: Count = 24_000


@strict
class EvalSettings:
    """Evaluation text (test split where named), protocol, and how many tokens of it (all if None)."""

    text: str = "wikitext-2"
    protocol: str = "hf-1024"
    max_tokens: Count | None = None


@strict
class BenchSettings:
    """What ``bench`` measures.

    Args:
        tokens: Numbers of tokens at which single layers are timed.
        prefill: Tokens of the prompt that whole models read; if None, 512 or what the context has room for.
        decode: Tokens generated after it, one at a time.
        rounds: Samples of everything, one of each in turn.
        way: ``chain`` (fewest multiply–adds) or ``materialise`` for all folded layers; if None, what each chooses.
        threads: torch's; as many as it has if None.
        dtype: Of the weights; as stored if None.
        memory: Whether peak memory is measured too.
    """

    tokens: Annotated[tuple[Annotated[int, Ge(1), Le(2**20)], ...], MinLen(1)] = (1, 16, 128, 1024, 4096)
    prefill: Count | None = None
    decode: Count = 32
    rounds: Count = 7
    way: Literal["chain", "materialise"] | None = None
    threads: Annotated[int, Ge(1), Le(1024)] | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    memory: bool = True

    def __post_init__(self) -> None:
        if len(set(self.tokens)) != len(self.tokens):
            raise InputError(f"bench: tokens={self.tokens}; needed different numbers.")


@strict
class HealSettings:
    """How quality is recovered. Block-by-block comes first where ``blockwise_tokens`` asks for it, then end to end.

    End to end, the loss is ``cross_entropy·CE + kl·T²·KL(teacher ‖ student)/tokens + embedding·MSE + attention·KL +
    ffn·MSE``; the last three compare with the teacher layer by layer, as KnGPT2 (arXiv 2110.08152) weighs them.

    Args:
        text: Training text (train split where named).
        steps: Optimiser steps end to end; 0 for none.
        batch: Sequences in one step, over all devices and accumulation.
        micro_batch: Sequences in one forward pass on one device; ``batch`` over the number of processes if None.
        block: Tokens in a sequence.
        windows: Where sequences begin: ``packed``, one after another, each once in a pass over the text; or ``random``,
            anywhere, drawn anew for every sequence.
        lr: Peak learning rate of AdamW.
        min_lr: Learning rate at the end of a cosine schedule.
        schedule: ``cosine``, ``linear`` or ``constant`` after ``warmup`` steps.
        train: ``cores``; ``all`` parameters; or ``all-but-embeddings``.
        dropout: Probability of every dropout while training, in place of the configuration's; the terms that compare
            with a teacher are of a pass without.
        freeze_scalars: Leave the Kronecker terms' scalars as they are.
        precision: ``bf16`` is autocast over fp32 weights.
        validation_fraction: Part of the text's end that chooses the best checkpoint and is never trained on.
        select: Whose weights are kept: of the ``best`` evaluation, that of what came in being the first, or of the
            ``last`` step, though it be worse.
        patience: Stop after this many evaluations without improvement; None never stops.
        blockwise_tokens: Tokens on which each block is fitted to the dense model's; 0 for none.
        blockwise_epochs: Passes over them for each block.
        blockwise_batch: Windows in one step of them.
        blockwise_lr: Peak learning rate of them.
        activations_mb: Megabytes of memory for the activations between blocks; what is beyond goes to disk.
    """

    text: str = "openwebtext"
    steps: Natural = 1000
    batch: Count = 8
    micro_batch: Count | None = None
    block: Annotated[int, Ge(2), Le(2**31 - 1)] = 512
    windows: Literal["packed", "random"] = "packed"
    lr: Annotated[float, Gt(0)] = 6e-5
    min_lr: Weight = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Natural = 0
    weight_decay: Weight = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: Weight = 1.0
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    train: Literal["cores", "all", "all-but-embeddings"] = "all"
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    freeze_scalars: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    cross_entropy: Weight = 1.0
    kl: Weight = 0.0
    temperature: Annotated[float, Gt(0)] = 1.0
    embedding: Weight = 0.0
    attention: Weight = 0.0
    ffn: Weight = 0.0
    validation_fraction: Annotated[float, Ge(0), Le(0.5)] = 0.01
    evaluate_every: Count | None = None
    save_every: Count | None = None
    select: Literal["best", "last"] = "best"
    patience: Count | None = None
    blockwise_tokens: Natural = 0
    blockwise_epochs: Count = 4
    blockwise_batch: Count = 2
    blockwise_lr: Annotated[float, Gt(0)] = 3e-3
    activations_mb: Natural = 2048
    workers: Annotated[int, Ge(0), Le(1024)] = 0

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise InputError(f"heal: batch={self.batch} is not a multiple of micro_batch={self.micro_batch}.")
        if self.min_lr > self.lr:
            raise InputError(f"heal: min_lr={self.min_lr} is above lr={self.lr}; needed at most lr.")
        if self.dropout and self.gradient_checkpointing and self.needs_teacher:
            raise InputError(
                f"heal: dropout={self.dropout} with gradient_checkpointing and a teacher; the pass that is compared "
                "would be computed again with dropout. Leave out one of the three."
            )

    @property
    def needs_teacher(self) -> bool:
        return bool(self.kl or self.embedding or self.attention or self.ffn or self.blockwise_tokens)

    @property
    def compared(self) -> HealSettings:
        """The settings as they are where a teacher was given: without a term that compares with it, ``kl`` is 1."""
        return self if self.needs_teacher else dataclasses.replace(self, kl=1.0)


_TRAINING = Need("steps above 0", lambda heal: heal.steps)
_VALIDATION = Need("validation_fraction above 0", lambda heal: heal.validation_fraction)
_BLOCKWISE = Need("blockwise_tokens above 0", lambda heal: heal.blockwise_tokens)
_COSINE = Need("schedule: cosine", lambda heal: heal.schedule == "cosine")
_CROSS_ENTROPY = Need("cross_entropy above 0", lambda heal: heal.cross_entropy)
_KL = Need("kl above 0", lambda heal: heal.kl)

HEAL_NEEDS: Needs = {
    "text": ALWAYS,
    "steps": ALWAYS,
    "batch": (_TRAINING,),
    "micro_batch": (_TRAINING,),
    "block": ALWAYS,
    "windows": (_TRAINING,),
    "lr": (_TRAINING,),
    "min_lr": (_TRAINING, _COSINE),
    "schedule": (_TRAINING,),
    "warmup": (_TRAINING,),
    "weight_decay": ALWAYS,
    "betas": ALWAYS,
    "clip": (_TRAINING,),
    "seed": ALWAYS,
    "precision": ALWAYS,
    "train": (_TRAINING,),
    "dropout": (_TRAINING, _CROSS_ENTROPY),
    "freeze_scalars": ALWAYS,
    "gradient_checkpointing": (_TRAINING,),
    "compile": (_TRAINING,),
    "cross_entropy": (_TRAINING,),
    "kl": (_TRAINING,),
    "temperature": (_TRAINING, _KL),
    "embedding": (_TRAINING,),
    "attention": (_TRAINING,),
    "ffn": (_TRAINING,),
    "validation_fraction": ALWAYS,
    "evaluate_every": (_TRAINING, _VALIDATION),
    "save_every": (_TRAINING,),
    "select": (_TRAINING, _VALIDATION),
    "patience": (_TRAINING, _VALIDATION),
    "blockwise_tokens": ALWAYS,
    "blockwise_epochs": (_BLOCKWISE,),
    "blockwise_batch": (_BLOCKWISE,),
    "blockwise_lr": (_BLOCKWISE,),
    "activations_mb": (_BLOCKWISE,),
    "workers": ALWAYS,
}

_LAYERS = Need("folded layers, and this model has none", lambda found: found)

BENCH_NEEDS: Needs = {  # of the folded layers that were found
    **dict.fromkeys(("prefill", "decode", "rounds", "threads", "dtype", "memory"), ALWAYS),
    "tokens": (_LAYERS,),
    "way": (_LAYERS,),
}
