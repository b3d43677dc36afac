"""A device that this machine does not have, played by the CPU: Apple's GPU, or one of CUDA.

    with emulated_device("mps") as device:
        ...                          # the program runs as if torch had such a device
    device.waits, device.copies      # where the host waited for it, and what it was sent
    device.launches                  # how many kernels computed on it

Every tensor "on the device" is a tensor of the CPU whose storage is known to be there. Two modes of
torch follow these storages. Emulation, a TorchFunctionMode, stands between Python and torch: it
answers `tensor.device`, and turns what creates or copies tensors on the device into the same on the
CPU. Kernels, a TorchDispatchMode, stands below: it sees every kernel, those of backward passes too,
and hands the device on from its inputs to its outputs.

What the device could not do raises what it would raise there: float64 and complex128 on Apple's
GPU, kernels that torch has not written for it, operands on two devices (which may be counted
instead), and NumPy arrays of its tensors.

Not emulated: numbers (they are the CPU's), memory, several devices, processes, Triton. Streams and
pinned memory can be asked for and do nothing.
"""

import collections
import contextlib
import functools
import linecache
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # torch imports it late, where it must not meet the patched functions
import torchgen
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
LACKING_TYPES = {"mps": (torch.float64, torch.complex128), "cuda": ()}
# Keys of torch's table of kernels by which one runs on any device: it is made of other kernels
EVERYWHERE = {
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
}
# What the CPU takes where a device has kernels of its own
OF_THE_CPU = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}
# Calls that make the host wait for the device to tell it a number or a shape
WAITING = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
}
# What allocates or renames memory alone, besides views
WITHOUT_KERNEL = {
    "_local_scalar_dense",
    "_reshape_alias",
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "is_pinned",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "record_stream",
    "resize_",
    "set_",
}
# Kernels that take indices, or a source, from the CPU too
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
MIXING = {"copy_", "_to_copy", "set_", *INDEXING}


