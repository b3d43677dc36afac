"""What a run writes, where the disk lets it and where it doesn't."""

import json
import logging

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit.files import truncate_after_step
from vit.runs.metrics_log import Tracker
from vit.runs.tensorboard import TensorBoard


def test_curves_are_no_reason_to_end_a_run(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    with caplog.at_level(logging.INFO, "vit"):
        logging.getLogger("vit").propagate = True
        board = TensorBoard(tmp_path / "tensorboard", None)
        board.add("scalar", "loss", 1.0, 1)
        board.close()
    assert [
        record.message
        for record in caplog.records
        if "TensorBoard's curves end here" in record.message
    ] == [record.message for record in caplog.records]
    assert len(caplog.records) == 1


def test_a_disk_that_fills_up_ends_the_curves_alone(tmp_path, caplog):
    board = TensorBoard(tmp_path, None)
    board.add("scalar", "loss", 1.0, 1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    board.writer.add_scalar = full
    with caplog.at_level(logging.INFO, "vit"):
        logging.getLogger("vit").propagate = True
        for step in range(2, 5):
            board.add("scalar", "loss", 1.0, step)
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.records[0].message


def write(tracker, steps):
    for step in steps:
        tracker.train(
            step,
            loss=float(step),
            top1=0.5,
            learning_rates={"decay": 0.1, "no_decay": 0.2},
            grad_norm=1.0,
            images_per_second=10.0,
            mfu=0.4,
            data_wait=0.0,
            memory=1,
        )


def test_a_resumed_run_has_one_curve(tmp_path):
    """A killed run got further than its last checkpoint: what came after it is dropped, in every file."""
    first = Tracker(tmp_path, 0, 10, 5.0, 8)
    write(first, range(1, 8))
    first.close()
    second = Tracker(tmp_path, 4, 10, 5.0, 8, resuming=True)
    write(second, range(5, 11))
    second.close()
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == list(range(1, 11))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(1, 11))
    assert {"optimizer/learning_rate/decay", "optimizer/learning_rate/no_decay"} <= set(
        events.Tags()["scalars"]
    )


def test_lines_of_later_steps_of_test_and_cut_ones_are_dropped(tmp_path):
    lines = [
        {"step": step, "split": split}
        for step, split in ((1, "train"), (2, "val"), (2, "test"), (3, "train"))
    ]
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "spl'
    )
    truncate_after_step(tmp_path / "x.jsonl", 2)
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == lines[
        :2
    ]
