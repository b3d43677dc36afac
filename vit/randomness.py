"""Stateless randomness: every random number is a function of the seed, a purpose and counters.

Nothing is stored and nothing is used up, so the order of samples and every augmentation are the same for any number of
workers or processes, and a resumed run draws what the uninterrupted one would have drawn. The mixing is splitmix64
(Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") in wrapping 64-bit integers.
"""

import zlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The 64-bit pattern of a Python int, as the signed number torch holds it as."""
    return ((value + 2**63) % 2**64) - 2**63


_GOLDEN, _MIX1, _MIX2 = (
    _signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = z + _GOLDEN
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def random_bits(seed: int, purpose: str, *counters: int | Tensor) -> Tensor:
    """64 random bits as int64, one for each element of the counters, which broadcast against each other."""
    z = _mix(torch.tensor(_signed(seed)) ^ zlib.crc32(purpose.encode()))
    for counter in counters:
        z = _mix(z ^ torch.as_tensor(counter, dtype=torch.int64))
    return z


def random_uniform(seed: int, purpose: str, *counters: int | Tensor) -> Tensor:
    """Float32 numbers in [0, 1), one for each element of the broadcast counters."""
    return _shift(random_bits(seed, purpose, *counters), 40).to(torch.float32) * 2.0**-24


def random_seed(seed: int, purpose: str, *counters: int) -> int:
    """One number from 0 to 2**63 - 1, to seed a generator with."""
    return int(_shift(random_bits(seed, purpose, *counters), 1))


def permutation(n: int, seed: int, purpose: str, *counters: int) -> Tensor:
    """The numbers 0 to n - 1 in an order that depends on the arguments alone; int64 of shape (n,)."""
    return torch.randperm(
        n, generator=torch.Generator().manual_seed(random_seed(seed, purpose, *counters))
    )
