"""benchmarks/distillation.py in miniature."""

import re
import subprocess
from types import SimpleNamespace

import pytest
from helpers import TINY, read_result, run

from benchmarks import distillation

SHORT = [*TINY[2:4], "train.steps=3", "runtime.threads=1"]


@pytest.mark.long
def test_students_with_and_without_a_teacher_are_compared(tmp_path, monkeypatch, capsys):
    started = []

    def run_forked(command, cwd, check, stdout):
        _, script, *arguments = command
        started.append(arguments)
        done = run(script, *arguments, cwd=cwd)
        assert check
        assert done.returncode == 0, done.stderr

    forked = SimpleNamespace(run=run_forked, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(distillation, "subprocess", forked)
    monkeypatch.setattr(distillation, "TEACHER", [*distillation.TEACHER, *SHORT])
    options = ["--seeds", "2", "--steps", "3", "--out", str(tmp_path), "--", "runtime.threads=1"]
    monkeypatch.setattr("sys.argv", ["distillation.py", *options])

    distillation.main()
    output = capsys.readouterr().out
    names = list(distillation.ways(tmp_path, 1, 1.0))
    rows = dict(re.findall(r"^\| (\S.*?) \| (.*) \|$", output, re.MULTILINE))
    assert set(names) < rows.keys()
    # The teacher and two of each student, and none of them again
    assert len(started) == 1 + 2 * len(names)
    distillation.main()
    assert len(started) == 1 + 2 * len(names)

    alone, soft = (
        [read_result(tmp_path / f"{name}_seed{seed}") for seed in (0, 1)]
        for name in ("alone", "soft")
    )
    ahead = sum(a["test_top1"] > b["test_top1"] for a, b in zip(soft, alone, strict=True))
    assert f"{ahead} of 2" in rows["soft"]
    assert " of 2" not in rows["alone"]
    # As many more steps as a student with a teacher costs more
    longer = read_result(tmp_path / "alone_at_its_cost_seed0")
    ratio = soft[0]["pflops"] / alone[0]["pflops"]
    assert longer["pflops"] / alone[0]["pflops"] == pytest.approx(ratio, rel=0.1)
    assert ratio > 2
