"""Ranks: the processes that ``torchrun`` or ``accelerate launch`` started together, and work divided among them.

A process that was started in any other way is the only rank, and nothing here communicates.
"""

from __future__ import annotations

import atexit
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

# The longest wait for another rank, which may be busy for hours with one matrix or with writing the model.
PATIENCE = timedelta(days=2)

# Environment variables that PartialState counts processes by. Making a PartialState would fix the device for good.
_COUNTS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE")

Item = TypeVar("Item")
Result = TypeVar("Result", bound=Iterable[Tensor])


def processes() -> int:
    """How many processes this run has, by the environment that launchers set."""
    return get_int_from_env(_COUNTS, 1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a run.

    Attributes:
        index: This process's index.
        count: How many ranks there are.
        device: Device from which tensors are sent to other ranks, and on which they arrive.
    """

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def find(cls, cpu: bool) -> Ranks:
        """The ranks of this run, from accelerate's ``PartialState``, which is created where there is none.

        A state that is there already is used as it is: a script that folds on the CPU and then heals on accelerators
        creates its own ``accelerate.PartialState()`` first.

        Args:
            cpu: Whether a new state communicates between CPUs (gloo) or by the accelerator's backend.
        """
        if processes() == 1:
            return cls()
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        atexit.register(_leave)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and messages."""
        return self.index == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait at the end of the ``with`` block until every rank is there; raise a failure of one on all of them."""
        try:
            yield
            self.gather()
        except Exception as error:
            if self.count > 1 and not getattr(error, "is_shared", False):
                self.gather(failure=error)
            raise

    def gather(self, value: Any = None, failure: Exception | None = None) -> list[Any]:
        """Exchange one value a rank; called by all ranks, which wait for each other here.

        Ranks meet nowhere else, so a rank that fails between two calls hands its failure to the next call of the
        others.

        Args:
            value: This rank's value; anything that can be pickled.
            failure: This rank's failure, to be raised on all ranks.

        Returns:
            The values of all ranks, in their order.

        Raises:
            Exception: The failure of the lowest rank that has one, with the same class and message on all ranks; one
                that cannot be pickled becomes a :class:`TensorfoldError`.
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
        """Overwrite tensors by those of one rank.

        Args:
            tensors: Contiguous tensors, with the same shapes and dtypes on all ranks, on any device.
            owner: Index of the rank whose values the others receive.
        """
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
        compute: Callable[[Item], Result],
        empty: Callable[[Item], Result],
    ) -> Iterator[tuple[Item, Result]]:
        """Divide items among the ranks, compute each on one of them, and yield all results on every rank.

        A rank's own results come as soon as they are computed, the others' at the end of each turn of :func:`schedule`,
        one at a time, so that the caller can free memory for the next.

        Args:
            items: The same items in the same order on all ranks.
            cost: Cost of an item, in any unit.
            compute: Computes the result of an item: anything that iterates over its tensors.
            empty: Makes such a result with contiguous tensors of the same shapes and dtypes, to receive it.

        Yields:
            An item and its result, in the same order on all ranks but for the rank's own.
        """
        for turn in schedule([cost(item) for item in items], self.count):
            own = {}
            for k in turn[self.index]:
                own[k] = compute(items[k])
                yield items[k], own[k]
            for owner, part in enumerate(turn):
                for k in part:
                    result = own.pop(k) if owner == self.index else empty(items[k])
                    self.gather()
                    self.broadcast(result, owner)
                    if owner != self.index:
                        yield items[k], result


def schedule(costs: Sequence[int], ranks: int) -> list[list[list[int]]]:
    """Assign items to ranks and turns, by longest processing time first (Graham 1969).

    In order of falling cost each item goes to the rank with the least load. In a turn a rank takes items while their
    costs together are at most that of the turn's dearest item, so that ranks wait little for each other at its end. A
    single rank has one item a turn, in the order given.

    Args:
        costs: Cost of each item, in any unit.
        ranks: How many ranks there are.

    Returns:
        ``[turn][rank]``: the indices of the items that a rank computes in a turn. Every index occurs once.
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
    """The error itself where it survives pickling; otherwise a :class:`TensorfoldError` with its class and message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return TensorfoldError(f"{type(error).__name__}: {error}")
    return error


def _leave() -> None:
    """Part from the other ranks while their threads can still be joined; left to the end, they abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
