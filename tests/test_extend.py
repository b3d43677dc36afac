"""docs/extend.md does what it says: its blocks, applied to a copy of the project, work."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, error_line, read_result, run
from safetensors.torch import load_file

PAGE = ROOT / "docs" / "extend.md"
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LOCATION = re.compile(r"# (?P<file>[\w/.]+)(, (?P<where>above|in|after) (?P<name>\w+))?")

# Seconds instead of minutes. The schedule does not depend on the length of the run, so that a run
# that is resumed for more steps must end as one that was never stopped
SMALL = [
    "model.num_layers=2",
    "model.hidden_size=48",
    "schedule=constant",
    "schedule.warmup=2",
    "schedule.cooldown=null",
]


@dataclass(frozen=True)
class Block:
    """A code block of the page: what to put into a file, and where."""

    file: str
    where: str | None  # above, in, after; None: a new file
    name: str | None
    text: str

    @classmethod
    def of(cls, text: str) -> "Block":
        location, _, code = text.partition("\n")
        match = LOCATION.fullmatch(location)
        assert match is not None, f"the block does not say where it goes: {location}"
        return cls(match["file"], match["where"], match["name"], code)

    def apply(self, project: Path) -> None:
        path = project / self.file
        if self.where is None:
            assert not path.exists(), path
            path.write_text(self.text, encoding="utf-8")
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(self.inserted(lines)), encoding="utf-8")

    def inserted(self, lines: list[str]) -> list[str]:
        """The lines of the file with the block among them."""
        number = self.line_of_name(lines)
        before, line, after = lines[:number], lines[number], lines[number + 1 :]
        if self.where == "above":
            return [*before, self.text, "\n\n", line, *after]
        if self.where == "in":
            # The table may be written on one line or on many
            start, brace, rest = line.partition("{")
            assert brace, line
            return [*before, start, brace, "\n", self.text, rest, *after]
        indentation = line[: len(line) - len(line.lstrip())]
        return [*before, line, indentation, self.text, *after]

    def line_of_name(self, lines: list[str]) -> int:
        """The number of the one line that begins with the name, as a definition or a key does."""
        name = re.compile(rf"\s*{self.name}\b\s*(:|=)")
        numbers = [number for number, line in enumerate(lines) if name.match(line)]
        assert len(numbers) == 1, f"{self.file}: {self.name} begins {len(numbers)} lines"
        return numbers[0]


def fenced(*languages: str) -> list[str]:
    """The contents of the page's code blocks in these languages."""
    text = PAGE.read_text(encoding="utf-8")
    return [content for language, content in FENCED.findall(text) if language in languages]


def command(words: str) -> list[str]:
    """The one command of the page that contains these words, without `python`."""
    lines = [line for block in fenced("bash") for line in block.splitlines()]
    (line,) = [line for line in lines if words in line]
    python, *arguments = shlex.split(line)
    assert python == "python"
    return arguments


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with all blocks of the page applied."""
    copy = tmp_path_factory.mktemp("project")
    for folder in ("vit", "conf"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in ("train.py", "evaluate.py", "pyproject.toml"):
        shutil.copy(ROOT / file, copy)
    for text in fenced("python", "yaml"):
        Block.of(text).apply(copy)
    return copy


@pytest.fixture(scope="module")
def nadam_run(project) -> Path:
    """The run folder of the new optimizer: trained and resumed by the commands of the page."""
    succeed(project, command("optimizer=nadam"), *SMALL)
    output = succeed(project, command("resume="))
    assert "after step 20" in output
    return project / "outputs" / "nadam"


def succeed(project: Path, arguments: list[str], *more: str) -> str:
    """The output of `python arguments… more…` in the project, which must end well."""
    done = run_in(project, *arguments, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_in(project: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script of the copy."""
    return run(str(project / script), *arguments, cwd=project, env={"OMP_NUM_THREADS": "1"})


def test_the_code_on_the_page_obeys_the_rules_of_the_project(project):
    files = sorted({Block.of(text).file for text in fenced("python")})
    assert len(files) >= 3
    ruff = [sys.executable, "-m", "ruff", "check", "--quiet", *files]
    subprocess.run(ruff, cwd=project, check=True)


def test_the_optimizer_resumes_to_the_same_bits(project, nadam_run):
    words = command("optimizer=nadam")
    unstopped = [word for word in words if not word.startswith(("train.steps", "hydra.run.dir"))]
    succeed(project, unstopped, *SMALL, "train.steps=30", "hydra.run.dir=outputs/unstopped")

    last = "checkpoints/last.safetensors"
    resumed = load_file(nadam_run / last)
    expected = load_file(project / "outputs" / "unstopped" / last)
    assert resumed.keys() == expected.keys()
    assert any(name.endswith("/mu_product") for name in resumed)  # NAdam's own
    assert all(resumed[name].equal(expected[name]) for name in expected)


def test_the_new_key_belongs_to_the_new_optimizer(project, nadam_run):
    assert "momentum_decay: 0.004" in (nadam_run / "config.yaml").read_text()
    done = run_in(project, "train.py", "experiment=digits", "optimizer.momentum_decay=0.1")
    line = error_line(done)
    assert "optimizer.momentum_decay" in line
    assert "nadam" in line


def test_the_data_set_is_trained_on(project):
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in {"train": 128, "val": 32, "test": 32}.items():
        shape = (count, 28, 28, 3)
        arrays[f"{split}_images"] = generator.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % 8)[:, None]
    (project / "data" / "medmnist").mkdir(parents=True)
    np.savez(project / "data" / "medmnist" / "bloodmnist.npz", **arrays)

    output = succeed(project, command("data=bloodmnist"), *SMALL, "train.epochs=2")
    assert read_result(project / "outputs" / "bloodmnist")["status"] == "finished"
    # Nothing is held out of train, since the data set has a validation split
    for split, count in {"train": 128, "val": 32, "test": 32}.items():
        assert f"BloodMNIST {split}, {count} images" in output


def test_a_missing_data_set_is_reported_in_one_line(project, tmp_path):
    root = f"data.root={tmp_path}"
    done = run_in(project, "train.py", "data=bloodmnist", root, "model=vit_ti4")
    assert str(tmp_path) in error_line(done)


def test_the_measurement_is_in_evaluation_json(project, nadam_run):
    output = succeed(project, command("selective=true"))
    numbers = json.loads((nadam_run / "evaluation.json").read_text())
    assert 0 <= numbers["selective_top1"] <= 1
    assert "most confident 80 %" in output
