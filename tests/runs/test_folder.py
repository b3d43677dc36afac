"""One run, one folder: its lock, its log, and what result.json says of how it ended."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT

from vit.errors import CheckpointError, ConfigError, DataError, Stopped, TrainingFailed
from vit.runs.folder import MAX_REASON, RunFolder, wait_until_free


@pytest.fixture(autouse=True)
def _errors_of_the_log():
    """Starting a log changes a setting of the whole process."""
    yield
    logging.raiseExceptions = True


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


def read_result(path):
    return json.loads((path / "result.json").read_text())


def leave_checkpoint(path):
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    (path / "checkpoints" / "last.safetensors").write_bytes(b"")


def begin(run):
    run.begin("# python train.py\nseed: 1\n", lambda: {"steps": 7, "val_top1": 0.5})


def end_in(error, run, *before):
    """A run that begins, does something and ends in an error."""
    with run.outcome():
        begin(run)
        for action in before:
            action()
        raise error


def test_a_folder_has_one_holder_who_is_named(path):
    holder = RunFolder(path)
    with pytest.raises(ConfigError, match=rf"{path}: in use .*process {os.getpid()} on .*hydra"):
        RunFolder(path)
    holder.lock_file.close()
    RunFolder(path)


def test_the_lock_ends_with_its_process(path):
    code = (
        "import sys; from pathlib import Path; from vit.runs.folder import RunFolder; "
        "folder = RunFolder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {holder.pid} on"):
        RunFolder(path)
    holder.kill()
    holder.communicate()
    RunFolder(path)


def test_waiting_for_another_process_to_let_go(path):
    wait_until_free(path, 0.0)  # there is no folder yet
    holder = RunFolder(path)
    started = time.monotonic()
    wait_until_free(path, 0.3)
    assert time.monotonic() - started >= 0.3
    threading.Timer(0.2, holder.lock_file.close).start()
    wait_until_free(path, 30.0)
    assert holder.lock_file.closed


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(path, monkeypatch, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("vit.files.fcntl.flock", refuse)
    run, lines = RunFolder(path), []
    run.start_log(lines.append)
    assert len(lines) == 1
    assert f"{path} has no locks" in lines[0]
    assert lines[0] in (path / "train.log").read_text()
    # Nobody can tell whether another process is there
    started = time.monotonic()
    wait_until_free(path, 10.0)
    assert time.monotonic() - started < 5


def test_a_folder_that_can_not_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run: .*hydra\.run\.dir"):
        RunFolder(tmp_path / "file" / "run")


def test_a_path_below_the_current_folder_is_shown_from_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(RunFolder(tmp_path / "outputs" / "x").path) == "outputs/x"


def test_another_run_is_never_overwritten(path):
    run = RunFolder(path)
    run.require_empty()
    (path / "job.json").write_text("{}")  # a sweep's note of this very run
    run.require_empty()
    begin(run)
    with pytest.raises(ConfigError, match=f"resume={path}"):
        run.require_empty()


def test_a_resume_needs_a_checkpoint(path):
    run = RunFolder(path)
    assert run.kept_checkpoint() == ""
    with pytest.raises(CheckpointError, match=f"resume={path}: no checkpoint"):
        run.require_checkpoint()
    leave_checkpoint(path)
    run.require_checkpoint()
    assert f"resume={path}" in run.kept_checkpoint()


def refuse(path, writes):
    with RunFolder(path, writes=writes).outcome():
        raise ConfigError("mistaken")


@pytest.mark.parametrize("writes", [True, False])
def test_a_refused_command_leaves_no_empty_folder(path, writes):
    path.mkdir()
    with pytest.raises(ConfigError):
        refuse(path, writes)
    assert not path.exists()


def test_another_process_leaves_the_folder_of_the_first_one(path):
    first = RunFolder(path)
    with pytest.raises(ConfigError):
        refuse(path, writes=False)
    assert first.path.exists()


def test_a_run_that_failed_says_why_and_how_far_it_came(path, log_lines):
    with pytest.raises(TrainingFailed):
        end_in(TrainingFailed("the loss is nan"), RunFolder(path))
    assert read_result(path) == {
        "status": "failed",
        "reason": "the loss is nan",
        "steps": 7,
        "val_top1": 0.5,
    }
    assert log_lines == ["failed: the loss is nan"]


def test_a_run_that_was_stopped_says_how_to_resume_it(path):
    error = Stopped("stopped by SIGTERM")
    with pytest.raises(Stopped, match=f"SIGTERM; resume it by resume={path}"):
        end_in(error, RunFolder(path), lambda: leave_checkpoint(path))
    assert read_result(path)["status"] == "stopped"
    assert f"resume={path}" in read_result(path)["reason"]


def test_a_run_that_met_a_damaged_image_says_how_to_go_on(path):
    message = "dog/7.jpg: not a readable image"
    run = RunFolder(path)
    with pytest.raises(DataError, match=rf"^{message}$"):
        end_in(DataError(message), run)
    with pytest.raises(DataError, match=rf"^{message}; .* is kept: resume it by resume={path}$"):
        end_in(DataError(message), run, lambda: leave_checkpoint(path))
    assert f"resume={path}" in read_result(path)["reason"]


def test_a_bug_is_noted_and_stays_what_it_is(path):
    error = KeyError("planted")
    with pytest.raises(KeyError) as raised:
        end_in(error, RunFolder(path))
    assert raised.value is error
    assert read_result(path)["status"] == "failed"
    assert read_result(path)["reason"] == "KeyError: 'planted'"


@pytest.mark.parametrize("error", [TrainingFailed("x" * 10_000), RuntimeError("x" * 10_000)])
def test_a_reason_of_ten_thousand_characters_is_cut(path, error):
    with pytest.raises(type(error)):
        end_in(error, RunFolder(path))
    reason = read_result(path)["reason"]
    assert len(reason) == MAX_REASON
    assert reason.endswith("x…")


def test_a_command_that_was_refused_at_once_leaves_no_folder(tmp_path):
    path = tmp_path / "outputs" / "run"
    with pytest.raises(ConfigError), RunFolder(path).outcome():
        raise ConfigError("optimizer.lr must be positive")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_command_leaves_the_result_of_the_run_that_stands_here(path):
    first = RunFolder(path)
    begin(first)
    first.write_result(status="finished", reason="all steps done")
    first.lock_file.close()
    with pytest.raises(ConfigError), RunFolder(path).outcome() as run:
        run.require_empty()
    assert read_result(path) == {"status": "finished", "reason": "all steps done"}


def test_what_is_no_run_is_left_as_it_was(path):
    """As the folder of many runs, or the current one, where resume=$RUN is given without a RUN."""
    (path / "one of many").mkdir(parents=True)
    with pytest.raises(CheckpointError), RunFolder(path).outcome() as run:
        run.require_checkpoint()
    assert [entry.name for entry in path.iterdir()] == ["one of many"]


def test_a_full_disk_does_not_hide_the_reason(path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vit.runs.folder.write_json", full)
    with pytest.raises(TrainingFailed, match="the loss is nan"):
        end_in(TrainingFailed("the loss is nan"), RunFolder(path))


def test_other_processes_write_nothing_and_follow_the_first(tmp_path):
    first = RunFolder(tmp_path / "first")
    (tmp_path / "own").mkdir()  # Hydra has made it
    other = RunFolder(tmp_path / "own", writes=False)
    other.follow(str(first.path))
    assert other.path == first.path
    assert not (tmp_path / "own").exists()
    with pytest.raises(TrainingFailed):
        end_in(TrainingFailed("the loss is nan"), other)
    other.write_result(status="finished")
    assert first.contents() == set()


def test_lines_of_the_log_reach_the_screen_and_with_their_time_the_file(path):
    shown = []
    RunFolder(path).start_log(shown.append)
    logging.getLogger("vit").info("hello")
    assert shown == ["hello"]
    line = (path / "train.log").read_text()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d hello\n", line)


def test_the_log_of_other_processes_is_silent(path):
    shown = []
    RunFolder(path, writes=False).start_log(shown.append)
    logging.getLogger("vit").info("hello")
    assert shown == []
    assert not path.exists()
