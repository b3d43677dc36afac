"""The shape of the code, read from its syntax trees: who may import whom, and how long things are.

Every file of the application is looked at, none is left out. docs and the modules' docstrings say
what the folders are for; this file holds them to it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from helpers import ROOT

SCRIPTS = ("train", "evaluate")
GROUND_FLOOR = ("errors", "text", "files", "randomness")
# The folders of vit/ from the ground up: each may import those before it and itself
FOLDERS = (
    "config",
    "model",
    "runtime",
    "augment",
    "data",
    "checkpoints",
    "weights",
    "evaluation",
    "features",
    "figures",
    "runs",
    "training",
    "report",
)
TOP = len(FOLDERS) + 1  # the level of what people type: train.py, evaluate.py and vit/*.py

# Folders that take plain values and never see the configuration, and the files in them that do
PLAIN_FOLDERS = ("vit.model", "vit.augment", "vit.data", "vit.training")
BUILDERS = {
    "vit.training.prepare",
    "vit.training.start",
    "vit.training.reporting",
    "vit.training.explanation",
}

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 450
MAX_MODEL_LINES = 600  # the model is one file, to be read from top to bottom
MAX_FIT_LINES = 50
MAX_MEAN_LINE = 60  # characters
MAX_TRAINER_PARTS = 8
MAX_FILES_IN_VIT = 16
# Commands whose work is images or whole models, and that import torch at once
HELP_IMPORTS_TORCH = {"vit.shards", "vit.shrink"}
# The model's methods that read files of weights, which are loaded by modules above it
CONVENIENCES = {("vit.model.vision_transformer", "vit.weights.loading")}
MAX_LATE_IMPORTS = 3  # imports of vit inside functions, outside commands


@dataclass(frozen=True)
class Import:
    """One imported module of another file, by its full name."""

    target: str
    line: int
    late: bool  # inside a function

    def is_of(self, *packages: str) -> bool:
        """Whether it imports one of these packages or something in them."""
        return any(f"{self.target}.".startswith(f"{package}.") for package in packages)


@dataclass(frozen=True)
class Source:
    """A file of the application."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def name(self) -> str:
        """The module's full name: vit.data for vit/data/__init__.py."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def level(self) -> int:
        """The height of its folder: 0 for the ground floor."""
        if self.path.parent == ROOT / "vit":
            return 0 if self.path.stem in GROUND_FLOOR else TOP
        if self.path.parent == ROOT:
            return TOP
        return FOLDERS.index(self.path.parent.name) + 1

    @property
    def is_command(self) -> bool:
        """Whether it is typed: it ends in `if __name__ == "__main__"`."""
        conditions = [node.test for node in self.tree.body if isinstance(node, ast.If)]
        return any("__main__" in ast.unparse(condition) for condition in conditions)

    @cached_property
    def imports(self) -> list[Import]:
        """All that it imports, but for types alone (under `if TYPE_CHECKING`)."""
        return list(self.imports_below(self.tree, late=False))

    def imports_below(self, node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, late)
            elif isinstance(child, ast.ImportFrom):
                for target in self.targets_of(child):
                    yield Import(target, child.lineno, late)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from self.imports_below(child, late or function)

    def targets_of(self, statement: ast.ImportFrom) -> list[str]:
        """The modules that a `from … import …` loads: a name may itself be a module."""
        assert statement.level == 0, f"{self.path}:{statement.lineno}: a relative import"
        assert statement.module is not None
        names = [f"{statement.module}.{alias.name}" for alias in statement.names]
        modules = [name for name in names if is_module(name)]
        return modules if len(modules) == len(names) else [statement.module, *modules]

    @property
    def functions(self) -> list[ast.FunctionDef]:
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)]

    def where(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def lines_of(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


FILES = [Source(ROOT / f"{script}.py") for script in SCRIPTS]
FILES += [Source(path) for path in sorted((ROOT / "vit").rglob("*.py"))]
BY_NAME = {source.name: source for source in FILES}


def function_of(module: str, name: str) -> ast.FunctionDef:
    (function,) = [item for item in BY_NAME[module].functions if item.name == name]
    return function


def class_of(module: str, name: str) -> ast.ClassDef:
    nodes = ast.walk(BY_NAME[module].tree)
    (found,) = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name]
    return found


def test_every_folder_has_its_level_and_nothing_is_left_out():
    folders = {path.name for path in (ROOT / "vit").iterdir() if any(path.glob("*.py"))}
    assert folders == set(FOLDERS)
    depths = {len(source.path.relative_to(ROOT).parts) for source in FILES}
    assert depths == {1, 2, 3}  # no folder inside a folder
    assert all(name in BY_NAME for name in ("train", "evaluate", "vit", "vit.training.loop"))
    assert {f"vit.{name}" for name in GROUND_FLOOR} <= BY_NAME.keys()
    assert {source.level for source in FILES if source.is_command} == {TOP}


def test_the_top_of_the_package_is_easy_to_look_over():
    files = [source.path.name for source in FILES if source.path.parent == ROOT / "vit"]
    assert len(files) <= MAX_FILES_IN_VIT, files


def test_nothing_imports_what_stands_above_it():
    upward = [
        f"{source.where(item.line)} imports {item.target}"
        for source in FILES
        for item in source.imports
        if item.target in BY_NAME and BY_NAME[item.target].level > source.level
        if not (item.late and (source.name, item.target) in CONVENIENCES)
    ]
    assert upward == []


def test_no_circle_of_modules():
    graph = {
        source.name: [
            item.target
            for item in source.imports
            if not item.late and item.target in BY_NAME and item.target != source.name
        ]
        for source in FILES
    }
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name in finished:
            return
        for target in graph[name]:
            visit(target, (*path, name))
        finished.add(name)

    for name in graph:
        visit(name, ())
    assert finished == BY_NAME.keys()


def test_the_package_is_imported_inside_functions_by_commands_alone():
    """There it keeps --help free of torch; elsewhere it would hide a circle."""
    late = [
        source.where(item.line)
        for source in FILES
        if not source.is_command
        for item in source.imports
        if item.late and item.is_of("vit")
    ]
    assert len(set(late)) <= MAX_LATE_IMPORTS, late


def test_hydra_is_known_to_the_configuration_and_the_scripts_alone():
    users = {
        source.name
        for source in FILES
        for item in source.imports
        if item.is_of("hydra", "omegaconf")
    }
    assert {name for name in users if not name.startswith("vit.config.")} == {"train", "evaluate"}


def test_the_configuration_enters_no_constructor():
    plain = [
        source
        for source in FILES
        if source.name.startswith(PLAIN_FOLDERS) and source.name not in BUILDERS
    ]
    assert {f"vit.training.{name}" for name in ("loop", "step", "state", "optimizers")} <= {
        source.name for source in plain
    }
    users = [
        source.where(item.line)
        for source in plain
        for item in source.imports
        if item.is_of("vit.config")
    ]
    assert users == []


def test_functions_and_files_are_short():
    long_functions = [
        f"{source.where(function.lineno)} {function.name}: {lines_of(function)}"
        for source in FILES
        for function in source.functions
        if lines_of(function) > MAX_FUNCTION_LINES
    ]
    assert long_functions == []
    limits = {"vit.model.vision_transformer": MAX_MODEL_LINES}
    lengths = {source.name: len(source.text.splitlines()) for source in FILES}
    long_files = {
        name: length
        for name, length in lengths.items()
        if length > limits.get(name, MAX_FILE_LINES)
    }
    assert long_files == {}


def test_lines_have_room_to_breathe():
    lines = [line for source in FILES for line in source.text.splitlines() if line.strip()]
    assert sum(map(len, lines)) / len(lines) <= MAX_MEAN_LINE


def test_the_story_of_a_run_can_be_read():
    train = function_of("train", "train")
    inside = [node for node in ast.walk(train) if node is not train]
    closures = [node for node in inside if isinstance(node, ast.FunctionDef | ast.Lambda)]
    assert closures == []
    assert lines_of(train) <= MAX_FUNCTION_LINES
    assert lines_of(function_of("vit.training.loop", "fit")) <= MAX_FIT_LINES
    assert lines_of(function_of("vit.training.step", "__call__")) <= MAX_FUNCTION_LINES


def test_the_trainer_is_handed_few_objects():
    trainer = class_of("vit.training.loop", "Trainer")
    parts = [node.target.id for node in trainer.body if isinstance(node, ast.AnnAssign)]
    assert {"state", "step", "batches"} <= set(parts)
    assert len(parts) <= MAX_TRAINER_PARTS, parts
    assert not any(item.name == "__init__" for item in ast.walk(trainer) if hasattr(item, "name"))


HELP = """
import runpy, sys
module, is_script = sys.argv[1], sys.argv[1].endswith(".py")
sys.argv = [module, "--help"]
try:
    (runpy.run_path if is_script else runpy.run_module)(module, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "torchvision", "numpy", "matplotlib"} & sys.modules.keys()
assert not heavy, f"--help imports {heavy}"
"""
COMMANDS = {
    f"{source.name}.py" if source.name in SCRIPTS else source.name
    for source in FILES
    if source.is_command
}


@pytest.mark.parametrize("name", sorted(COMMANDS - HELP_IMPORTS_TORCH))
def test_help_is_answered_at_once(name):
    """It imports neither torch nor numpy, which take seconds."""
    command = [sys.executable, "-c", HELP, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout


def test_windows_is_told_to_use_wsl():
    code = "import os; os.name = 'nt'; import vit"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ImportError: vit needs Linux or macOS; on")
