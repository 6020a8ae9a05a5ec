"""What the tests of ``bench`` share: a clock that does not depend on the machine, quick settings, a folded model."""

import tensorfold
from tensorfold import MPO, Kronecker, LowRank, Recipe, Rule

QUICK = {"tokens": (1, 3), "prefill": 8, "decode": 2, "rounds": 2, "memory": False}


class Clock:
    """A second passes between two looks at it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def fold(model):
    """``model``, with MLP, one attention matrix and the tied embedding folded."""
    rules = (
        Rule("mlp", Kronecker(factor=(16, 16))),
        Rule(["q_proj"], MPO(sites=2, bond=4)),
        Rule("embedding", LowRank(rank=8)),
    )
    tensorfold.fold(model, Recipe(rules))
    return model
