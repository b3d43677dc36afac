"""The sweep's jobs and its table, from folders as jobs leave them."""

import csv
import errno
import json
import math
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from helpers import ROOT
from PIL import Image

from vit.errors import ConfigError, Stopped
from vit.runs import sweep
from vit.runs.sweep import (
    collect,
    draw,
    gpus_of_slot,
    job_slot,
    over_seeds,
    print_summary,
    run_job,
    table,
    train_job,
)


def write_job(folder, overrides, exit_code=0, **result):
    folder.mkdir(parents=True)
    note = {"overrides": overrides, "status": "ended", "exit_code": exit_code}
    (folder / "job.json").write_text(json.dumps(note))
    if result:
        result = {"reason": "all steps done", "seconds": 10.0, **result}
        (folder / "result.json").write_text(json.dumps(result))


def write_finished(folder, overrides, val_top1, test_top1):
    write_job(folder, overrides, status="finished", val_top1=val_top1, test_top1=test_top1)


@pytest.fixture
def four_jobs(tmp_path):
    """Two that finished, one that was killed, one that was refused."""
    write_finished(tmp_path / "0", ["optimizer.lr=1"], 0.5, 0.45)
    write_finished(tmp_path / "1", ["optimizer.lr=2"], 0.7, 0.65)
    write_job(tmp_path / "2", ["optimizer.lr=3"], exit_code=-9)
    reason = "optimizer.lr must be positive"
    write_job(tmp_path / "3", ["optimizer.lr=0"], exit_code=2, status="failed", reason=reason)
    return tmp_path


def test_jobs_are_ranked_and_the_crashed_come_last(four_jobs):
    rows = collect(four_jobs)
    assert [(row["job"], row["status"]) for row in rows] == [
        ("1", "finished"),
        ("0", "finished"),
        ("2", "crashed"),
        ("3", "failed"),
    ]
    lines = table(rows).splitlines()
    first = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert first == ["1", "1", "70.00%", "65.00%", "finished", "optimizer.lr=2"]
    third = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    assert third == ["", "2", "", "", "crashed", "optimizer.lr=3"]
    # Reasons stand below, so that none makes the table wide. No second table: no jobs differ in the
    # seed alone
    assert "best: python train.py optimizer.lr=2" in lines[6:]
    crashed, failed = lines[-2:]
    assert crashed.startswith("job 2 crashed: signal SIGKILL")
    assert failed == "job 3 failed: optimizer.lr must be positive"


@pytest.mark.parametrize(
    ("exit_code", "reason"), [(1, "exit code 1"), (-11, "SIGSEGV"), (None, "")]
)
def test_a_job_without_a_result_is_told_by_its_exit_code(tmp_path, exit_code, reason):
    write_job(tmp_path / "0", [], exit_code=exit_code)
    (row,) = collect(tmp_path)
    assert row["status"] == ("running" if exit_code is None else "crashed")
    assert reason in row["reason"]


