"""Several processes train as one does, whoever dies or is stopped. Real processes, real signals."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    WAIT_AFTER_STEP,
    WAITING,
    error_line,
    has_come_to,
    read_result,
    rows,
    run,
    start,
    train,
    train_to_step,
    wait_until,
)
from omegaconf import OmegaConf
from several_processes import finish_ranks, start_ranks

from train import requested_processes
from vit.runs.folder import RunFolder

pytestmark = pytest.mark.slow

STEPS = 50
RUN = [
    "experiment=digits",
    f"train.steps={STEPS}",
    "train.log_every=1",
    "train.eval_every=1000",
    "train.ema_decay=0",
    "optimizer=sgd",
    "optimizer.lr=0.02",
    "train.precision=fp32",
    "model.drop_path=0.1",
    "augment.mixup=0.2",
    "augment.cutmix=1",
    "augment.erasing=0.3",
    "model.num_layers=1",
    "model.hidden_size=64",
    "model.num_heads=2",
    "train.save_every=5",
    "runtime.threads=1",
]


def rows_of(folder: Path, split: str) -> list[dict]:
    return [row for row in rows(folder / "metrics.jsonl") if row["split"] == split]


def assert_same_run(folder: Path, expected: Path) -> None:
    """Every loss is that of the other run, whose sums were added in another order."""
    losses = [row["loss"] for row in rows_of(folder, "train")]
    assert losses == pytest.approx([row["loss"] for row in rows_of(expected, "train")], rel=1e-5)
    for split in ("val", "test"):
        (ours,), (theirs,) = rows_of(folder, split), rows_of(expected, split)
        assert ours["n"] == theirs["n"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["top1"] == pytest.approx(theirs["top1"], abs=2 / theirs["n"])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """The folder of the run by one process."""
    folder = tmp_path_factory.mktemp("one_process")
    done = train(folder, *RUN, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def steps_of_processes(count: int, micro_batch_size: int, folder: Path) -> list[list[float]]:
    """Loss, correct predictions and gradient norm of every step of distributed_steps.py."""
    script, out = "tests/runtime/distributed_steps.py", folder / f"{count}.json"
    finish_ranks(start_ranks(count, script, str(out), str(micro_batch_size), cwd=folder))
    return json.loads(out.read_text())


def test_fifty_steps_are_those_of_one_process(tmp_path):
    """AdamW in float64 with stochastic depth, a batch that no number of processes splits evenly,
    and other micro-batches."""
    expected = steps_of_processes(1, 14, tmp_path)
    for count, micro_batch_size in ((2, 3), (4, 2)):
        for row, expected_row in zip(
            steps_of_processes(count, micro_batch_size, tmp_path), expected, strict=True
        ):
            assert row == pytest.approx(expected_row, rel=1e-9)


def test_a_killed_process_ends_all_and_one_process_resumes(tmp_path, one_process):
    """Two processes started by torchrun, of which the second is killed in the middle."""
    torchrun = ["--nproc-per-node=2", str(ROOT / WAITING)]
    arguments = [*torchrun, *RUN, "hydra.run.dir=run"]
    process = start("torch.distributed.run", *arguments, cwd=tmp_path, env={WAIT_AFTER_STEP: "12"})
    wait_until(lambda: has_come_to(tmp_path / "run", 12), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    killed = time.monotonic()
    os.kill(int(children[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=100)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert "SIGKILL" in errors
    assert read_result(tmp_path / "run")["status"] in ("failed", "stopped")

    resumed = train(tmp_path, "resume=run")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_same_run(tmp_path / "run", one_process)


def test_two_machines_train_as_one(tmp_path, one_process):
    """A torchrun on each, which find each other; the machines share the disk."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    meeting = [f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=run"]
    arguments = [*nodes, *meeting, str(ROOT / "train.py"), *RUN]
    finish_ranks([start("torch.distributed.run", *arguments, cwd=tmp_path) for _ in range(2)])

    # The name of the folder has the time and the process in it, which each takes for itself
    (folder,) = tmp_path.glob("outputs/*/*")
    assert_same_run(folder, one_process)


def test_a_stopped_launcher_saves_and_one_process_resumes(tmp_path, one_process):
    """SIGTERM to the launcher is passed on to its two processes, and it ends as they do."""
    arguments = [*RUN, "runtime.processes=2", "hydra.run.dir=run"]
    process = train_to_step(12, *arguments, cwd=tmp_path, run="run")
    process.terminate()
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 75, errors[-2000:]
    assert "2 processes" in output
    assert read_result(tmp_path / "run")["status"] == "stopped"
    assert len(rows_of(tmp_path / "run", "train")) < STEPS
    # The second process has left no folder of its own
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

    resumed = train(tmp_path, "resume=run", "runtime.processes=1")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_same_run(tmp_path / "run", one_process)


