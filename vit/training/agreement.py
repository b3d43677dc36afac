"""What the processes of a run decide together: when to save, to stop, and to read the losses.

Their clocks differ, and a signal may come to one of them alone, but a collective has to be entered
by all. They look at each other's wishes every few steps, after a step whose number all of them
know, and do the same from then on. A run of one process needs none of this.
"""

import time

import torch
from torch import Tensor

from vit.runtime.processes import Processes

# Between two looks: so many steps, and fewer where they take longer than so many seconds. The
# exchange costs a fraction of a millisecond, a signal is noticed only then
MOST_STEPS = 10
SECONDS = 1.0


class Agreement:
    """The decisions of the last look, the same in all processes.

    stopping, saving: whether to end, or to save, before the next step; showing: whether to read the
    losses now, for the screen.
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self.stopping = self.saving = self.showing = False
        # The number of finished steps of the last look, and of the next
        self.last_step: int | None = None
        self.next_step = 0
        self.last_time = time.monotonic()
        # Rows whose losses and correct predictions are of this process's images alone
        self.own_rows: list[Tensor] = []

    def is_due(self, step: int) -> bool:
        """Whether to look after `step` finished steps."""
        return step >= self.next_step

    def look(self, step: int, *, stopping: bool, saving: bool, showing: bool) -> None:
        """Decide with the others after `step` finished steps, where any process wishes it.

        A collective.
        """
        now = time.monotonic()
        steps = 0 if self.last_step is None else step - self.last_step
        seconds = (now - self.last_time) / max(1, steps)
        self.last_step, self.last_time = step, now

        # The slowest process's time, so that all have the same
        *flags, seconds = self.processes.largest(stopping, saving, showing, seconds)
        self.stopping, self.saving, self.showing = (bool(flag) for flag in flags)

        # The first step compiles, and says little of the others
        interval = 1 if steps == 0 else int(SECONDS / max(seconds, 1e-9))
        self.next_step = step + min(max(1, interval), MOST_STEPS)

    def add(self, row: Tensor) -> None:
        """Take up a step's row: (loss, correct predictions, gradient norm), float32 (3,)."""
        self.own_rows.append(row)

    def sum_losses(self) -> None:
        """Replace losses and correct predictions of the rows by their sums over all processes.

        In the rows themselves, which others hold too. A collective.
        """
        if not self.own_rows:
            return
        parts = [row[:2] for row in self.own_rows]
        sums = self.processes.sum(torch.stack(parts))
        torch._foreach_copy_(parts, list(sums))  # pyright: ignore[reportPrivateImportUsage]
        self.own_rows.clear()
