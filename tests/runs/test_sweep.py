"""The jobs of a sweep: their folders, their processes, and what they share of a machine."""

import errno
import json
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from helpers import ROOT
from omegaconf import OmegaConf
from sweep_folders import write_finished, write_job

from vit.errors import ConfigError, Stopped, TrainingFailed
from vit.runs import sweep
from vit.runs.sweep import gpus_of_slot, job_slot, run_job, train_job
from vit.runs.sweep_table import collect, print_summary, table


def test_a_finished_job_is_left_alone_and_others_begin_anew(tmp_path, monkeypatch):
    begun = []

    def note(folder, overrides, gpu=None):
        begun.append(folder.name)

    monkeypatch.setattr(sweep, "train_job", note)
    write_finished(tmp_path / "0", ["seed=1"], 0.5, 0.5)
    write_job(tmp_path / "1", ["seed=2"], exit_code=-9, status="failed", val_top1=None)
    assert run_job(tmp_path / "0", ["seed=1"]) == 0.5
    # Not NaN, at which Optuna's sweeper ends with a traceback
    assert run_job(tmp_path / "1", ["seed=2"], searching=True) is None
    assert run_job(tmp_path / "2", ["seed=3"]) is None
    assert begun == ["1", "2"]
    # Or a crash would show what an earlier start has left
    assert not (tmp_path / "1" / "result.json").exists()


def test_the_folder_of_another_job_is_refused(tmp_path):
    write_finished(tmp_path / "0", ["seed=1"], 0.5, 0.5)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/0: .*hydra\.sweep\.dir"):
        run_job(tmp_path / "0", ["seed=7"])


def test_a_search_ends_where_nothing_is_held_out(tmp_path):
    """Every job would be without the number that it maximizes."""
    write_finished(tmp_path / "0", ["seed=1"], None, 0.5)
    assert run_job(tmp_path / "0", ["seed=1"]) is None
    with pytest.raises(ConfigError, match=r"held out; .*data\.val_fraction"):
        run_job(tmp_path / "0", ["seed=1"], searching=True)


def test_a_failed_job_does_not_end_a_search():
    """By Optuna's sweeper's default the first one does."""
    files = sorted((ROOT / "conf" / "search").glob("*.yaml"))
    assert files
    for file in files:
        assert OmegaConf.load(file).hydra.sweeper.max_failure_rate == 1, file.name


def test_a_sweep_may_go_on_with_another_number_of_jobs_at_once(tmp_path):
    write_finished(tmp_path / "0", ["jobs_at_once=4", "seed=1"], 0.5, 0.5)
    for settings in (["jobs_at_once=2"], [], ["search=digits", "jobs_at_once=1"]):
        assert run_job(tmp_path / "0", ["seed=1", *settings]) == 0.5
    # A single run refuses it
    assert table(collect(tmp_path)).splitlines()[-1] == "best: python train.py seed=1"


def test_so_many_jobs_work_at_once_each_in_a_slot_of_its_own(tmp_path):
    working, most, taken = set(), [], []

    def work():
        with job_slot(tmp_path, 2) as number:
            assert number not in working
            working.add(number)
            most.append(len(working))
            taken.append(number)
            time.sleep(0.2)
            working.remove(number)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), max(most), set(taken)) == (5, 2, {0, 1})


def test_without_a_limit_there_are_no_slots(tmp_path):
    with job_slot(tmp_path, None) as number:
        assert number is None
    assert list(tmp_path.iterdir()) == []


