"""The sweep's table, from folders as jobs leave them."""

import json
import math
import threading
import time

import pytest
from PIL import Image

from vit.errors import ConfigError
from vit.runs.sweep import collect, draw, over_seeds, place, run_job, table, train_job


def write_job(folder, overrides, exit_code=0, **result):
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(
        json.dumps({"overrides": overrides, "status": "ended", "exit_code": exit_code})
    )
    if result:
        (folder / "result.json").write_text(
            json.dumps({"reason": "all steps done", "seconds": 10.0, **result})
        )


def test_jobs_are_ranked_and_the_crashed_come_last(tmp_path):
    write_job(tmp_path / "0", ["optimizer.lr=1"], status="finished", val_top1=0.5, test_top1=0.45)
    write_job(tmp_path / "1", ["optimizer.lr=2"], status="finished", val_top1=0.7, test_top1=0.65)
    write_job(tmp_path / "2", ["optimizer.lr=3"], exit_code=-9)
    write_job(
        tmp_path / "3",
        ["optimizer.lr=0"],
        exit_code=2,
        status="failed",
        reason="optimizer.lr must be positive",
    )
    rows = collect(tmp_path)
    assert [(row["job"], row["status"]) for row in rows] == [
        ("1", "finished"),
        ("0", "finished"),
        ("2", "crashed"),
        ("3", "failed"),
    ]
    lines = table(rows).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "1",
        "1",
        "70.00%",
        "65.00%",
        "finished",
        "optimizer.lr=2",
    ]
    assert "crashed: signal SIGKILL" in lines[4]
    assert lines[6:] == [
        "",
        "best: python train.py optimizer.lr=2",
    ]  # no second table: nothing differs in the seed alone


def test_the_picture_shows_what_has_a_result(tmp_path):
    write_job(tmp_path / "0", ["optimizer.lr=1"], status="finished", val_top1=0.5, test_top1=None)
    write_job(tmp_path / "1", ["optimizer.lr=2"], exit_code=-11)
    draw(collect(tmp_path), tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        assert image.width > 500
    (tmp_path / "0" / "result.json").unlink()
    draw(collect(tmp_path), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_job_that_is_finished_is_left_and_another_ones_folder_refused(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(
        "vit.runs.sweep.train_job", lambda folder, overrides, gpu=None: begun.append(folder.name)
    )
    write_job(tmp_path / "0", ["seed=1"], status="finished", val_top1=0.5, test_top1=0.5)
    write_job(tmp_path / "1", ["seed=2"], exit_code=-9, status="failed", val_top1=None)
    assert run_job(tmp_path / "0", ["seed=1"]) == 0.5
    assert math.isnan(run_job(tmp_path / "1", ["seed=2"]))
    assert math.isnan(run_job(tmp_path / "2", ["seed=3"]))
    assert begun == ["1", "2"]
    assert not (
        tmp_path / "1" / "result.json"
    ).exists()  # or a crash would show what an earlier start has left
    with pytest.raises(ConfigError, match="holds another job"):
        run_job(tmp_path / "0", ["seed=7"])


def test_jobs_that_differ_in_the_seed_alone_get_a_mean(tmp_path):
    for seed, (val, test) in enumerate([(0.90, 0.88), (0.92, 0.89), (0.94, 0.90)]):
        write_job(
            tmp_path / str(seed),
            ["experiment=digits", f"seed={seed}"],
            status="finished",
            val_top1=val,
            test_top1=test,
        )
    write_job(tmp_path / "3", ["experiment=digits", "seed=3"], exit_code=1)
    write_job(
        tmp_path / "4",
        ["experiment=digits", "optimizer.lr=1", "seed=0"],
        status="finished",
        val_top1=0.9,
        test_top1=0.9,
    )
    (group,) = over_seeds(collect(tmp_path))
    assert (group["overrides"], group["seeds"]) == ("experiment=digits", 3)
    assert group["val_top1"] == pytest.approx((0.92, 0.02))
    assert group["test_top1"] == pytest.approx((0.89, 0.01))
    assert "| 3     | 92.00 ± 2.00 % | 89.00 ± 1.00 % | experiment=digits |" in table(
        collect(tmp_path)
    )


def test_without_validation_the_mean_is_that_of_test_alone(tmp_path):
    for seed in (1, 2):
        write_job(
            tmp_path / str(seed),
            [f"seed={seed}"],
            status="finished",
            val_top1=None,
            test_top1=0.5 + seed / 10,
        )
    (group,) = over_seeds(collect(tmp_path))
    assert group["val_top1"] is None
    assert group["test_top1"] == pytest.approx((0.65, 0.0707), abs=1e-4)
    assert "|           | 65.00 ± 7.07 % | (none)" in table(collect(tmp_path))


def test_so_many_jobs_work_at_once_each_in_a_place_of_its_own(tmp_path):
    working, most, taken = set(), [], []

    def work():
        with place(tmp_path, 2) as number:
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


def test_a_job_sees_the_gpu_of_its_place(tmp_path, monkeypatch):
    seen = []

    class Child:
        def __init__(self, command, env, **rest):
            seen.append(env.get("CUDA_VISIBLE_DEVICES"))

        def wait(self):
            return 0

    monkeypatch.setattr("vit.runs.sweep.subprocess.Popen", Child)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    train_job(tmp_path, ["seed=1"], 1)
    train_job(tmp_path, ["seed=1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    train_job(tmp_path, ["seed=1"], 1)
    assert seen == ["1", None, "6"]