class EmulatedDevice:
    """Which tensors are on the device, and what was noted of the work there.

    waits: where the host waited for the device, and copies: what was copied to the device without
    that, both by what happened and in which line of the project. bytes: of the largest copy to the
    device, waited for or not, by the line. kernels: the names of those that computed on the device;
    a view of a tensor computes nothing. mixed: calls with operands on two devices by name and line,
    where they are not refused.
    """

    def __init__(self, kind: str, refuse_mixed: bool = True):
        self.kind = kind
        self.refuse_mixed = refuse_mixed
        self.device = torch.device(kind, 0)
        self.waits: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()
        self.bytes: dict[str, int] = {}
        self.kernels: collections.Counter[str] = collections.Counter()
        self.mixed: collections.Counter[str] = collections.Counter()
        # By address. A weak reference keeps an address from being used again
        self.storages: dict[int, StorageWeakRef] = {}
        # How many calls of Python with operands on the device are under way
        self.calls = 0

    @property
    def launches(self) -> int:
        """How many kernels have computed on the device."""
        return self.kernels.total()

    @property
    def largest_copy(self) -> int:
        """Bytes of the largest copy to the device."""
        return max(self.bytes.values(), default=0)

    def forget(self) -> None:
        """Note from here on as if nothing had happened before."""
        for notes in (self.waits, self.copies, self.kernels, self.mixed, self.bytes):
            notes.clear()

    def note_bytes(self, tensor: torch.Tensor) -> None:
        line = place()
        self.bytes[line] = max(self.bytes.get(line, 0), tensor.nbytes)

    def holds(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            if tensor.device.type != "cpu":
                return False
            return tensor.untyped_storage()._cdata in self.storages

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """From now on the tensor, with all that shares its storage, is on the device."""
        with torch._C.DisableTorchFunction():
            # Shapes without numbers stay what they are
            if tensor.device.type != "cpu":
                return tensor
            if tensor.dtype in LACKING_TYPES[self.kind]:
                raise TypeError(
                    f"Cannot convert a {self.kind.upper()} Tensor to {tensor.dtype} dtype as the "
                    f"framework doesn't support it, at {place()}"
                )
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def take_all(self, result: Any) -> Any:
        return tree_map_only(torch.Tensor, self.take, result)

    def operands(self, *values: Any) -> tuple[bool, bool]:
        """Whether there are operands on the device, and others on the CPU that have an axis.

        A number in a tensor without axes may be combined with tensors of any device.
        """
        tensors = [value for value in tree_iter(values) if isinstance(value, torch.Tensor)]
        with torch._C.DisableTorchFunction():
            real = [tensor for tensor in tensors if tensor.device.type == "cpu"]
            on_device = [self.holds(tensor) for tensor in real]
            on_cpu = [
                tensor.ndim > 0 and not held for tensor, held in zip(real, on_device, strict=True)
            ]
        return any(on_device), any(on_cpu)


def place() -> str:
    """The line of the project that is being run, or "?" where none is."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        is_ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts
        is_watching = is_ours and path.relative_to(ROOT).parts[0] in ("tests", "benchmarks")
        # Of send(), which is how the program copies, who called it
        if is_ours and not is_watching and frame.f_code.co_name != "send":
            text = linecache.getline(str(path), frame.f_lineno).strip()
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} {text}"
        frame = frame.f_back
    return "?"


class Emulation(TorchFunctionMode):
    """Answers for the device where Python calls torch."""

    def __init__(self, emulated: EmulatedDevice):
        super().__init__()
        self.emulated = emulated

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        emulated = self.emulated
        # Compared by value: every access to a property makes another getter
        if func == torch.Tensor.device.__get__:
            return emulated.device if emulated.holds(args[0]) else func(*args)
        for kind in LACKING_TYPES:
            if func == getattr(torch.Tensor, f"is_{kind}").__get__:
                return kind == emulated.kind and emulated.holds(args[0])
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and emulated.holds(args[0]):
            raise TypeError(f"can't convert {emulated.kind} tensor to numpy, at {place()}")
        if func is torch.Tensor.cpu:
            return self.copy(args[0], CPU, {})
        if func is torch.Tensor.cuda:
            return self.copy(args[0], torch.device("cuda"), {})
        if func is torch.Tensor.to:
            return self.to(*args, **kwargs)
        if func is torch.Tensor.copy_:
            self.note_copy(args[1], args[0], kwargs.get("non_blocking", False))

        on_device, _ = emulated.operands(args, kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == emulated.kind:
            kwargs["device"] = CPU
            if kwargs.get("generator") is not None:
                kwargs["generator"] = None
            result = emulated.take_all(func(*args, **kwargs))
            if func in (torch.tensor, torch.as_tensor):
                emulated.waits[f"{func.__name__}(…, device) at {place()}"] += 1
                emulated.note_bytes(result)
            return result
        if not on_device:
            return func(*args, **kwargs)
        # Made on the CPU in the shape of a tensor on the device
        if device is not None and torch.device(device).type == "cpu":
            with kernels_paused():
                return func(*args, **kwargs)
        emulated.calls += 1
        try:
            return func(*args, **kwargs)
        finally:
            emulated.calls -= 1

    def to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Tensor.to in all its forms: device, type, another tensor."""
        device = CPU if not self.emulated.holds(tensor) else self.emulated.device
        options: dict[str, Any] = {}
        # (device, dtype, non_blocking, copy), (dtype, non_blocking, copy) or (other, …)
        flags = []
        for value in args:
            if isinstance(value, torch.Tensor):
                device, options["dtype"] = value.device, value.dtype
                device = self.emulated.device if self.emulated.holds(value) else device
            elif isinstance(value, torch.dtype):
                options["dtype"] = value
            elif isinstance(value, bool):
                flags.append(value)
            elif value is not None:
                device = torch.device(value)
        options |= dict(zip(("non_blocking", "copy"), flags, strict=False))
        options |= {key: value for key, value in kwargs.items() if value is not None}
        return self.copy(tensor, torch.device(options.pop("device", device)), options)

    def copy(
        self, tensor: torch.Tensor, device: torch.device, options: dict[str, Any]
    ) -> torch.Tensor:
        """The tensor on a device, in the type of options["dtype"]."""
        emulated = self.emulated
        held = emulated.holds(tensor)
        goes = device.type == emulated.kind
        if device.type not in (emulated.kind, "cpu"):
            return tensor.to(device, **options)
        if held == goes:
            return self.call(tensor.to, held, **options)
        non_blocking = options.pop("non_blocking", False)
        if goes:
            emulated.note_bytes(tensor)
        if goes and non_blocking:
            emulated.copies[f"copy at {place()}"] += 1
        else:
            emulated.waits[f"copy to {device.type} at {place()}"] += 1
        options["copy"] = True
        # Not handed on from the input: the copy is where the input is not
        with kernels_paused():
            result = tensor.to(**options)
        return emulated.take(result) if goes else result

    def call(self, function: Any, on_device: bool, **options: Any) -> Any:
        self.emulated.calls += on_device
        try:
            return function(**options)
        finally:
            self.emulated.calls -= on_device

    def note_copy(self, source: Any, target: torch.Tensor, non_blocking: bool) -> None:
        if not isinstance(source, torch.Tensor):
            return
        from_device, to_device = self.emulated.holds(source), self.emulated.holds(target)
        if from_device != to_device:
            noted = self.emulated.copies if to_device and non_blocking else self.emulated.waits
            noted[f"copy_ at {place()}"] += 1
        if to_device and not from_device:
            self.emulated.note_bytes(source)


class Kernels(TorchDispatchMode):
    """Hands the device on from a kernel's inputs to its outputs, and refuses what it can't do."""

    paused = 0

    def __init__(self, emulated: EmulatedDevice):
        super().__init__()
        self.emulated = emulated

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if Kernels.paused:
            return func(*args, **kwargs)
        emulated = self.emulated
        name = func.overloadpacket.__name__
        on_device, on_cpu = emulated.operands(args, kwargs)
        if on_device and on_cpu and name not in MIXING:
            if emulated.refuse_mixed:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, in {name} at {place()}"
                )
            emulated.mixed[f"{name} at {place()}"] += 1
        result = func(*args, **kwargs)

        # What a call with operands on the device makes out of nothing is there too
        made = not on_device and not on_cpu and emulated.calls > 0
        if not (on_device or made):
            return result
        # Indices on the CPU are copied first
        indexed = on_device and on_cpu and name in INDEXING
        if name in WAITING or indexed or has_mask(name, args):
            emulated.waits[f"{name} at {place()}"] += 1
        if name == "copy_" and not emulated.holds(args[0]):
            return result
        if name not in kernels_of(emulated.kind) | OF_THE_CPU:
            raise NotImplementedError(
                f"{name} is not implemented for {emulated.kind.upper()}, at {place()}"
            )
        if not (func.is_view or name in WITHOUT_KERNEL):
            emulated.kernels[name] += kernels_of_call(name, args)
        return emulated.take_all(result)