def test_processes_whose_launcher_is_killed_save_and_end(tmp_path):
    """Nothing else would end them: each is the leader of a session of its own."""
    arguments = [*RUN, "runtime.processes=2", "hydra.run.dir=run"]
    launcher = train_to_step(12, *arguments, cwd=tmp_path, run="run")
    launcher.kill()
    # They have its standard output, so this waits for them
    launcher.communicate(timeout=100)
    result = read_result(tmp_path / "run")
    assert (result["status"], result["steps"] < STEPS) == ("stopped", True)
    RunFolder(tmp_path / "run")  # which is no longer locked


def test_a_stopped_run_is_resumed_by_as_many_processes(tmp_path):
    """resume=FOLDER alone starts the number that config.yaml has, whatever the folder's name."""
    folder = tmp_path / "runtime.processes"
    folder.mkdir()
    (folder / "config.yaml").write_text("runtime:\n  processes: 2\n")
    composed = OmegaConf.create({"resume": str(folder), "runtime": {"processes": None}})
    assert requested_processes(composed, folder, [f"resume={folder}"]) == 2
    composed.runtime.processes = 3
    assert requested_processes(composed, folder, ["runtime.processes=3"]) == 3


def test_processes_that_share_the_state_are_stopped_and_resumed(tmp_path, one_process):
    """Each of two processes has half of the weights and of the optimizer's state (FSDP)."""
    arguments = [*RUN, "runtime.sharding=fsdp", "resume=auto", "hydra.run.dir=run"]
    processes = start_ranks(2, WAITING, *arguments, cwd=tmp_path, env={WAIT_AFTER_STEP: "12"})
    wait_until(lambda: has_come_to(tmp_path / "run", 12), processes[0])
    processes[1].terminate()  # they agree to stop, whichever got the signal
    finish_ranks(processes, code=75)
    assert read_result(tmp_path / "run")["status"] == "stopped"
    assert len(rows_of(tmp_path / "run", "train")) < STEPS

    finish_ranks(start_ranks(2, "train.py", *arguments, cwd=tmp_path))
    assert_same_run(tmp_path / "run", one_process)


def test_a_mistake_is_printed_by_one_process(tmp_path):
    """All of them find it."""
    arguments = ["experiment=digits", "train.batch_size=3", "hydra.run.dir=run"]
    first, second = finish_ranks(start_ranks(2, "train.py", *arguments, cwd=tmp_path), code=2)
    (line,) = first.splitlines()
    assert "train.batch_size=3" in line
    assert second == ""


@pytest.mark.parametrize("late", ["0", "1"])
def test_the_launcher_ends_with_the_exit_code_of_its_processes(tmp_path, late):
    # Whichever of the processes is first to find the mistake
    plant(tmp_path, f"import os, time; os.environ.get('RANK') == '{late}' and time.sleep(2)")
    arguments = ["experiment=digits", "hydra.run.dir=run", "optimizer.lr=-1"]
    done = run(
        "train.py",
        *arguments,
        "runtime.processes=2",
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert "optimizer.lr" in error_line(done)


def plant(folder, code):
    """Have every Python process that has the folder in its path run the code as it starts."""
    (folder / "sitecustomize.py").write_text(code)


def test_torchrun_has_started_another_number_of_processes(tmp_path):
    group = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    arguments = ["experiment=digits", "runtime.processes=2", "hydra.run.dir=run"]
    line = error_line(run("train.py", *arguments, cwd=tmp_path, env=group))
    assert "runtime.processes=2" in line
    assert "started 3" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        # More than any machine's
        (["runtime.processes=1000", "runtime.device=cuda"], "cuda|1000"),
        (["runtime.processes=2", "data.root=${nothing}"], "data.root"),
        (["runtime.processes=2", "runtime.device=nonsense"], "runtime.device"),
    ],
)
def test_a_command_that_starts_no_run_leaves_no_folder(tmp_path, mistake, named):
    done = run("train.py", "experiment=digits", "hydra.run.dir=run", *mistake, cwd=tmp_path)
    assert re.search(named, error_line(done))
    assert not (tmp_path / "run").exists()


def test_a_number_of_processes_below_one_is_refused(tmp_path):
    done = run("train.py", "experiment=digits", "runtime.processes=0", cwd=tmp_path)
    assert "runtime.processes" in error_line(done)
