"""What a calibrated fold of large models would take, from formulas: python studies/scale/paper.py [--rates]

``auto`` at medium effort over all linear layers and experts, at ``keep``, on T tokens, as the code is: the walk for
gradients, the error curves, the passes for feedback, the decompositions. Products are counted in multiply–adds, each
kind by itself, since devices differ in what each takes. Left out: attention's own products, norms, the search for value
heads and hidden units by probes on a few tokens, reading files where it hides behind computing.

``--rates`` measures, in processor time, what this machine's processor does of each kind, and appends that to
``paper.jsonl``; the sections of README.md are then written from it and from the folds in ``fold.jsonl``: predicted
beside measured processor seconds, with nothing fitted.

Notation: a matrix is m × n, s and l are its smaller and larger side, r its rank; d width, h hidden units.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages import write_sections

HERE = Path(__file__).parent
KEEP, TOKENS = 0.8, 8192
# Multiply–adds over n³, half of the floating-point operations that LAPACK's authors count: eigenvalues with vectors,
# eigenvalues alone, an inverse, a factorisation to solve with; over m n², QR with its Q.
EIGEN, EIGENVALUES, INVERSE, FACTOR, QR = 4.5, 2 / 3, 1.0, 1 / 3, 2.0


@dataclass
class Work:
    """Amounts of work.

    Attributes:
        passes: Multiply–adds of the model's own products, in its dtype.
        moments: Of sums of outer products, in fp32 with rounded inputs.
        products: Of fp64 matrix products.
        decompositions: Of eigenvectors, inverses, QR, in fp64.
        host: Of QR with pivoting, by LAPACK on the host.
        traffic: Bytes that the elimination of hidden units moves, which is bound by memory.
        read: Bytes of weights, states and moments read from the disk, block by block.
        solving: That part of products, decompositions and host that ranks divide among themselves.
    """

    passes: float = 0.0
    moments: float = 0.0
    products: float = 0.0
    decompositions: float = 0.0
    host: float = 0.0
    traffic: float = 0.0
    read: float = 0.0
    solving: Work | None = None

    def add(self, other: Work, times: float = 1.0) -> None:
        """Add so many times the other's work."""
        for each in fields(self):
            if each.name != "solving":
                setattr(self, each.name, getattr(self, each.name) + times * getattr(other, each.name))

    @property
    def macs(self) -> float:
        """All multiply–adds."""
        return self.passes + self.moments + self.products + self.decompositions + self.host