def kernels_of_call(name: str, args: tuple) -> int:
    """How many kernels a call of torch is on a GPU: one, or one a tensor.

    A _foreach function is one kernel where the tensors of its lists have the same shapes and types
    and lie in memory alike, and torch goes through them one by one where they do not.
    """
    lists = [value for value in args if is_list_of_tensors(value)]
    if not name.startswith("_foreach") or not lists:
        return 1
    with torch._C.DisableTorchFunction():
        alike = all(
            (tensor.shape, tensor.dtype, tensor.stride()) == (like.shape, like.dtype, like.stride())
            for others in lists[1:]
            for tensor, like in zip(others, lists[0], strict=True)
        )
    return 1 if alike else len(lists[0])


def is_list_of_tensors(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(item, torch.Tensor) for item in value)


def has_mask(name: str, args: tuple) -> bool:
    """Whether a call indexes by a mask: the host waits for how many entries are true."""
    if "index" not in name or len(args) < 2 or not isinstance(args[1], list | tuple):
        return False
    return any(isinstance(index, torch.Tensor) and index.dtype is torch.bool for index in args[1])


@contextlib.contextmanager
def kernels_paused() -> Iterator[None]:
    """Within the block kernels run as always."""
    Kernels.paused += 1
    try:
        yield
    finally:
        Kernels.paused -= 1


@functools.cache
def kernels_of(kind: str) -> set[str]:
    """The names of the kernels that torch has for a device, by its own table.

    A kernel of several variants counts where one of them is there.
    """
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    delegates: dict[str, str] = {}
    available: dict[str, bool] = {}
    for entry in re.split(r"^- func: ", path.read_text(), flags=re.MULTILINE)[1:]:
        name = re.match(r"[\w.]+", entry)
        assert name is not None
        keys = {key.strip() for line in dispatch_lines(entry) for key in line.split(",")}
        delegate = re.search(r"^  structured_delegate: ([\w.]+)", entry, flags=re.MULTILINE)
        if delegate:
            delegates[name[0]] = delegate[1]
        # Without a table of its own a kernel is made of others
        available[name[0]] = not keys or bool(keys & (EVERYWHERE | {kind.upper()}))
    for name, delegate in delegates.items():
        available[name] = available[delegate]
    return {name.partition(".")[0] for name, there in available.items() if there}


