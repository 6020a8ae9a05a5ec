"""What every entry of a log says of the machine it was measured on."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch


def facts() -> dict[str, Any]:
    """Threads, processor and version of torch."""
    return {
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
