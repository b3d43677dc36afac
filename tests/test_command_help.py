"""--help of the commands answers at once: it imports no torch, which takes seconds."""

import subprocess
import sys

import pytest
from helpers import ROOT

SCRIPT = """
import sys
from vit.{name} import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("name", ["attention", "compare", "embed", "explore", "predict", "prune"])
def test_help_imports_no_torch(name):
    command = [sys.executable, "-c", SCRIPT.format(name=name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"python -m vit.{name}" in done.stdout
