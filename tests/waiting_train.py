"""train.py, which waits after a step until a signal comes, so that it cannot end before.

WAIT_AFTER_STEP=12 python tests/waiting_train.py ARGUMENTS…

Of several processes the last one waits, and the others wait for it.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from vit.training.loop import Trainer

STEP = int(os.environ["WAIT_AFTER_STEP"])
# Whoever was to send the signal may have been killed
END = time.monotonic() + 600
save_or_stop = Trainer.save_or_stop


def wait_and_go_on(trainer: Trainer) -> None:
    is_last = trainer.processes.rank == trainer.processes.count - 1
    while is_last and trainer.state.progress.step >= STEP and not trainer.stop:
        assert time.monotonic() < END, "no signal has come"
        time.sleep(0.01)
    save_or_stop(trainer)


Trainer.save_or_stop = wait_and_go_on
# Not by runpy, which changes the script's name, by which the processes of a run are started
train = Path(__file__).parents[1] / "train.py"
exec(compile(train.read_text(), train, "exec"))
