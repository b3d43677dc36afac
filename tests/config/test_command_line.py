"""Hydra's command line: every mistake in one line, the exit codes, paths of any kind."""

import atexit
import errno
import re
import subprocess
import sys

import pytest
from composing import composed
from helpers import ROOT
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vit.config.command_line import (
    AtSweepEnd,
    check_override,
    prepare_arguments,
    quote_paths,
    run_main,
    task_errors,
)
from vit.config.config import Config
from vit.errors import CheckpointError, ConfigError, DataError, Stopped, TrainingFailed


@pytest.fixture(autouse=True)
def _arguments(monkeypatch):
    """run_main changes what Hydra reads: the arguments and two variables of the environment."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", "seed=1"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")


@pytest.mark.parametrize(
    "argument",
    [
        "experiment=digits'",
        "model=[a]",
        "model=5",
        "model={a: 1}",
        "model=true",
        "train.batch_size",
        "optimizer.lr=(",
        "data.root=a b=c",
        "",
    ],
)
def test_overrides_that_hydra_would_answer_with_a_traceback_are_refused(argument):
    with pytest.raises(ConfigError, match=f"^{re.escape(argument)}: expected "):
        check_override(argument)


@pytest.mark.parametrize(
    "argument",
    [
        "experiment=digits",
        "experiment=null",
        "model=vit_s4,vit_b16",
        "~experiment",
        "+search=digits",
        "optimizer.lr=1e-3,1e-4",
        "optimizer.betas=[0.9,0.99]",
        "model.pruned_heads={0: [1]}",
        "data.mean=[0.5]",
        "hydra/launcher=joblib",
        "data.root='it, too'",
        "train.steps=",
    ],
)
def test_other_overrides_pass(argument):
    check_override(argument)


def test_an_option_may_stand_between_overrides():
    arguments = ["seed=1", "-m", "train.steps=1,2", "--cfg", "job", "seed=2"]
    expected = ["-m", "--cfg", "job", "seed=1", "train.steps=1,2", "seed=2"]
    assert prepare_arguments(arguments) == expected


@pytest.mark.parametrize(
    "value",
    [
        "/a b/ü(1)",
        "/it's",
        "/x=1,y[2]#3",
        "~/pictures",
        "/back\\slash",
        "/end\\",
        "/both\\'",
        "C:{x}",
        "$HOME/&",
    ],
)
def test_any_path_survives_hydras_grammar(value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    quoted = quote_paths([f"data.root={value}"])
    assert composed(*quoted).data.root == value.replace("~", "/home/me")


def test_paths_that_are_quoted_or_swept_are_left_alone():
    arguments = ["data.root='x y'", "resume=null", "seed=1", "data.root="]
    assert quote_paths(arguments) == arguments
    assert quote_paths(["-m", "data.root=a,b"]) == ["-m", "data.root=a,b"]
    assert quote_paths(["--multirun", "data.root=a"]) == ["--multirun", "data.root='a'"]


def test_a_resumed_runs_folder_is_the_run_folder():
    assert prepare_arguments(["resume=/r"]) == ["resume='/r'", "hydra.run.dir='/r'"]
    assert prepare_arguments(["resume=null"]) == ["resume=null"]
    arguments = ["resume=auto", "hydra.run.dir=x"]
    assert prepare_arguments(arguments) == ["resume=auto", "hydra.run.dir='x'"]
    arguments = ["resume=r/", "hydra.run.dir=./r"]
    assert prepare_arguments(arguments) == ["resume='r/'", "hydra.run.dir='./r'"]
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir='x' beside resume='r'"):
        prepare_arguments(["resume=r", "hydra.run.dir=x"])


def test_a_checkpoint_is_no_run_to_resume(tmp_path):
    file = tmp_path / "last.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match=rf"{file}' is a file; .*folder"):
        prepare_arguments([f"resume={file}"])


def test_flags_are_hydras_affair():
    assert prepare_arguments(["--help", "-m", "--cfg", "job"]) == ["--help", "-m", "--cfg", "job"]


def fail(error):
    """A Hydra main that ends in an error before its task, or in that of a sweep."""

    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("optimizer.lr is wrong"), 2),
        (DataError("x.jpg: damaged"), 2),
        (Stopped("the sweep was stopped"), 75),
    ],
)
def test_errors_before_the_task_end_in_one_line_and_their_code(capsys, error, code):
    assert run_main(fail(error), Config) == code
    assert capsys.readouterr().err == f"train.py: {error}\n"


def test_an_override_that_can_not_be_parsed_ends_before_hydra(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "experiment=digits'"])
    called = []
    assert run_main(lambda: called.append(1), Config) == 2
    assert capsys.readouterr().err.startswith("train.py: experiment=digits': ")
    assert called == []


def test_a_run_folder_that_hydra_can_not_make_is_the_users_mistake(capsys):
    error = PermissionError(errno.EACCES, "Permission denied", "/proc/run")
    assert run_main(fail(error), Config) == 2
    line = capsys.readouterr().err
    assert line.startswith("train.py: /proc/run: ")
    assert "hydra.run.dir=" in line


def test_so_is_the_folder_of_a_sweep(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0,1"])
    error = PermissionError(errno.EACCES, "Permission denied", "/proc/sweep")
    assert run_main(fail(error), Config) == 2
    assert "hydra.sweep.dir=" in capsys.readouterr().err


def test_a_search_without_a_result_is_no_bug(capsys):
    """The table below says why each job failed. Another ValueError keeps its traceback."""
    nothing = ValueError("No trials are completed yet.")  # Optuna's
    assert run_main(fail(nothing), Config) == 3
    assert capsys.readouterr().err.endswith(": no job of the search has a result\n")
    with pytest.raises(ValueError, match="of a bug"):
        run_main(fail(ValueError("of a bug")), Config)


def test_success_and_what_hydra_is_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "resume=/r r"])
    seen = []
    assert run_main(lambda: seen.extend(sys.argv), Config) == 0
    assert seen == ["train.py", "resume='/r r'", "hydra.run.dir='/r r'"]


def test_a_bug_before_the_task_keeps_its_traceback():
    with pytest.raises(KeyError, match="planted"):
        run_main(fail(KeyError("planted")), Config)


def task(error, wait_for_first=None):
    """The body of a Hydra main that ends in an error."""
    with task_errors(wait_for_first):
        raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("optimizer.lr is wrong"), 2),
        (DataError("x.jpg: damaged"), 2),
        (CheckpointError("last.safetensors: damaged"), 2),
        (TrainingFailed("the loss is nan"), 3),
        (Stopped("stopped by SIGTERM"), 75),
    ],
)
def test_errors_of_the_task_end_in_one_line_and_their_code(capsys, error, code):
    with pytest.raises(SystemExit) as exited:
        task(error)
    assert exited.value.code == code
    assert exited.value.__suppress_context__
    assert capsys.readouterr().err == f"train.py: {error}\n"


@pytest.mark.parametrize(
    ("error", "first_reports", "reported_here"),
    [
        (ConfigError("wrong"), True, False),
        (ConfigError("wrong"), False, False),
        (TrainingFailed("nan"), True, False),
        # Out of memory in this process alone
        (TrainingFailed("out of memory"), False, True),
    ],
)
def test_another_process_leaves_to_the_first_what_both_end_in(
    capsys, error, first_reports, reported_here
):
    waited = []
    with pytest.raises(SystemExit) as exited:
        task(error, wait_for_first=lambda: waited.append(error) or first_reports)
    assert exited.value.code == error.exit_code
    assert waited == [error]
    assert (str(error) in capsys.readouterr().err) == reported_here


def test_another_process_speaks_at_once_of_its_own_files_and_never_of_a_signal(capsys):
    with pytest.raises(SystemExit):
        task(Stopped("stopped by SIGTERM"), wait_for_first=fail(AssertionError("waited")))
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        task(DataError("x.jpg: damaged"), wait_for_first=fail(AssertionError("waited")))
    assert "x.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOENT, "No such file or directory", "x.jpg"),
        HydraException("planted"),
        OmegaConfBaseException("planted"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_of_a_kind_that_hydra_raises_is_not_taken_for_a_mistake(error, capsys):
    """An OSError of the task must not be told as "can't make this run folder"."""
    with pytest.raises(RuntimeError, match=type(error).__name__) as raised:
        run_main(lambda: task(error), Config)
    assert raised.value.__cause__ is error
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [KeyError("planted"), ValueError("planted"), KeyboardInterrupt()])
def test_any_other_bug_stays_what_it_is(error):
    with pytest.raises(type(error)) as raised:
        task(error)
    assert raised.value is error


SCRIPT = """
import sys
from vit.config.command_line import run_main, task_errors
from vit.config.config import Config