@dataclass(frozen=True)
class Matrix:
    """One of a block's matrices, or ``count`` equal ones, each of which a ``share`` of the tokens reaches."""

    stage: int  # of the four in which a block is folded: queries to values, outputs, expanding, contracting
    m: int
    n: int
    count: int = 1
    share: float = 1.0
    group: str = "mlp"

    @property
    def numbers(self) -> int:
        return self.m * self.n * self.count

    @property
    def used(self) -> float:
        """Multiply–adds a token."""
        return self.numbers * self.share


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    name: str
    blocks: int
    width: int
    heads: int
    kv_heads: int
    head: int
    hidden: int
    vocabulary: int
    tied: bool = False
    experts: int = 0
    sent: int = 0  # experts that a token is sent to

    def matrices(self) -> list[Matrix]:
        """Those of a block; transformers keeps gate and up of an expert in one."""
        d, q, kv, h = self.width, self.heads * self.head, self.kv_heads * self.head, self.hidden
        attention = [Matrix(0, q, d, group="attention"), Matrix(0, kv, d, 2, group="attention")]
        attention.append(Matrix(1, d, q, group="attention"))
        if self.experts:
            share = self.sent / self.experts
            return [
                *attention,
                Matrix(2, 2 * h, d, self.experts, share, "experts"),
                Matrix(3, d, h, self.experts, share, "experts"),
            ]
        return [*attention, Matrix(2, h, d, 2), Matrix(3, d, h)]

    @property
    def head_numbers(self) -> int:
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All, without norms."""
        block = sum(matrix.numbers for matrix in self.matrices()) + self.experts * self.width
        return self.blocks * block + self.head_numbers * (1 if self.tied else 2)


SHAPES = [
    Shape("8B dense (Llama 3.1)", 32, 4096, 32, 8, 128, 14336, 128256),
    Shape("70B dense (Llama 3.1)", 80, 8192, 64, 8, 128, 28672, 128256),
    Shape("235B mixture (Qwen3, 8 of 128)", 94, 4096, 64, 4, 128, 1536, 151936, experts=128, sent=8),
]
MEASURED = [
    Shape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, tied=True),
    Shape("random, 1.5 G (shape.py)", 31, 2048, 32, 8, 64, 5632, 49152, tied=True),
]


def curve(m: int, n: int) -> Work:
    """``error_curve``: a root of the moment at the smaller side, a Gram matrix between roots, its eigenvalues."""
    s, l = sorted((m, n))  # noqa: E741
    return Work(products=s * l * l + s * s * l + 4 * s**3, decompositions=(EIGEN + EIGENVALUES) * s**3)


def fit(m: int, n: int, keep: float, partial: bool) -> tuple[Work, Work]:
    """The target of a matrix, which every rank finds; and its factors with pivots, which one rank finds."""
    s, l = sorted((m, n))  # noqa: E741
    r = min(s, round(keep * m * n / (m + n)))
    target = Work(products=m * n * n + n * n * m, decompositions=FACTOR * n**3)
    twice = Work()
    twice.add(target, 2 if partial else 1)
    solving = Work(
        products=s * l * l + s * s * l + 4 * s**3 + 2 * m * n * r + 2 * (m * n * n + m * m * n),  # the last: its error
        decompositions=2 * EIGEN * s**3 + QR * m * r * r + FACTOR * r**3 + r * r * max(0, m - r),
        host=QR * m * r * r,
    )
    return twice, solving


def units(d: int, h: int) -> Work:
    """Hidden units of an MLP: dropped one by one down to 3/8, and curves at five sizes."""
    found = Work(decompositions=INVERSE * h**3 + EIGEN * d**3, products=2 * d**3 + d * d * h)
    left = 1 - (3 / 8) ** 3
    found.traffic = 8 * (left * h**3 / 3 + d * (1 - (3 / 8) ** 2) * h**2 / 2)  # each step reads and writes k² and k d
    for eighths in range(3, 8):
        k = h * eighths // 8
        found.add(Work(products=d * h * k + k * k * d, decompositions=FACTOR * k**3))
        found.add(curve(d, k))
        found.add(curve(k, d), 2)
    return found


def value_heads(shape: Shape) -> Work:
    """Smaller value heads: curves of the two matrices at five sizes."""
    d, q, kv = shape.width, shape.heads * shape.head, shape.kv_heads * shape.head
    found = Work(products=d * d * q)
    for eighths in range(3, 8):
        k, v = q * eighths // 8, kv * eighths // 8
        found.add(Work(products=2 * d * q * q + d * d * q + q * q * k // max(1, shape.heads) + 2 * d * d * k))
        found.add(Work(products=k * k * d, decompositions=FACTOR * k**3))
        found.add(curve(v, d))
        found.add(curve(d, k))
    return found


def work(shape: Shape, tokens: int = TOKENS, keep: float = KEEP, targets: str = "all-linear") -> Work:
    """All of a calibrated fold; ``solving`` is the part that several ranks share."""
    every = shape.matrices()
    chosen = every if targets == "all-linear" else [each for each in every if each.group == targets]
    block = sum(each.used for each in every)
    one, solving = Work(), Work()
    # Gradients: forward, forward again and backward for each block; and G of every output, half of it.
    one.passes += 3 * block * tokens
    one.moments += sum(each.count * each.share * each.m**2 / 2 for each in chosen) * tokens
    # Curves: one pass, with C of every input; matrices that are given the same one share it.
    one.passes += block * tokens
    inputs = {(each.stage, each.n): each for each in chosen}
    shared = sum((each.count if each.group == "experts" else 1) * each.share * each.n**2 for each in inputs.values())
    one.moments += shared * tokens
    for each in chosen:
        one.add(curve(each.m, each.n), each.count)
    if any(each.group == "attention" for each in chosen):
        one.add(value_heads(shape))
    if any(each.group == "mlp" for each in chosen):
        one.add(units(shape.width, shape.hidden))
    # Folding in stages: dense and folded block each time, to the layers of the stage or to the end; then both go on.
    for stage in sorted({each.stage for each in chosen}):
        whole = stage % 2 == 1  # what is added to the states is fitted with the block's output
        part = block if whole else sum(each.used for each in every if each.stage <= stage)
        one.passes += (1 + keep) * part * tokens
    one.passes += keep * block * tokens  # the folded states go on
    for each in chosen:
        sums = 2 * each.n**2 + (each.m * each.n if each.stage % 2 else 0)
        one.moments += each.count * each.share * sums * tokens
        target, factors = fit(each.m, each.n, keep, partial=each.stage % 2 == 1 and each.group != "experts")
        one.add(target, each.count)
        one.add(factors, each.count)
        solving.add(factors, each.count)
    found = Work(solving=Work())
    found.add(one, shape.blocks)
    assert found.solving is not None
    found.solving.add(solving, shape.blocks)
    found.passes += 2 * shape.head_numbers * tokens  # logits and their gradient
    weights = 2.0 * shape.blocks * sum(each.numbers for each in every)  # bf16
    states = 4.0 * tokens * shape.width * shape.blocks
    moments = 4.0 * shape.blocks * sum(each.count * each.m**2 / 2 for each in chosen)
    # Weights in the walk forwards and backwards, for curves, and when a block is folded; states in the walk, for
    # curves, and of two models in every stage; moments for curves, and when a matrix is folded.
    found.read = 4 * weights + 2.0 * shape.head_numbers + (2 + 8) * states + 2 * moments
    return found


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: multiply–adds, and bytes for ``traffic`` and ``read``."""

    passes: float
    moments: float
    products: float
    decompositions: float
    host: float
    traffic: float
    read: float = field(default=float("inf"))

    def seconds(self, amount: Work) -> float:
        """Time of all kinds of work one after another."""
        return sum(getattr(amount, each.name) / getattr(self, each.name) for each in fields(self))


