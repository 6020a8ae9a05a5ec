"""Do other structures than low rank with pivots pay, in the metric in which layers are fitted? SmolLM2-135M.

    OMP_NUM_THREADS=1 python studies/smollm2/structures.py [--only PATTERN …] [--statistics FILE]
    python studies/smollm2/structures_table.py

Every entry appends a line of errors ``‖G^½ (W − Ŵ) C^½‖ / ‖G^½ W C^½‖`` at equal parameters to ``structures.jsonl``;
what is there is skipped. C is of 24,000 tokens and G of 8,192, from the start of ``wikitext-2-valid``, on the dense
model. Shapes are counted with pivots: B, like the factors of low rank, holds K² numbers that a change of basis takes.

``shapes``: grouped and Kronecker shapes (``grouped.py``), and low rank + each of them. ``squares``: low rank +
Kronecker products that split both sides. ``heads``: the free basis of every value head (``smaller_heads.py``).
``rotation``: another basis of the residual stream. ``joint``: values and outputs of all blocks folded either way,
judged by the first 8,192 tokens of the third quarter of that text; ``together``: so are the MLPs of three blocks.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from grouped import Grouped, Problem, low_rank
from moments import BLOCKS, KINDS, Known, name_of, statistics
from smaller_heads import HEADS, KV_HEADS, Heads
from torch import Tensor

import tensorfold
from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.solvers.als import weighted_als
from tensorfold.algebra.solvers.low_rank import error_curve, whitened_low_rank
from tensorfold.algebra.solvers.shared_basis import fit_shared_basis
from tensorfold.algebra.solvers.ttsvd import tt_svd
from tensorfold.algebra.specs.spec import Spec
from tensorfold.data.texts import load_text
from tensorfold.hf.sources import find_model

LOG = Path(__file__).parent / "structures.jsonl"
KEEPS = (0.5, 0.8, 0.2)
ROUNDS, MORE_ROUNDS = 5, 20


def shapes(known: Known, kind: str, block: int, keep: float) -> dict[str, Any]:
    """Low rank, every grouped shape alone and beside low rank; the best of either goes on for longer."""
    w, c, g = known[name_of(kind, block)]
    errors, going = {}, {}
    for side in ("in", "out"):
        problem = Problem.of(w, c, g, side == "out")
        whole, width, given = problem.loss(), problem.target.shape[1], keep * problem.size
        low = low_rank(problem.target, problem.metric, problem.rank(given))
        errors["low rank"] = math.sqrt(problem.loss(low) / whole)
        planned = [("grouped", groups, problem.terms(groups, given)) for groups in (2, 3, 4)]
        planned += [  # K² more numbers
            ("plain", groups, min(width // groups, int(given) // (problem.free * groups + width // groups)))
            for groups in (2, 3, 4)
        ]
        for share in (0.25, 0.5):
            planned.append((f"sum {share}", 2, problem.terms(2, share * given)))
            # One Kronecker product of about that size.
            divisors = [k for k in range(2, width) if width % k == 0]
            groups = min(divisors, key=lambda k: abs(problem.free * k - share * given))
            planned.append((f"sum {share}", groups, 1))
        for what, groups, terms in planned:
            paid = terms * (problem.free * groups + width // groups - terms)
            rank = problem.rank(given - paid) if what.startswith("sum") else 0
            rest = problem.target - low_rank(problem.target, problem.metric, rank) if rank else problem.target
            shape = Grouped.start(problem, groups, terms, rest)
            loss, low = shape.improve(rank, ROUNDS, problem.target - rest)
            label = f"{what} {side}: {terms} × {groups} groups" + (f" + rank {rank}" if rank else "")
            errors[label] = math.sqrt(loss / whole)
            going[label] = (problem, shape, rank, low)
    for what in ("grouped", "plain", "sum"):
        label = min((label for label in going if label.startswith(what)), key=errors.__getitem__)
        problem, shape, rank, low = going[label]
        errors[f"best {label}"] = math.sqrt(shape.improve(rank, MORE_ROUNDS, low)[0] / problem.loss())
    if w.shape[0] == w.shape[1]:
        errors["diagonal + low rank"] = diagonal(w, c, g, problem.rank(keep * w.numel() - len(w)))
    return errors


def diagonal(w: Tensor, c: Tensor, g: Tensor, rank: int) -> float:
    """The error of a diagonal and a low-rank matrix, each the best beside the other in turn."""
    w, c, g = w.double(), c.double(), g.double()
    spec, added = Spec.low_rank(*w.shape, rank), torch.zeros(len(w), dtype=torch.float64)
    for _ in range(8):
        cores = whitened_low_rank(w - added.diag(), c, spec, g)
        rest = w - cores[0][0, :, 0] @ cores[1][:, 0, :, 0]
        added = torch.linalg.solve(g * c, (g @ rest @ c).diagonal())
    left = rest - added.diag()
    return math.sqrt(float(((g @ left @ c) * left).sum() / ((g @ w @ c) * w).sum()))


def squares(known: Known, kind: str, block: int, keep: float) -> dict[str, float]:
    """A quarter for Kronecker products that split both sides, the rest for low rank, by the library's own solvers."""
    w, c, g = (tensor.double() for tensor in known[name_of(kind, block)])
    problem, given = Problem.of(w, c, g), keep * w.numel()
    curve = error_curve(w, c, g)
    errors = {"low rank": math.sqrt(float(curve[problem.rank(given)] / curve[0]))}
    for small in (2, 24):
        modes = [(size // small, small) for size in w.shape]
        each = w.numel() // small**2 + small**2
        terms = max(1, min(small**2 - 1, int(given / 4 / each)))
        spec, rank = Spec(*modes, (terms,)), problem.rank(given - terms * each)
        kronecker, cores = torch.zeros_like(w), None
        for _ in range(4):
            left, right = whitened_low_rank(w - kronecker, c, Spec.low_rank(*w.shape, rank), g)
            rest = w - left[0, :, 0] @ right[:, 0, :, 0]
            cores = weighted_als(rest, spec, cores or tt_svd(rest, spec), c, g, sweeps=1).cores
            kronecker = to_dense(cores, spec)
        gap = rest - kronecker
        errors[f"{terms} × ({modes}) + rank {rank}"] = math.sqrt(float(((g @ gap @ c) * gap).sum() / curve[0]))
    return errors


def rotation(known: Known, kind: str, block: int, keep: float, gains: Tensor) -> dict[str, Any]:
    """Groups of the residual stream's coordinates, as they are and in the basis of their principal components."""
    w, c, g = (tensor.double() for tensor in known[name_of(kind, block)])
    side = "out" if kind in ("down_proj", "o_proj") else "in"
    stream = known[name_of("v_proj" if KINDS[kind] == "self_attn" else "up_proj", block)][1].double()
    scale = torch.where(gains.abs() > 1e-3, 1 / gains, 0.0)
    components = torch.linalg.eigh(scale[:, None] * stream * scale).eigenvectors.flip(1).T
    width, generator = len(components), torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    errors = {}
    for label, basis in (
        ("as it is", None),
        ("principal", components),
        ("interleaved", components),
        ("random", turned),
    ):
        for groups in (2, 3, 4):
            x, y, z = w, c, g
            if basis is not None:
                q = (
                    basis.reshape(-1, groups, width).transpose(0, 1).reshape(width, width)
                    if label == "interleaved"
                    else basis
                )
                if side == "in":
                    into, back = q * scale, q * gains  # of inputs, and of the weight's columns
                    x, y = w @ back.T, into @ c @ into.T
                else:
                    x, z = q @ w, q @ g @ q.T
            problem = Problem.of(x, y, z, side == "out")
            terms = problem.terms(groups, keep * problem.size)
            loss, _ = Grouped.start(problem, groups, terms, problem.target).improve(0, ROUNDS)
            errors[f"{label}, {groups} groups"] = math.sqrt(loss / problem.loss())
    rank = problem.rank(keep * problem.size)
    errors["low rank"] = math.sqrt(problem.loss(low_rank(problem.target, problem.metric, rank)) / problem.loss())
    return errors


def heads(known: Known, block: int, keep: float) -> dict[str, float]:
    """Values and outputs together: apart, with the basis of each head not stored, and with smaller heads."""
    v, o = (known[name_of(kind, block)] for kind in ("v_proj", "o_proj"))
    given, size, errors = keep * (v[0].numel() + o[0].numel()), len(v[0]) // KV_HEADS, {}
    full = heads_of(known, block, size)
    whole = sum(float(error_curve(*each)[0]) for each in (v, o))
    errors["apart"] = math.sqrt(full.divided(o[2].double(), given, shared=False)[0] / whole)
    for smaller in (size, 60, 56, 52, 48, 40, 32, 24):
        of_size = full if smaller == size else heads_of(known, block, smaller)
        errors[f"heads of {smaller}"] = math.sqrt(of_size.divided(o[2].double(), given, shared=True)[0] / whole)
    slope = o[0].numel() / size + v[0].numel() / size
    only = math.floor((slope - math.sqrt(slope**2 - 4 * KV_HEADS * given)) / (2 * KV_HEADS))
    errors["truncation alone"] = math.sqrt(heads_of(known, block, only).lost / whole)
    for kind, matrix, groups in (("v_proj", v, KV_HEADS), ("o_proj", o, HEADS)):
        turned = (full.v if kind == "v_proj" else (*full.o, o[2])) if matrix else None
        for label, (w, c, g) in (("", matrix), (" rotated", turned)):
            problem = Problem.of(w, c, g, kind == "v_proj")
            terms = problem.terms(groups, keep * problem.size)
            shape = Grouped.start(problem, groups, terms, problem.target)
            if label:  # the directions that are kept most, the last ones
                shape.basis = torch.eye(size)[None, -terms:]
            errors[f"{kind}{label}, a basis for {groups} heads"] = math.sqrt(
                shape.improve(0, ROUNDS)[0] / problem.loss()
            )
        rank = problem.rank(keep * problem.size)
        curve = error_curve(problem.target, problem.metric)
        errors[f"{kind} low rank"] = math.sqrt(float(curve[rank] / curve[0]))
    return errors


def joint(known: Known, model: Any, tokenizer: Any, keep: float, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Perplexity with values and outputs of all blocks folded, heads of the best of ``sizes``; whole ones are apart."""
    chosen: list[Any] = []
    for block in range(len(model.model.layers) if keep else 0):
        v, o = (known[name_of(kind, block)] for kind in ("v_proj", "o_proj"))
        whole, outputs, found = len(v[0]) // KV_HEADS, o[2].double(), []
        for size in sizes:
            part = heads_of(known, block, size)
            given = keep * (v[0].numel() + o[0].numel())
            found.append((*part.divided(outputs, given, shared=len(sizes) > 1), size, part))
        _, rank_v, rank_o, size, part = min(found, key=lambda each: each[0])
        attention = model.model.layers[block].self_attn
        rows = (torch.arange(HEADS)[:, None] * whole + torch.arange(size)).flatten()
        for module, (w, c, g), rank in (
            (attention.v_proj, part.v, rank_v),
            (attention.o_proj, (*part.o, outputs), rank_o),
        ):
            left, right = whitened_low_rank(w, c, Spec.low_rank(*w.shape, min(rank, *w.shape)), g)
            low, weight = (left[0, :, 0] @ right[:, 0, :, 0]).float(), torch.zeros_like(module.weight)
            if module is attention.v_proj:
                weight[rows[: len(low)]] = low
            else:
                weight[:, rows] = low
            module.weight.data = weight
        chosen.append((size, rank_v, rank_o))
    return {"perplexity": perplexity(model, tokenizer), "sizes and ranks": chosen}


def heads_of(known: Known, block: int, size: int) -> Heads:
    return Heads.of(*known[name_of("v_proj", block)], *known[name_of("o_proj", block)], size)


def together(known: Known, model: Any, tokenizer: Any, keep: float, groups: int) -> dict[str, Any]:
    """Perplexity with the MLPs of ``BLOCKS`` folded, all by low rank or all by so many groups; on the dense model."""
    for block in BLOCKS if keep else ():
        for kind in ("up_proj", "gate_proj", "down_proj"):
            w, c, g = known[name_of(kind, block)]
            problem = Problem.of(w, c, g, kind != "down_proj")
            if groups == 1:
                spec = Spec.low_rank(*w.shape, problem.rank(keep * w.numel()))
                cores = whitened_low_rank(w, c, spec, g)
            else:
                modes = (min(w.shape), 1), (groups, max(w.shape) // groups)
                spec = Spec(*modes, (problem.terms(groups, keep * w.numel()),))
                spec = spec if kind == "down_proj" else spec.transposed
                cores = fit_shared_basis(w, spec, c, g, rounds=2 * ROUNDS).cores
            model.get_submodule(name_of(kind, block)).weight.data = to_dense(cores, spec)
    return {"perplexity": perplexity(model, tokenizer)}


def perplexity(model: Any, tokenizer: Any) -> float:
    whole = "\n\n".join(load_text("wikitext-2", split="validation"))
    result = tensorfold.evaluate(model, tokenizer, [whole[len(whole) // 2 :]], "hf-1024", max_tokens=8192)
    return round(result.perplexity, 3)


def planned() -> Iterator[tuple[str, ...]]:
    """What decides first."""
    for block in map(str, BLOCKS):
        for keep in map(str, KEEPS):
            yield "heads", "", block, keep
            yield from (("shapes", kind, block, keep) for kind in KINDS)
            yield from (("rotation", kind, block, keep) for kind in KINDS)
        if block == str(BLOCKS[0]):
            yield from (
                ("joint", sizes, "all", keep)
                for keep in ("", "0.5", "0.8")
                for sizes in ("64", "64 56 48 40 32")
                if keep or sizes == "64"
            )
            yield from (("together", groups, "three", keep) for keep in ("0.5", "0.8") for groups in ("1", "2"))
            yield from (("squares", kind, block, "0.5") for kind in ("o_proj", "down_proj"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="Entries whose names match.")
    parser.add_argument("--statistics", type=Path, help="File that keeps C and G for the next time.")
    arguments = parser.parse_args()
    done = {json.loads(line)["entry"] for line in LOG.read_text().splitlines()} if LOG.exists() else set()
    left = [parts for parts in planned() if "/".join(parts) not in done]
    left = [parts for parts in left if any(fnmatch.fnmatch("/".join(parts), pattern) for pattern in arguments.only)]
    source = find_model("smollm2-135m")
    model, tokenizer = source.model(), source.tokenizer()
    if arguments.statistics and arguments.statistics.exists():
        known = torch.load(arguments.statistics)
    else:
        known = statistics(model, tokenizer)
        if arguments.statistics:
            torch.save(known, arguments.statistics)
    for parts in left:
        what, kind, block, keep = parts
        started = time.process_time()
        if what == "joint":
            found = joint(known, source.model(), tokenizer, float(keep or 0), tuple(map(int, kind.split())))
        elif what == "together":
            found = together(known, source.model(), tokenizer, float(keep), int(kind))
        elif what == "heads":
            found = heads(known, int(block), float(keep))
        elif what == "rotation":
            norms = model.model.layers[int(block)]
            norm = norms.input_layernorm if KINDS[kind] == "self_attn" else norms.post_attention_layernorm
            found = rotation(known, kind, int(block), float(keep), norm.weight.detach().double())
        else:
            found = {"shapes": shapes, "squares": squares}[what](known, kind, int(block), float(keep))
        entry = {"entry": "/".join(parts), **found, "cpu_seconds": round(time.process_time() - started)}
        print(entry, flush=True)
        with LOG.open("a") as file:
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