def dispatch_lines(entry: str) -> list[str]:
    """The keys of an entry's dispatch table, such as "CPU, CUDA", one string a line."""
    table = re.search(r"^  dispatch:\n((?:    .+\n)+)", entry, flags=re.MULTILINE)
    return [line.partition(":")[0] for line in table[1].splitlines()] if table else []


@contextlib.contextmanager
def emulated_device(kind: str, refuse_mixed: bool = True) -> Iterator[EmulatedDevice]:
    """Within the block torch has a device of this kind, "mps" or "cuda", that is really the CPU.

    refuse_mixed: raise where operands are on two devices; otherwise this is counted.
    """
    emulated = EmulatedDevice(kind, refuse_mixed)
    autocast, group = torch.autocast, torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype

    def group_by_device(tensors: Any, *options: Any) -> Any:
        """torch's own groups tensors below Python, by the device on which they really are."""
        groups = group(tensors, *options)
        return {
            (emulated.device if emulated.holds(members[0][0]) else device, dtype): (members, where)
            for (device, dtype), (members, where) in groups.items()
        }

    with contextlib.ExitStack() as stack:
        for name, value in {
            "torch.backends.mps.is_available": lambda: kind == "mps",
            "torch.mps.manual_seed": lambda seed: None,
            "torch.mps.empty_cache": lambda: None,
            "torch.mps.synchronize": lambda: note_synchronization(emulated),
            "torch.cuda.is_available": lambda: kind == "cuda",
            "torch.cuda.device_count": lambda: int(kind == "cuda"),
            "torch.cuda.manual_seed_all": lambda seed: None,
            "torch.cuda.set_device": lambda device: None,
            "torch.cuda.get_device_capability": lambda device=None: (9, 0),
            "torch.cuda.get_device_name": lambda device=None: "an emulated GPU",
            "torch.cuda.max_memory_allocated": lambda device=None: 1 << 30,
            "torch.cuda.mem_get_info": lambda device=None: (1 << 30, 1 << 30),
            "torch.cuda.empty_cache": lambda: None,
            "torch.cuda.reset_peak_memory_stats": lambda device=None: None,
            "torch.cuda.synchronize": lambda device=None: note_synchronization(emulated),
            "torch.cuda.Stream": EmulatedStream,
            "torch.cuda.current_stream": EmulatedStream,
            "torch.cuda.stream": contextlib.nullcontext,
            "torch.Generator": EmulatedGenerator,
            "torch.Tensor.record_stream": lambda tensor, stream: None,
            # By it loaders decide whether they can pin memory
            "torch.accelerator.is_available": lambda: False,
            "torch.optim.Optimizer._accelerator_graph_capture_health_check": lambda self: None,
            "torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype": group_by_device,
            "torch.optim.optimizer._group_tensors_by_device_and_dtype": group_by_device,
            "torch.autocast": functools.partial(emulated_autocast, autocast),
        }.items():
            # By import, since torch.optim hides its module `optimizer` from getattr()
            owner, _, attribute = name.rpartition(".")
            stack.enter_context(mock.patch.object(pkgutil.resolve_name(owner), attribute, value))
        stack.enter_context(Emulation(emulated))
        stack.enter_context(Kernels(emulated))
        yield emulated


class EmulatedStream:
    """A stream of the device: all that is asked for is done at once, and in order."""

    def __init__(self, device: torch.device | None = None):
        self.device = device

    def wait_stream(self, stream: "EmulatedStream") -> None:
        pass


class EmulatedGenerator(torch.Generator):
    """A generator of the device, which draws the CPU's numbers."""

    def __new__(cls, device: torch.device | str = "cpu"):
        return super().__new__(cls, "cpu")


def note_synchronization(emulated: EmulatedDevice) -> None:
    emulated.waits[f"synchronize at {place()}"] += 1


def emulated_autocast(autocast: Any, device_type: str, *args: Any, **kwargs: Any) -> Any:
    return autocast("cpu", *args, **kwargs)
