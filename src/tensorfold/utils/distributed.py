"""The processes that ``torchrun`` or ``accelerate launch`` started together, and work that is divided among them.

Started in any other way, a process is the only rank, and nothing here communicates.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import get_int_from_env
from torch import Tensor

from tensorfold.errors import TensorfoldError

# One rank can be busy for hours with a matrix, or with writing the model, while the others wait for it.
PATIENCE = timedelta(days=2)

# As PartialState itself counts processes; asking it would already settle the process's device for good.
_COUNTS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process's index among ``count`` ranks, and the device that tensors travel through between them."""

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def find(cls, cpu: bool) -> Ranks:
        """The ranks of this run, from accelerate's state, which is made if there is none: gloo, else the accelerator's.

        A state that is there already stays as it is: a script that folds on the CPU and then heals on accelerators
        makes its own ``accelerate.PartialState()`` first.
        """
        if get_int_from_env(_COUNTS, 1) == 1:
            return cls()
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block when every rank has come to its end, or raise on every rank what the first to fail raised."""
        try:
            yield
            self.gather()
        except Exception as error:
            if self.count > 1 and not getattr(error, "is_shared", False):
                self.gather(failure=error)
            raise

    def gather(self, value: Any = None, failure: Exception | None = None) -> list[Any]:
        """Every rank's ``value``, in the order of the ranks; or the failure of the lowest rank that has one.

        Ranks meet nowhere else, so one that fails between two meetings brings its failure to the next one of the rest.

        Raises:
            Exception: The same class and message on all ranks; what cannot be sent becomes a :class:`TensorfoldError`.
        """
        if self.count == 1:
            return [value]
        met: list[Any] = [None] * self.count
        cause = None if failure is None else failure.__cause__
        torch.distributed.all_gather_object(met, (value, _sendable(failure), _sendable(cause)))
        for rank, (_, error, cause) in enumerate(met):
            if error is None:
                continue
            if rank == self.index:
                error = failure
            else:
                error.__cause__ = cause
            error.is_shared = True
            raise error
        return [value for value, _, _ in met]

    def broadcast(self, tensors: Iterable[Tensor], owner: int) -> None:
        """Overwrite contiguous ``tensors`` by those of the rank ``owner``: same shapes and dtypes, on any device."""
        if self.count == 1:
            return
        for tensor in tensors:
            own = tensor.detach()
            sent = own.to(self.device)
            # gloo knows no 16-bit integers, which stored orders may be.
            torch.distributed.broadcast(sent.view(torch.uint8) if sent.dtype is torch.int16 else sent, owner)
            if sent is not own:
                own.copy_(sent)

    def share(
        self,
        items: Sequence[Item],
        cost: Callable[[Item], int],
        compute: Callable[[Item], dict[str, Tensor]],
        empty: Callable[[Item], dict[str, Tensor]],
    ) -> Iterator[tuple[Item, dict[str, Tensor]]]:
        """Every item with its result, on every rank, though only the rank that owns it computes it.

        A rank's own results come as soon as they are there, the others' at the end of each turn of :func:`schedule`,
        one after another: whatever the caller frees for one is free before the next is received.

        Args:
            cost: Of an item, in any unit.
            compute: The result of an item, on the rank that owns it.
            empty: Contiguous tensors with the names, shapes and dtypes of the result, to receive it.
        """
        for turn in schedule([cost(item) for item in items], self.count):
            own = {}
            for k in turn[self.index]:
                own[k] = compute(items[k])
                yield items[k], dict(own[k])
            for owner, part in enumerate(turn):
                for k in part:
                    result = own.pop(k) if owner == self.index else empty(items[k])
                    self.gather()
                    self.broadcast(result.values(), owner)
                    if owner != self.index:
                        yield items[k], result


def schedule(costs: Sequence[int], ranks: int) -> list[list[list[int]]]:
    """Who computes what and when: ``schedule(…)[turn][rank]`` holds indices of ``costs``; every index once in all.

    The dearest item first, each goes to the rank with the least to do. In a turn a rank takes its next items for as
    long as they cost no more than the dearest one of that turn, so that ranks wait little for each other at its end.
    For one rank: one item a turn, in the order given.
    """
    if ranks == 1:
        return [[[k]] for k in range(len(costs))]
    queues: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        rank = loads.index(min(loads))
        queues[rank].append(k)
        loads[rank] += costs[k]
    turns = []
    while any(queues):
        dearest = max(costs[queue[0]] for queue in queues if queue)
        turn = []
        for queue in queues:
            part: list[int] = []
            while queue and costs[queue[0]] + sum(costs[k] for k in part) <= dearest:
                part.append(queue.pop(0))
            turn.append(part)
        turns.append(turn)
    return turns


def _sendable(error: BaseException | None) -> BaseException | None:
    """The error, if the other ranks can read it; else its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return TensorfoldError(f"{type(error).__name__}: {error}")
    return error
