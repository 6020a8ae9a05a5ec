"""Text that is the same for a seed, for tests that need to know every character."""

import itertools
import random


def prose(characters: int, seed: int = 0) -> str:
    """Words of unequal letters, so that windows differ in difficulty."""
    rng = random.Random(seed)
    words = ("".join(rng.choices("etaoinshr", k=rng.randint(1, 7))) for _ in itertools.count())
    text = ""
    while len(text) < characters:
        text += next(words) + rng.choice([" ", " ", " ", "\n"])
    return text[: characters - 1] + "."
