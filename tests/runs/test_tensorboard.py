"""TensorBoard's files, and a disk that takes no more."""

import threading

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

from vit.runs.tensorboard import TensorBoard, ignore_disk_errors_of_writer


@pytest.fixture(autouse=True)
def _hook_of_threads():
    """TensorBoard sets a hook of the whole process."""
    hook = threading.excepthook
    yield
    threading.excepthook = hook


def read(folder):
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def test_curves_are_no_reason_to_end_a_run(tmp_path, log_lines):
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    board = TensorBoard(tmp_path / "tensorboard", None)
    assert not board.active
    board.scalar("loss", 1.0, 1)
    board.close()
    (warning,) = log_lines
    assert str(tmp_path / "tensorboard") in warning


def test_a_disk_that_fills_up_ends_the_curves_alone(tmp_path, log_lines):
    board = TensorBoard(tmp_path, None)
    board.scalar("loss", 1.0, 1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    board.writer.add_scalar = full
    for step in range(2, 5):
        board.scalar("loss", 1.0, step)
    board.text("text", "words", 5)
    (warning,) = log_lines
    assert "No space left on device" in warning
    assert not board.active


def test_other_processes_write_nothing(tmp_path):
    board = TensorBoard(tmp_path / "tensorboard", None, writes=False)
    board.scalar("loss", 1.0, 1)
    board.hyperparameters({"lr": 0.1}, {"result/top1": 0.5}, 1)
    board.training_images(torch.zeros(1, 3, 8, 8), ["cat"], 0)
    board.close()
    assert not board.active
    assert list(tmp_path.iterdir()) == []


def test_a_bug_in_a_thread_keeps_its_traceback(capsys):
    """TensorBoard writes in a thread of its own, where the disk alone may complain."""

    def fault(error, thread):
        return threading.ExceptHookArgs((type(error), error, None, thread))

    writer = _AsyncWriterThread.__new__(_AsyncWriterThread)
    threading.Thread.__init__(writer)
    ignore_disk_errors_of_writer(fault(OSError(28, "No space left on device"), writer))
    assert capsys.readouterr().err == ""
    ignore_disk_errors_of_writer(fault(KeyError("planted"), writer))
    assert "planted" in capsys.readouterr().err
    ignore_disk_errors_of_writer(fault(OSError(28, "full"), threading.Thread()))
    assert "full" in capsys.readouterr().err


def test_small_training_images_are_enlarged_and_named(tmp_path):
    board = TensorBoard(tmp_path, None)
    images = torch.linspace(0, 1, 10 * 8 * 8).reshape(10, 1, 8, 8)
    board.training_images(images, [f"digit {label}" for label in range(10)], 0)
    board.close()
    events = read(tmp_path)
    (image,) = events.Images("pictures/training images")
    # Eight columns and two rows of images of 64 px, two pixels apart
    assert (image.width, image.height) == (8 * 66 + 2, 2 * 66 + 2)
    (text,) = events.Tensors("pictures/labels of the training images/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert all(f"digit {label} " in table for label in range(10))


def test_hyperparameters_stand_beside_the_curves(tmp_path):
    board = TensorBoard(tmp_path, None)
    settings = {"optimizer.lr": 0.1, "optimizer.betas": [0.9, 0.99], "data.root": None}
    board.hyperparameters(settings, {"result/test_top1": 0.75}, 12)
    board.close()
    events = read(tmp_path)
    (result,) = events.Scalars("result/test_top1")
    assert (result.step, result.value) == (12, 0.75)
    assert any(tag.startswith("_hparams_") for tag in events.summary_metadata)
    assert len(list(tmp_path.iterdir())) == 1
