"""How a process of a run of several ends."""

import subprocess
import sys

import pytest
from helpers import ROOT

from vit.runtime.launch import TORCHRUN_VARIABLES

# A thread of torch that comes back while the interpreter is torn down aborts the process too
PROGRAM = """
import atexit, os, sys
from vit.runtime.launch import end_after

class AbortsAtTeardown:
    def __del__(self, abort=os.abort):
        abort()

kept = AbortsAtTeardown()
atexit.register(print, "left in good order")
end_after(lambda: ENDING)
"""


@pytest.mark.parametrize("ending", ["75", "sys.exit(75)"])
@pytest.mark.parametrize("several", [False, True])
def test_one_of_several_processes_is_not_torn_down(several, ending):
    variables = dict.fromkeys(TORCHRUN_VARIABLES, "1") if several else {}
    command = [sys.executable, "-c", PROGRAM.replace("ENDING", ending)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "left in good order\n"
    # One process alone ends as any other program
    assert done.returncode == (75 if several else -6)
