"""The emulated device refuses what the real one would, and knows what lies on it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.emulated_device import emulated_device, kernels_of


def on(device, *shape):
    return torch.ones(*shape).to(device)


def test_tensors_made_on_the_device_or_from_its_tensors_are_there():
    with emulated_device("mps") as emulated:
        x = on("mps", 3, 4)
        made = [
            x,
            x + 1,
            x[1:],
            x.sum(),
            x.to(torch.float16),
            torch.zeros(2, device="mps"),
            torch.arange(3, device=x.device),
            torch.empty_like(x),
            x.new_zeros(5),
            torch.tensor([1.0], device="mps"),
            F.one_hot(x.long(), 3),
            torch.ones(2, dtype=torch.uint8).to(x),
            torch.rand(3, device="mps"),
        ]
        assert {str(tensor.device) for tensor in made} == {"mps:0"}
        assert all(tensor.is_mps and not tensor.is_cuda for tensor in made)
        others = [torch.ones(2), x.cpu(), x.to("cpu"), torch.zeros_like(x, device="cpu")]
        assert {str(tensor.device) for tensor in others} == {"cpu"}
        assert torch.empty(3, device="meta").device.type == "meta"
        assert emulated.holds(x)
    assert x.device.type == "cpu"


def test_modules_gradients_and_optimizers_are_there():
    with emulated_device("mps") as emulated:
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).to("mps")
        twin = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        F.cross_entropy(model(on("mps", 3, 4)), torch.tensor([0, 1, 0]).to("mps")).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = [value for values in optimizer.state.values() for value in values.values()]
        tensors = [*model.parameters(), *twin.parameters(), norm, *state]
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(emulated.holds(tensor) for tensor in tensors + gradients)
    assert "_fused_adamw_" in emulated.kernels


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda x: x.double(), TypeError, "float64"),
        (lambda x: x.to(torch.float64), TypeError, "float64"),
        (lambda x: x.sum(dtype=torch.float64), TypeError, "float64"),
        (lambda x: torch.zeros(2, dtype=torch.float64, device=x.device), TypeError, "float64"),
        (lambda x: torch.ones(2, dtype=torch.float64).to("mps"), TypeError, "float64"),
        (lambda x: x + torch.ones(3, 4), RuntimeError, "same device"),
        (lambda x: F.linear(x, torch.ones(2, 4)), RuntimeError, "same device"),
        (lambda x: x.numpy(), TypeError, "numpy"),
        (lambda x: torch.linalg.eig(x[:, :3]), NotImplementedError, "linalg_eig"),
    ],
)
def test_what_apples_gpu_cannot_do_is_refused(work, error, message):
    with emulated_device("mps"), pytest.raises(error, match=message):
        work(on("mps", 3, 4))


def test_float64_is_fine_on_the_cpu_and_on_other_devices():
    with emulated_device("mps"):
        assert on("mps", 3).cpu().double().sum() == 3
    with emulated_device("cuda") as emulated:
        assert emulated.holds(on("cuda", 3).double())
        assert torch.cuda.is_available()
        assert not torch.backends.mps.is_available()
    assert not torch.cuda.is_available() or torch.cuda.device_count()


def test_waits_and_copies_are_noted():
    with emulated_device("cuda") as emulated:
        x = torch.ones(4).to("cuda", non_blocking=True)
        assert emulated.copies.total() == 1
        y = x * 2 + 1
        assert not emulated.waits
        for count, work in enumerate(
            [
                lambda: y.sum().item(),
                lambda: y.cpu(),
                lambda: y[y > 0],
                lambda: y.nonzero(),
                lambda: torch.equal(x, y),
                lambda: torch.ones(2).to("cuda"),
                lambda: torch.tensor([1.0], device="cuda"),
                lambda: y.copy_(torch.ones(4)),
            ],
            start=1,
        ):
            work()
            assert emulated.waits.total() >= count, work


def test_the_table_of_kernels_is_torchs():
    mps = kernels_of("mps")
    assert {"add", "mm", "index_put_", "_fused_adamw_", "topk", "_log_softmax"} <= mps
    assert not {"linalg_eig", "_cudnn_rnn"} & mps
    assert "_cudnn_rnn" in kernels_of("cuda")


def test_kernels_are_counted_without_views():
    with emulated_device("cuda") as emulated:
        x = on("cuda", 4, 6)
        emulated.forget()
        x.reshape(2, 12).t()[1:].unbind()
        torch.empty_like(x)
        assert emulated.launches == 0
        (x * 2).add_(1).sum()
        assert emulated.launches == 3


def test_lists_are_one_kernel_where_their_tensors_are_alike():
    with emulated_device("cuda") as emulated:
        matrices = [on("cuda", 2, 3) for _ in range(5)]
        emulated.forget()
        torch._foreach_add_(matrices, matrices)
        torch._foreach_mul_(matrices, 2.0)
        assert emulated.launches == 2
        torch._foreach_mul_(matrices, [matrix.sum() for matrix in matrices])
        assert emulated.launches == 2 + 5 + 5


def test_operands_on_two_devices_can_be_counted_instead():
    with emulated_device("cuda", refuse_mixed=False) as emulated:
        x = on("cuda", 3)
        assert emulated.holds(x + torch.ones(3))
    assert emulated.mixed.total() == 1


def test_the_bytes_of_the_largest_copy_are_noted():
    with emulated_device("cuda") as emulated:
        torch.ones(100).to("cuda", non_blocking=True)
        torch.ones(10).to("cuda")
        assert emulated.largest_copy == 400
        on("cuda", 200).copy_(torch.ones(200))
        torch.tensor([1.0] * 300, device="cuda").cpu()
        assert emulated.largest_copy == 1200
        emulated.forget()
        assert emulated.largest_copy == 0


def test_indices_on_the_cpu_are_waited_for():
    with emulated_device("cuda") as emulated:
        x = on("cuda", 5)
        emulated.forget()
        x[torch.tensor([0, 1]).to("cuda", non_blocking=True)]
        assert not emulated.waits
        x[torch.tensor([0, 1])]
        assert emulated.waits.total() == 1
