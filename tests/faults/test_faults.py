"""The faults in short; `make test-faults` tries them all."""

import pytest
from faults.suite import FAULTS, run_fault
from faults.trials import Effort

# A sweep's jobs are started from scratch, and a silent process is waited for half a minute; both
# are tried in tests/command_line and tests/runtime in a shorter way
SHORT = [name for name in FAULTS if name not in ("sweeps", "processes")]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_faults_are_survived(name):
    for row in run_fault(name, Effort(quick=True, kills=0)):
        assert not row.failures, (row.fault, row.failures[:5])
        assert row.tried > 0
