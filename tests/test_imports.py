"""Imports go down only: what a module may know of the others."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "vit").rglob("*.py"))
# Modules that take plain values and know neither configuration nor data sets, so that each can be tested alone
LOW = ["model", "augment", "policies", "initialization", "optim", "checkpoint", "tracking", "runtime", "randomness",
       "transforms", "evaluation", "training", "data", "metrics", "corruptions"]

# What evaluate.py measures and draws beside accuracy; training knows nothing of it
REPORT = ["metrics", "corruptions", "findings", "report"]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_only_the_scripts_and_config_know_hydra(path):
    if path.stem != "config":
        assert not any(name.split(".")[0] in ("hydra", "omegaconf") for name in imported(path))


@pytest.mark.parametrize("name", LOW)
def test_low_modules_know_no_configuration(name):
    assert "vit.config" not in imported(ROOT / "vit" / f"{name}.py")


def test_the_loop_knows_no_data():
    assert not {"vit.data", "vit.transforms", "vit.augment"} & imported(ROOT / "vit" / "training.py")


@pytest.mark.parametrize("path", [ROOT / "train.py", *(path for path in MODULES if path.stem not in REPORT)],
                         ids=lambda path: path.stem)
def test_training_knows_no_report(path):
    assert not {f"vit.{name}" for name in REPORT} & imported(path)


def test_help_and_configuration_need_no_torch():
    code = "import sys, train, evaluate; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_files_stay_short_enough_to_read():
    lengths = {path.stem: len(path.read_text().splitlines()) for path in MODULES}
    assert lengths["model"] <= 400
    # What one process needs to train. Foreign formats, commands (python -m vit.export), what a report is made of, pictures and
    # cards, several processes and sweeps are a file each, read one at a time.
    apart = [*REPORT, "figures", "card", "distributed", "sweep"]
    core = [path for path in MODULES if path.parent.name != "weights" and "__main__" not in path.read_text()
            and path.stem not in apart]
    assert sum(len(path.read_text().splitlines()) for path in core) <= 5000
    loop = next(node for node in ast.walk(ast.parse((ROOT / "vit" / "training.py").read_text()))
                if isinstance(node, ast.FunctionDef) and node.name == "fit")
    assert loop.end_lineno - loop.lineno < 120
