"""The hardware a run is told of: device, threads, workers."""

import os
import threading

import pytest
import torch

import train
from vit.errors import ConfigError, Stopped
from vit.runtime import launch
from vit.runtime.cores import loader_workers, usable_cores, worker_cores
from vit.runtime.device import (
    choose_device,
    describe_device,
    peak_memory,
    product_rate,
    start_device,
)
from vit.runtime.launch import process_rank, started_by_torchrun, tasks_of_slurm, wait_for_first
from vit.runtime.machine import Machine, require_gpus_of
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _torchs_settings():
    """Threads and deterministic kernels are settings of the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)


def start(stop=None, **changes):
    settings = {
        "device": "cpu",
        "threads": None,
        "deterministic": False,
        "workers": None,
        "sharding": "none",
    }
    return Machine.start(StopSignal() if stop is None else stop, **{**settings, **changes})


def test_one_process_on_the_cpu():
    machine = start(threads=1, workers=3)
    assert (machine.device, machine.workers, machine.sharded) == (CPU, 3, False)
    assert (machine.processes.rank, machine.processes.count) == (0, 1)
    assert machine.is_first
    assert torch.get_num_threads() == 1
    assert machine.describe() == "cpu, 1 threads"


def test_several_processes_are_counted_and_the_first_speaks():
    machine = Machine(CPU, Processes(rank=1, count=2), workers=0, sharded=False)
    assert not machine.is_first
    assert machine.describe().startswith("2 processes, each cpu")


def test_another_process_waits_for_the_first_until_its_launcher_ends_it(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "vit-1")
    stop = StopSignal()
    threading.Timer(0.2, lambda: setattr(stop, "name", "SIGTERM")).start()
    assert wait_for_first(stop)
    # Not earlier: the launcher would have ended the first before its message
    assert stop


def test_another_process_waits_for_a_while_where_the_first_goes_on(monkeypatch):
    monkeypatch.setattr(launch, "SECONDS_TO_REPORT", 0.1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "vit-1")
    assert not wait_for_first(StopSignal())


def test_nobody_waits_where_no_launcher_ends_the_others(monkeypatch):
    monkeypatch.setattr(launch, "SECONDS_TO_REPORT", 3600)
    assert wait_for_first(StopSignal())


def test_a_signal_before_the_others_are_there_is_not_forgotten(monkeypatch):
    """It has ended others at once, so that this process would wait for them in vain."""

    class Waiting(StopSignal):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            # At the last moment at which it is only noted
            if name == "exit_immediately" and value:
                self.name = "SIGTERM"

    monkeypatch.setattr("vit.runtime.machine.started_by_torchrun", lambda: True)
    monkeypatch.setattr("vit.runtime.machine.join_processes", lambda kind: pytest.fail("waits"))
    with pytest.raises(Stopped, match="SIGTERM"):
        start(stop=Waiting())


def test_deterministic_kernels_are_asked_for():
    start(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    start(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_one_process_can_not_be_sharded():
    with pytest.raises(ConfigError, match=r"runtime\.sharding=fsdp.*runtime\.processes"):
        start(sharding="fsdp")


@pytest.mark.usefixtures("no_gpu")
def test_auto_takes_the_first_device_there_is(monkeypatch):
    assert choose_device("auto") == CPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_missing_is_refused(name):
    with pytest.raises(ConfigError, match=rf"runtime\.device={name}.* cpu"):
        start(device=name)
    with pytest.raises(ConfigError, match=rf"--device={name}: this machine has none"):
        start_device(name, "--device")


def test_workers_are_as_many_as_the_cores_of_a_process_eight_at_most(monkeypatch):
    monkeypatch.setattr("vit.runtime.cores.usable_cores", lambda: 12)
    assert loader_workers(None) == 8
    assert loader_workers(None, processes=4) == 3
    assert loader_workers(None, processes=100) == 1
    assert loader_workers(0) == 0
    assert 1 <= usable_cores() <= os.cpu_count()


def test_a_limit_on_cores_holds_for_torchs_threads(monkeypatch):
    torch.set_num_threads(7)
    monkeypatch.setattr("vit.runtime.device.usable_cores", lambda: 3)
    start()
    assert torch.get_num_threads() == 3
    # Fewer than there are cores stay fewer
    torch.set_num_threads(2)
    start()
    assert torch.get_num_threads() == 2
    # What the user says holds
    start(threads=5)
    assert torch.get_num_threads() == 5


def test_a_gpu_is_fed_by_all_cores_but_one(monkeypatch):
    cores = 16
    monkeypatch.setattr("vit.runtime.cores.usable_cores", lambda: cores)
    assert loader_workers(None, device_type="cuda") == 15
    assert loader_workers(None, processes=8, device_type="cuda") == 1
    assert loader_workers(None, processes=16, device_type="cuda") == 1
    assert loader_workers(3, device_type="cuda") == 3
    # What a run that waits for data is told to give them
    assert worker_cores(1, "cuda") == 15
    assert worker_cores(4, "cuda") == 3
    assert worker_cores(4, "cpu") == 4
    assert worker_cores(100, "cuda") == worker_cores(100, "cpu") == 1
    cores = 128
    assert loader_workers(None, device_type="cuda") == 32
    assert worker_cores(1, "cuda") == 127


def test_float32_on_a_gpu_is_not_tf32(monkeypatch):
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    try:
        start()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_device_is_measured_and_described():
    assert describe_device(CPU) == f"cpu, {torch.get_num_threads()} threads"
    assert product_rate(CPU, torch.float32) > 1e8
    assert peak_memory(CPU) > 2**20  # bytes


def test_the_rate_is_measured_on_numbers_like_data(monkeypatch):
    multiplied = []
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: multiplied.append((a, b)) or multiply(a, b)
    )
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    product_rate(CPU, torch.float32)
    # The run's own numbers are left alone
    assert torch.equal(torch.rand(1), expected)
    for factor in multiplied[0]:
        assert factor.std() == pytest.approx(1, abs=0.01)
        assert factor.mean() == pytest.approx(0, abs=0.01)


def test_a_launcher_is_recognized_by_all_its_variables(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")
    # Schedulers set some of them too
    assert not started_by_torchrun()
    assert process_rank() == 0
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert started_by_torchrun()
    assert process_rank() == 3


def test_tasks_of_srun_are_counted_unless_torchrun_joins_them(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert tasks_of_slurm() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert tasks_of_slurm() == 4
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert tasks_of_slurm() == 1


def with_gpus(monkeypatch, count):
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)


@pytest.mark.parametrize(
    ("device", "gpus", "processes", "fits"),
    [
        ("auto", 2, 2, True),
        ("auto", 2, 3, False),
        ("cuda", 1, 2, False),
        ("auto", 0, 3, True),
        ("cpu", 1, 3, True),
        # Refused with the whole configuration
        ("gpu", 1, 3, True),
        (None, 1, 3, True),
    ],
)
def test_each_process_needs_a_gpu(monkeypatch, device, gpus, processes, fits):
    with_gpus(monkeypatch, gpus)
    if fits:
        require_gpus_of(device, processes)
        return
    with pytest.raises(ConfigError, match=rf"^runtime\.processes={processes}: .* has {gpus};"):
        require_gpus_of(device, processes)


def test_processes_without_a_gpu_each_do_not_wait_for_one_another(monkeypatch):
    with_gpus(monkeypatch, 1)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr("vit.runtime.machine.join_processes", pytest.fail)
    with pytest.raises(ConfigError, match=r"^runtime\.processes=2"):
        start(device="auto")


def test_the_launcher_starts_no_processes_for_too_few_gpus(monkeypatch, tmp_path):
    with_gpus(monkeypatch, 2)
    launched = []
    monkeypatch.setattr("train.launch_processes", lambda count, *rest: launched.append(count))
    monkeypatch.setattr("train.prepare_arguments", lambda arguments: arguments)
    with pytest.raises(ConfigError, match=r"^runtime\.processes=3: .*runtime\.device=cpu"):
        train.run_in_processes(3, "auto", tmp_path, [], 0.0)
    train.run_in_processes(2, "auto", tmp_path, [], 0.0)
    train.run_in_processes(3, "cpu", tmp_path, [], 0.0)
    assert launched == [2, 3]