def test_the_summary_is_written_and_printed(four_jobs, capsys):
    print_summary(four_jobs)
    text = (four_jobs / "summary.md").read_text()
    output = capsys.readouterr().out
    assert text in output
    assert "2 of 4 jobs finished" in output
    with open(four_jobs / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["1", "0", "2", "3"]
    assert (rows[0]["val_top1"], rows[3]["val_top1"]) == ("0.7", "")
    assert (four_jobs / "summary.png").exists()


def test_the_picture_shows_what_has_a_result(tmp_path):
    write_finished(tmp_path / "0", ["optimizer.lr=1"], 0.5, None)
    write_job(tmp_path / "1", ["optimizer.lr=2"], exit_code=-11)
    draw(collect(tmp_path), tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        assert image.width > 500
    (tmp_path / "0" / "result.json").unlink()
    draw(collect(tmp_path), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_finished_job_is_left_alone_and_others_begin_anew(tmp_path, monkeypatch):
    begun = []

    def note(folder, overrides, gpu=None):
        begun.append(folder.name)

    monkeypatch.setattr(sweep, "train_job", note)
    write_finished(tmp_path / "0", ["seed=1"], 0.5, 0.5)
    write_job(tmp_path / "1", ["seed=2"], exit_code=-9, status="failed", val_top1=None)
    assert run_job(tmp_path / "0", ["seed=1"]) == 0.5
    assert math.isnan(run_job(tmp_path / "1", ["seed=2"]))
    assert math.isnan(run_job(tmp_path / "2", ["seed=3"]))
    assert begun == ["1", "2"]
    # Or a crash would show what an earlier start has left
    assert not (tmp_path / "1" / "result.json").exists()


def test_the_folder_of_another_job_is_refused(tmp_path):
    write_finished(tmp_path / "0", ["seed=1"], 0.5, 0.5)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/0: .*hydra\.sweep\.dir"):
        run_job(tmp_path / "0", ["seed=7"])


def test_a_sweep_may_go_on_with_another_number_of_jobs_at_once(tmp_path):
    write_finished(tmp_path / "0", ["jobs_at_once=4", "seed=1"], 0.5, 0.5)
    for settings in (["jobs_at_once=2"], [], ["search=digits", "jobs_at_once=1"]):
        assert run_job(tmp_path / "0", ["seed=1", *settings]) == 0.5
    # A single run refuses it
    assert table(collect(tmp_path)).splitlines()[-1] == "best: python train.py seed=1"


def test_jobs_that_differ_in_the_seed_alone_get_a_mean(tmp_path):
    for seed, (val, test) in enumerate([(0.90, 0.88), (0.92, 0.89), (0.94, 0.90)]):
        overrides = ["experiment=digits", f"seed={seed}"]
        write_finished(tmp_path / str(seed), overrides, val, test)
    write_job(tmp_path / "3", ["experiment=digits", "seed=3"], exit_code=1)
    other = ["experiment=digits", "optimizer.lr=1", "seed=0"]
    write_finished(tmp_path / "4", other, 0.9, 0.9)
    rows = collect(tmp_path)
    (group,) = over_seeds(rows)
    assert (group["overrides"], group["seeds"]) == ("experiment=digits", 3)
    assert group["val_top1"] == pytest.approx((0.92, 0.02))
    assert group["test_top1"] == pytest.approx((0.89, 0.01))
    assert "| 3     | 92.00 ± 2.00 % | 89.00 ± 1.00 % | experiment=digits |" in table(rows)


def test_without_validation_the_mean_is_that_of_test_alone(tmp_path):
    for seed in (1, 2):
        write_finished(tmp_path / str(seed), [f"seed={seed}"], None, 0.5 + seed / 10)
    rows = collect(tmp_path)
    (group,) = over_seeds(rows)
    assert group["val_top1"] is None
    assert group["test_top1"] == pytest.approx((0.65, 0.0707), abs=1e-4)
    assert "|           | 65.00 ± 7.07 % | (none)" in table(rows)


def write_selected(folder, select, value, val_top1):
    result = {"select": select, f"val_{select}": value, f"test_{select}": value}
    result |= {"val_top1": val_top1, "test_top1": val_top1}
    write_job(folder, [f"seed={folder.name}"], status="finished", **result)


def test_jobs_are_ranked_by_what_they_were_selected_by(tmp_path):
    write_selected(tmp_path / "0", "macro_f1", 0.4, 0.9)
    write_selected(tmp_path / "1", "macro_f1", 0.6, 0.8)
    write_job(tmp_path / "2", ["seed=2"], exit_code=-9)
    rows = collect(tmp_path)
    assert [row["job"] for row in rows] == ["1", "0", "2"]
    text = table(rows)
    assert "| rank | job | val macro F1 | test macro F1 | val top-1 |" in text
    assert "ranked by validation macro F1 (train.select=macro_f1)" in text
    assert "best: python train.py seed=1" in text
    assert "50.00 ± 14.14 %" in text
    # What a search maximizes
    assert run_job(tmp_path / "1", ["seed=1"]) == 0.6


def test_of_losses_the_lowest_is_ranked_first_and_its_negative_maximized(tmp_path):
    write_selected(tmp_path / "0", "loss", 1.5, 0.9)
    write_selected(tmp_path / "1", "loss", 0.5, 0.8)
    rows = collect(tmp_path)
    assert [row["job"] for row in rows] == ["1", "0"]
    assert "ranked by validation loss, the lowest first" in table(rows)
    assert "| 0.5000 " in table(rows)
    assert "| 1.0000 ± 0.7071 " in table(rows)
    assert run_job(tmp_path / "1", ["seed=1"]) == -0.5


def test_jobs_that_differ_in_what_they_select_by_are_ranked_by_top1(tmp_path):
    write_selected(tmp_path / "0", "loss", 0.5, 0.7)
    write_selected(tmp_path / "1", "macro_f1", 0.4, 0.9)
    rows = collect(tmp_path)
    assert [row["job"] for row in rows] == ["1", "0"]
    assert "since the jobs differ in train.select" in table(rows)


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
