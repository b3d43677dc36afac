"""The table of a sweep and its picture, from folders as jobs leave them."""

import csv
import errno
import shlex

import pytest
from matplotlib.figure import Figure
from PIL import Image
from sweep_folders import write_finished, write_job, write_selected

from vit.runs.sweep import run_job
from vit.runs.sweep_table import collect, draw, over_seeds, print_summary, table


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


def test_the_command_of_the_best_job_can_be_pasted(tmp_path):
    overrides = ["data.root='my  images'", "seed=1"]
    write_finished(tmp_path / "0", overrides, 0.5, 0.5)
    last = table(collect(tmp_path)).splitlines()[-1]
    assert shlex.split(last) == ["best:", "python", "train.py", *overrides]


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


def test_a_full_disk_does_not_hide_the_table(four_jobs, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vit.runs.sweep_table.write_text", full)
    print_summary(four_jobs)
    output = capsys.readouterr().out
    assert "could not be written" in output
    assert "best: python train.py optimizer.lr=2" in output


def test_the_picture_shows_what_has_a_result(tmp_path):
    # The name is no formula
    write_finished(tmp_path / "0", [r"data.root='a$\b$'"], 0.5, None)
    write_job(tmp_path / "1", ["optimizer.lr=2"], exit_code=-11)
    draw(collect(tmp_path), tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        assert image.width > 500
    (tmp_path / "0" / "result.json").unlink()
    draw(collect(tmp_path), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("select", "values", "label", "bars", "left"),
    [
        ("macro_f1", (0.4, 0.6), "macro F1, %", [60, 40], 35),
        ("loss", (0.5, 1.5), "loss", [0.5, 1.5], 0.45),
    ],
)
def test_the_picture_shows_what_the_jobs_are_ranked_by(
    tmp_path, monkeypatch, select, values, label, bars, left
):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    for job, value in enumerate(values):
        # The order by top-1 is another one
        write_selected(tmp_path / str(job), select, value, val_top1=0.9 if value < 0.6 else 0.7)
    draw(collect(tmp_path), tmp_path / "summary.png")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == label
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(bars)
    assert list(axes.lines[0].get_xdata()) == pytest.approx(bars)
    assert axes.get_xlim()[0] == pytest.approx(left)


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
