"""Settings of calibration, evaluation, benchmark and healing, as recipes and the command line give them."""

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
    """The calibration text.

    Args:
        text: File, directory or named text, of which the validation split is read; or ``self``, for text that the
            dense model writes. Several, as a list, have equal shares of the tokens.
        tokens: How many of its tokens are used, of all texts together.
    """

    text: str | tuple[str, ...] = "wikitext-2"
    tokens: Count = 24_000

    def __post_init__(self) -> None:
        if not self.texts:
            raise InputError("calibrate: text=[]; needed at least one text, or no calibrate.")

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts, one or several."""
        return (self.text,) if isinstance(self.text, str) else self.text


@strict
class EvalSettings:
    """The text and protocol of evaluation.

    Args:
        text: File, directory or named text; of a named text the test split is read.
        protocol: Name of the protocol.
        max_tokens: How many tokens of the text are used, from its beginning; None for all.
    """

    text: str = "wikitext-2"
    protocol: str = "hf-1024"
    max_tokens: Count | None = None


@strict
class BenchSettings:
    """Settings of the benchmark.

    Args:
        tokens: Numbers of tokens at which single layers are timed.
        prefill: Tokens of the prompt that whole models read; if None, 512 or what the context has room for.
        decode: Tokens generated after the prompt, one at a time.
        rounds: Measurements of everything, each kind in turn.
        way: How all folded layers are applied: along the ``chain`` of their cores with the fewest multiply–adds, or by
            the dense matrix that they ``materialise``; if None, what each chooses.
        threads: Threads of torch; its own choice if None.
        dtype: Dtype of the weights; as stored if None.
        device: Where the models are put, such as ``cuda``; the CPU if None.
        memory: Whether peak memory is measured as well.
    """

    tokens: Annotated[tuple[Annotated[int, Ge(1), Le(2**20)], ...], MinLen(1)] = (1, 16, 128, 1024, 4096)
    prefill: Count | None = None
    decode: Count = 32
    rounds: Count = 7
    way: Literal["chain", "materialise"] | None = None
    threads: Annotated[int, Ge(1), Le(1024)] | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    device: str | None = None
    memory: bool = True

    def __post_init__(self) -> None:
        if len(set(self.tokens)) != len(self.tokens):
            raise InputError(f"bench: tokens={self.tokens}; needed numbers that all differ.")


@strict
class HealSettings:
    """Settings of healing: block by block first, where ``blockwise_tokens`` asks for it, then end to end.

    The loss end to end is ``cross_entropy·CE + kl·T²·KL(teacher ‖ student)/tokens + embedding·MSE + attention·KL +
    ffn·MSE``; the last three compare with the teacher layer by layer, as in KnGPT2 (arXiv 2110.08152).

    Args:
        text: Training text: file, directory or named text, of which the train split is read; or ``self``, for text that
            the teacher writes.
        steps: Optimiser steps end to end; 0 for none.
        batch: Windows in one step, over all devices and accumulation.
        micro_batch: Windows in one forward pass on one device; ``batch`` over the number of processes if None.
        block: Tokens in a window.
        windows: Where windows begin: ``packed``, one after another, each once in a pass over the text; or ``random``,
            anywhere, drawn anew for every window.
        lr: Peak learning rate of AdamW.
        lr_sweep: Peak rates of which the one with the best validation loss after a short run takes the place of ``lr``:
            a twentieth of the steps each, twenty at least. None by default.
        min_lr: Learning rate at the end of a cosine schedule.
        schedule: ``cosine``, ``linear`` or ``constant`` after warm-up.
        warmup: Steps in which the learning rate rises from 0 to ``lr``.
        weight_decay: Weight decay of AdamW, for matrices and cores.
        betas: Decay rates of AdamW's two averages.
        clip: Largest norm of the gradient.
        seed: Seed of the order of windows and of dropout.
        precision: ``fp32``, or ``bf16`` for autocast over fp32 weights.
        train: Which parameters are trained: ``cores``, ``all``, or ``all-but-embeddings``.
        dropout: Probability of every dropout in training, in place of the configuration's. Terms of the loss that
            compare with a teacher are computed without dropout.
        freeze_scalars: Whether the scalars of Kronecker terms are left as they are.
        gradient_checkpointing: Whether blocks are computed again in the backward pass, to save memory.
        compile: Whether the model is compiled.
        cross_entropy: Weight of the cross-entropy.
        kl: Weight of the divergence from the teacher's predictions.
        temperature: T, by which logits are divided in that divergence.
        embedding: Weight of the squared error of the embedding's output.
        attention: Weight of the divergence from the teacher's attention probabilities.
        ffn: Weight of the squared error of the MLPs' outputs.
        validation_fraction: Share of the windows that selects the weights and is never trained on: the text's end, or,
            of several files, the ends of as many equal stretches (64 at most).
        evaluate_every: Steps between evaluations; a tenth of the run if None.
        save_every: Steps between checkpoints; one at each evaluation if None.
        select: Whose weights are kept: those with the ``best`` evaluation, the first one being before healing, or those
            of the ``last`` step, even if they are worse.
        patience: Evaluations without improvement after which training stops; None for no limit.
        blockwise_tokens: Tokens on which each block is fitted to the dense model's block; 0 for none.
        blockwise_epochs: Passes over those tokens for each block.
        blockwise_batch: Windows in one step of that fit.
        blockwise_lr: Peak learning rate of that fit.
        activations_mb: Megabytes (10⁶ bytes) of memory for hidden states between blocks; more go to disk.
        workers: Processes that tokenise and load windows; 0 for this process alone.
    """

    text: str = "openwebtext"
    steps: Natural = 1000
    batch: Count = 8
    micro_batch: Count | None = None
    block: Annotated[int, Ge(2), Le(2**31 - 1)] = 512
    windows: Literal["packed", "random"] = "packed"
    lr: Annotated[float, Gt(0)] = 6e-5
    lr_sweep: tuple[Annotated[float, Gt(0)], ...] = ()
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
        lowest = min(self.lr_sweep, default=self.lr)
        if self.min_lr > lowest:
            raise InputError(f"heal: min_lr={self.min_lr} is above lr={lowest}; needed at most lr.")
        if self.dropout and self.gradient_checkpointing and self.needs_teacher:
            raise InputError(
                f"heal: dropout={self.dropout} with gradient_checkpointing and a teacher; the pass that is compared "
                "would be computed again with dropout. Leave out one of the three."
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether a term of the loss, or block-by-block healing, compares with a teacher."""
        return bool(self.kl or self.embedding or self.attention or self.ffn or self.blockwise_tokens)

    @property
    def compared(self) -> HealSettings:
        """The settings for a run with a teacher: where nothing compares with it, a copy in which ``kl`` is 1."""
        return self if self.needs_teacher else dataclasses.replace(self, kl=1.0)


_TRAINING = Need("steps above 0", lambda heal: heal.steps)
_VALIDATION = Need("validation_fraction above 0", lambda heal: heal.validation_fraction)
_BLOCKWISE = Need("blockwise_tokens above 0", lambda heal: heal.blockwise_tokens)
_NO_SWEEP = Need("no lr_sweep, which chooses it", lambda heal: not heal.lr_sweep)
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
    "lr": (_TRAINING, _NO_SWEEP),
    "lr_sweep": (_TRAINING, _VALIDATION),
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

BENCH_NEEDS: Needs = {  # conditions on the folded layers that were found
    **dict.fromkeys(("prefill", "decode", "rounds", "threads", "dtype", "device", "memory"), ALWAYS),
    "tokens": (_LAYERS,),
    "way": (_LAYERS,),
}
