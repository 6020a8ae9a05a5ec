"""``python -m tensorfold``, as ``accelerate launch`` and ``torchrun`` start it."""

from tensorfold.cli import run

run()
