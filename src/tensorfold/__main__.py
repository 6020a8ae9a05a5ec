"""``python -m tensorfold``, as ``accelerate launch`` and ``torchrun`` start it."""

from tensorfold.cli.main import run

run()
