"""Scheduling of test files over processes that goes on where one of them is lost."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

_HELD = 2  # tests that a worker must have to begin with the first of them, unless it was told that no more come


class Scheduling(LoadFileScheduling):
    """Scheduling of ``--dist loadfile`` after which no worker waits for ever.

    That of xdist 3.8 hands the files of a lost worker out again whole. One that was done holds no test to report, so
    the worker that it is given asks for nothing further, and keeps the last test that it has for want of a next one.
    """

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self._losses: set[str] = set()

    def is_first_loss(self, test: str) -> bool:
        """Whether no worker was lost at this test before; it counts as one from now on."""
        found = test not in self._losses
        self._losses.add(test)
        return found

    def remove_node(self, node: WorkerController) -> str | None:
        """Hand out again only the files of a worker that are not done."""
        files = self.assigned_work[node]
        for name in [name for name, tests in files.items() if all(tests.values())]:
            del files[name]
        return super().remove_node(node)

    def _reschedule(self, node: WorkerController) -> None:
        """Give the worker files until it can begin, and where there are none left say so.

        A worker that has only just been started, and has not collected its tests yet, is asked about again when it has.
        """
        if node not in self.registered_collections:
            return
        super()._reschedule(node)
        while self.workqueue and not node.shutting_down and self._pending_of(self.assigned_work[node]) < _HELD:
            self._assign_work_unit(node)
        if not self.workqueue and not node.shutting_down and self._pending_of(self.assigned_work[node]) < _HELD:
            node.shutdown()
