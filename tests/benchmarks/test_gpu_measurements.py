"""What benchmarks/gpu_*.py time and count, tried without a GPU."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu_input, gpu_profile, gpu_steps, overheads
from benchmarks.contestants import Contestant
from vit.runtime.precision import Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OURS = [Contestant("ours", compiled) for compiled in (True, False)]
TIMMS = [Contestant("timm", compiled) for compiled in (True, False)]


class Clock:
    """A clock that goes on where something is said to take time."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_no_contestant_is_begun_that_would_not_be_built_in_time(clock, monkeypatch):
    def prepare(contestant, size, precision):
        clock.now += 100 if contestant.compiled else 5
        return contestant

    monkeypatch.setattr(gpu_steps, "prepare", prepare)
    order = [OURS[0], TIMMS[0], OURS[1], TIMMS[1]]
    precision = Precision("fp32", CPU)
    prepared, left_out = gpu_steps.prepare_all(order, "vit_s16", precision, 199.0)
    # The second to be compiled would have ended at 200; the others take five seconds
    assert list(prepared) == [OURS[0], OURS[1], TIMMS[1]]
    assert left_out == ["timm compiled: no time"]
    clock.now = 0.0
    prepared, left_out = gpu_steps.prepare_all(order, "vit_s16", precision, 215.0)
    assert (list(prepared), left_out) == (order, [])


def test_the_batches_that_were_made_before_the_clock_runs_are_not_counted(clock):
    workers, size, seconds = 4, 10, 2.0

    def batches(count):
        for number in range(count):
            # Made by as many at once, all of which begin with the first request
            clock.now = max(clock.now, seconds * (number // workers + 1))
            yield number

    assert gpu_input.rate(batches(12), size, CPU, workers) == workers * size / seconds


def test_the_time_of_a_span_of_kernels_is_not_counted_twice(monkeypatch):
    def kind(key, microseconds, device_type=DeviceType.CUDA, is_user_annotation=False):
        return SimpleNamespace(
            key=key,
            device_type=device_type,
            is_user_annotation=is_user_annotation,
            self_device_time_total=microseconds,
            count=3,
        )

    kinds = [
        kind("a kernel", 3e3),
        kind("another", 1e3),
        kind("Optimizer.step#AdamW.step", 1e3, is_user_annotation=True),
        kind("aten::mm", 3e3, device_type=DeviceType.CPU),
    ]

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def key_averages(self):
            return kinds

    step = SimpleNamespace(run=lambda: None)
    monkeypatch.setattr(gpu_profile, "profile", Profile)
    monkeypatch.setattr(gpu_profile, "make_step", lambda *arguments: CallableStep(step.run))
    monkeypatch.setattr(gpu_profile, "synchronize", lambda device: None)
    lines = gpu_profile.profile_steps("vit_nano4", False, Precision("bf16", CUDA))
    rows = [line for line in lines if "calls" not in line and line.count("|") > 3]
    assert [row.split("|")[1].strip() for row in rows[-2:]] == ["a kernel", "another"]
    assert "75.0%" in rows[-2]


class CallableStep:
    """Stands in for TimedStep."""

    def __init__(self, run):
        self.run = run

    def __call__(self):
        self.run()


def test_nothing_but_attention_is_timed_as_attention(monkeypatch):
    class Kernels(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    called = []

    def time_once(call, device, **settings):
        with Kernels():
            call()
        return 1.0

    monkeypatch.setattr(gpu_steps, "median_seconds", time_once)
    monkeypatch.setattr(gpu_steps, "ATTENTION_KERNELS", {"flash": gpu_steps.SDPBackend.MATH})
    gpu_steps.attention_table(Precision("fp32", CPU), (2, 2, 17, 16))
    assert "bmm" in called
    # No sum of the outputs, whose gradient would have to be spread out again
    assert "sum" not in called


def test_what_deterministic_kernels_need_is_set_before_the_first_product(monkeypatch):
    """torch looks at it once, however often the setting changes."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []

    def step():
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        return 1.0

    monkeypatch.setattr(overheads, "make_step", lambda *arguments, **settings: step)
    overheads.deterministic_ratio("vit_nano4", 8, 1)
    assert set(seen) == {":4096:8"}
    assert not torch.are_deterministic_algorithms_enabled()
