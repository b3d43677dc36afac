"""metrics.jsonl and timing.jsonl: one row a measurement, one curve after a resume."""

import json
import math

from helpers import rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit.runs.metrics_log import MetricsLog
from vit.runs.tensorboard import TensorBoard


def write(log, board, steps):
    for step in steps:
        log.train(step, loss=float(step), top1=0.5, lr=0.1, grad_norm=1.0)
        log.speed(step, images_per_second=10.0, mfu=0.4, data_wait=0.0, memory=1)
        board.scalar("loss/train", float(step), step)
    log.close()
    board.close()


def test_a_resumed_run_has_one_curve(tmp_path):
    """A killed run got further than its last checkpoint: what came after it is dropped, in every
    file."""
    write(MetricsLog(tmp_path, 0), TensorBoard(tmp_path / "tensorboard", None), range(1, 8))
    write(MetricsLog(tmp_path, 4), TensorBoard(tmp_path / "tensorboard", 5), range(5, 11))
    for name in ("metrics.jsonl", "timing.jsonl"):
        assert [row["step"] for row in rows(tmp_path / name)] == list(range(1, 11))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(1, 11))


def test_rows(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.train(2, loss=1.5, top1=0.25, lr=0.1, grad_norm=3.0)
    log.train(3, loss=1.5, top1=math.nan, lr=0.1, grad_norm=3.0)
    log.evaluation(3, "val", {"n": 7, "loss": 1.0, "top1": 0.5, "top5": 0.9, "more": 1.0})
    # Every row is on the disk at once: a run may be killed
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        json.dumps(
            {"step": 2, "split": "train", "loss": 1.5, "top1": 0.25, "lr": 0.1} | {"grad_norm": 3.0}
        ),
        json.dumps({"step": 3, "split": "train", "loss": 1.5, "lr": 0.1, "grad_norm": 3.0}),
        json.dumps({"step": 3, "split": "val", "n": 7, "loss": 1.0, "top1": 0.5, "top5": 0.9}),
    ]
    log.close()


def test_metrics_beside_the_usual_ones_come_last(tmp_path):
    log = MetricsLog(tmp_path, 0)
    metrics = {"n": 7, "loss": 1.0, "macro_f1": 0.25, "top1": 0.5, "top5": 0.9}
    log.evaluation(3, "val", metrics, ("macro_f1",))
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert list(row) == ["step", "split", "n", "loss", "top1", "top5", "macro_f1"]
    log.close()


def test_what_depends_on_the_clock_stands_apart(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.speed(2, images_per_second=10.126, mfu=0.12346, data_wait=0.5, memory=2**30)
    assert rows(tmp_path / "timing.jsonl") == [
        {
            "step": 2,
            "images_per_second": 10.13,
            "mfu": 0.1235,
            "data_wait": 0.5,
            "memory_bytes": 2**30,
        }
    ]
    assert rows(tmp_path / "metrics.jsonl") == []
    log.close()


def test_other_processes_write_nothing(tmp_path):
    log = MetricsLog(tmp_path, 0, writes=False)
    log.train(1, loss=1.0, top1=0.5, lr=0.1, grad_norm=1.0)
    log.close()
    assert list(tmp_path.iterdir()) == []
