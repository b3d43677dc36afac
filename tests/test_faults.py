"""The fault suite (tests/fault_suite.py), shortened; `make test-faults` runs it whole."""

import pytest
from fault_suite import FAULTS, run_fault

SHORT = [
    name for name in FAULTS if name != "processes"
]  # waiting for a process that is silent takes its half minute


@pytest.mark.parametrize("name", SHORT)
def test_faults_are_survived(name):
    for row in run_fault(name, quick=True):
        assert not row.failures, (row.fault, row.failures[:5])
        assert row.tried > 0
