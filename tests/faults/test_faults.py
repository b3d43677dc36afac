"""The faults in short; `make test-faults` tries them all."""

import pytest
from faults.suite import FAULTS, run_fault
from faults.trials import Effort

# Waiting for a process that is silent takes its half minute
SHORT = [name for name in FAULTS if name != "processes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_faults_are_survived(name):
    for row in run_fault(name, Effort(quick=True, kills=0)):
        assert not row.failures, (row.fault, row.failures[:5])
        assert row.tried > 0