# A data-centre GPU of 2023 (989 TFLOP/s in bf16, 494 in TF32, 67 in fp64 by its sheet) of which passes and moments get
# 40 %, fp64 products 60 %; eigensolvers 1 TFLOP/s; 2 of its 3.3 TB/s; LAPACK with pivoting 20 GFLOP/s; a disk 2 GB/s.
GPU = Rates(198e12, 99e12, 20e12, 0.5e12, 10e9, 2e12, 2e9)


def on_ranks(amount: Work, rates: Rates, ranks: int) -> float:
    """Seconds on several GPUs of one machine: all of them compute the passes and the search; fits are divided."""
    assert amount.solving is not None
    alone = Work()
    alone.add(amount)
    alone.add(amount.solving, 1 / ranks - 1)
    return rates.seconds(alone)


def measured_rates() -> dict[str, float]:
    """Rates of this processor, one thread, in processor time: the best of five of each kind."""
    import scipy.linalg
    import torch

    from tensorfold.utils.torch_modes import rounded_products

    torch.set_num_threads(1)
    n = 1024
    a, b = torch.randn(2, n, n), torch.randn(n, n, dtype=torch.float64)
    symmetric = b @ b.T
    row, tall = torch.randn(2 * n), torch.randn(2 * n, 2 * n)

    def rate(amount: float, call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(5):
            started = time.process_time()
            call()
            taken.append(time.process_time() - started)
        return amount / min(taken)

    def rounded() -> None:
        with rounded_products():
            a[0] @ a[1]

    found = {
        "passes": rate(n**3, rounded),
        "moments": rate(n**3, rounded),
        "products": rate(n**3, lambda: b @ b),
        "decompositions": rate(EIGEN * n**3, lambda: torch.linalg.eigh(symmetric)),
        "host": rate(n**3 / 2 * 4 / 3, lambda: scipy.linalg.qr(b[: n // 2].numpy(), mode="r", pivoting=True)),
        "traffic": rate(8 * 4 * n * n, lambda: tall.addr_(row, row)),
    }
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def entries(name: str) -> list[dict[str, Any]]:
    """Lines of a log beside this script; none where there is no such file."""
    path = HERE / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def table() -> str:
    """The amounts and times of the large shapes."""
    lines = [
        "| model | parameters | read, TB | passes | moments | products in fp64 | decompositions | pivoting "
        "| one GPU, h | eight, h |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for shape in SHAPES:
        found = work(shape)
        kinds = (found.passes, found.moments, found.products, found.decompositions, found.host)
        amounts = [f"{each / 1e15:,.2f}" for each in kinds]
        hours = [f"{on_ranks(found, GPU, ranks) / 3600:,.1f}" for ranks in (1, 8)]
        size = f"{shape.parameters / 1e9:,.1f} G"
        lines.append(f"| {' | '.join([shape.name, size, f'{found.read / 1e12:,.1f}', *amounts, *hours])} |")
    return "\n".join(lines)


def checks() -> Iterator[str]:
    """A row for every fold in the log whose shape is known."""
    rates = entries("paper.jsonl")
    for entry in entries("fold.jsonl"):
        near = [each for each in MEASURED if abs(each.parameters / entry["parameters"] - 1) < 0.01]
        if not near or not rates:
            continue
        here = Rates(**{key: value for key, value in rates[-1].items() if key != "machine"})
        expected = here.seconds(work(near[0], entry["tokens"], entry["keep"], entry["targets"]))
        cells = [
            near[0].name, entry["way"], f"{entry['targets']} {entry['keep']}", f"{entry['tokens']:,}",
            f"{expected:,.0f}", f"{entry['processor_seconds']:,}", f"{entry['processor_seconds'] / expected:.2f}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def sections() -> dict[str, str]:
    head = "| model | way | fold | tokens | processor seconds, predicted | measured | measured / predicted |"
    rows = list(checks())
    check = "\n".join([head, "|---|---|---|---:|---:|---:|---:|", *rows]) if rows else "No fold in `fold.jsonl` yet."
    return {"paper": table(), "paper check": check}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rates", action="store_true")
    if parser.parse_args().rates:
        from tensorfold.benchmark.report import processor

        entry = {"machine": processor(), **measured_rates()}
        with (HERE / "paper.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    write_sections(HERE / "README.md", sections())


if __name__ == "__main__":
    main()