def main():
    with task_errors():
        {statement}

sys.exit(run_main(main, Config))
"""


@pytest.mark.parametrize(
    ("statement", "code", "part"),
    [
        ("pass", 0, ""),
        ("raise KeyError('planted')", 1, "KeyError: 'planted'"),
        ("open('/nowhere/x')", 1, "FileNotFoundError"),
    ],
)
def test_exit_codes_of_a_process(tmp_path, statement, code, part):
    (tmp_path / "script.py").write_text(SCRIPT.format(statement=statement))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert part in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


def test_the_table_is_made_when_the_driver_of_a_sweep_ends(tmp_path, monkeypatch):
    registered = []
    monkeypatch.setattr(atexit, "register", lambda *call: registered.append(call))

    def call(folder):
        """Makes the table."""

    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    callback = AtSweepEnd(call)
    callback.on_multirun_start(config, config_name="train")
    # Hydra would not call this after a job that failed
    callback.on_multirun_end(config)
    assert registered == [(call, tmp_path)]


def test_hydra_is_told_to_make_the_table():
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--cfg", "hydra", "-p", "hydra.callbacks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert f"_target_: vit.config.command_line.{AtSweepEnd.__name__}" in done.stdout
    assert "path: vit.runs.sweep_table.print_summary" in done.stdout