def test_jobs_are_not_counted_without_locks(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("vit.files.fcntl.flock", refuse)
    line = rf"^jobs_at_once=2: .*{tmp_path} has no locks .*hydra\.sweep\.dir"
    with pytest.raises(ConfigError, match=line), job_slot(tmp_path, 2):
        pass


class FakeChild:
    """A child process that ends at once; notes the commands and environments of all."""

    started: list

    def __init__(self, command, env, **others):
        self.started.append((command, env))

    def wait(self):
        return 0


@pytest.fixture
def started(monkeypatch):
    FakeChild.started = []
    monkeypatch.setattr(sweep.subprocess, "Popen", FakeChild)
    return FakeChild.started


@pytest.mark.parametrize(
    ("visible", "gpus", "slots", "expected"),
    [
        # Not set: the machine's, shared out, and shared where there are fewer than jobs
        (None, 4, 2, ["0,1", "2,3"]),
        (None, 3, 2, ["0", "1"]),
        (None, 1, 2, ["0", "0"]),
        (None, 2, 3, ["0", "1", "0"]),
        (None, 0, 2, [None, None]),
        # A scheduler has given this process some of the machine's
        ("4,6", 8, 2, ["4", "6"]),
        ("GPU-1, GPU-2", 8, 3, ["GPU-1", "GPU-2", "GPU-1"]),
        # None is to be used
        ("", 8, 2, ["", ""]),
        ("-1", 8, 2, ["-1", "-1"]),
    ],
)
def test_jobs_at_once_share_the_gpus_out(
    tmp_path, monkeypatch, started, visible, gpus, slots, expected
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(sweep, "count_gpus", lambda: gpus)
    sweep.remember_visible_gpus()
    for slot in range(slots):
        train_job(tmp_path, ["seed=1"], gpus_of_slot(slot, slots))
    assert [env.get("CUDA_VISIBLE_DEVICES") for _, env in started] == expected


def test_a_job_alone_sees_all_gpus(tmp_path, monkeypatch, started):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    train_job(tmp_path, ["seed=1"])
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started] == ["4,6"]


@pytest.mark.parametrize(
    ("driver_sees", "expected"), [(None, ["0", "1"]), ("2,5", ["2", "5"]), ("", [])]
)
def test_gpus_that_the_launcher_hides_are_those_of_the_sweep(monkeypatch, driver_sees, expected):
    """submitit_local empties CUDA_VISIBLE_DEVICES in its jobs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if driver_sees is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", driver_sees)
    monkeypatch.delenv(sweep.VISIBLE_TO_THE_SWEEP, raising=False)
    monkeypatch.setattr(sweep, "count_gpus", lambda: 2)
    sweep.remember_visible_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep.visible_gpus() == expected
    # Asked for by hydra.launcher.gpus_per_node
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert sweep.visible_gpus() == ["0"]


@pytest.mark.parametrize(
    ("output", "count"), [("3", 3), ("a warning\n2\n", 2), ("", 0), ("no driver", 0)]
)
def test_gpus_are_counted_by_another_process(monkeypatch, output, count):
    asked = []

    def run(command, env, **others):
        asked.append((command, env))
        return SimpleNamespace(stdout=output)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep.count_gpus() == count
    ((command, env),) = asked
    assert command[:2] == [sys.executable, "-c"]
    compile(command[2], "the command", "exec")
    assert "device_count" in command[2]
    assert "CUDA_VISIBLE_DEVICES" not in env


def test_a_job_is_train_py_with_its_overrides_in_its_folder(tmp_path, started):
    train_job(tmp_path, ["seed=1"])
    train_job(tmp_path, ["jobs_at_once=2", "search=digits", "resume=elsewhere"])
    commands = [command for command, _ in started]
    script = [sys.executable, str(ROOT / "train.py")]
    assert commands == [
        [*script, "seed=1", "resume=auto", f"hydra.run.dir={tmp_path}"],
        [*script, "resume=elsewhere", f"hydra.run.dir={tmp_path}"],
    ]
    note = json.loads((tmp_path / "job.json").read_text())
    overrides = ["jobs_at_once=2", "search=digits", "resume=elsewhere"]
    assert note == {"overrides": overrides, "status": "ended", "exit_code": 0}


def test_jobs_that_only_explain_leave_no_row_and_no_folder(tmp_path, started, capsys):
    """They end with exit code 0 and without a result, and were told as crashed."""
    assert run_job(tmp_path / "0", ["explain=true"]) is None
    assert len(started) == 1
    assert list(tmp_path.iterdir()) == []
    print_summary(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("started")
def test_a_full_disk_is_no_bug_of_the_sweep(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sweep, "write_json", full)
    with pytest.raises(TrainingFailed, match=rf"No space left .*hydra\.sweep\.dir={tmp_path}"):
        train_job(tmp_path / "0", ["seed=1"])


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_to_the_job_and_ends_the_sweep(tmp_path, monkeypatch, number):
    passed_on = []

    def unexpected(number, frame):
        raise AssertionError(f"{number} came to the driver itself")

    class StoppedChild(FakeChild):
        def send_signal(self, number):
            passed_on.append(number)

        def wait(self):
            signal.raise_signal(number)
            return 75

    monkeypatch.setattr(sweep.subprocess, "Popen", StoppedChild)
    # Not that of SIGUSR1, which would end the tests where the sweep leaves it alone
    handler = signal.signal(number, unexpected)
    with pytest.raises(Stopped, match=rf"{number.name} .*hydra\.sweep\.dir={tmp_path.parent}"):
        train_job(tmp_path, ["seed=1"])
    assert passed_on == [number]
    assert signal.signal(number, handler) is unexpected
    assert json.loads((tmp_path / "job.json").read_text())["exit_code"] == 75
