"""Stateless randomness: every random number is a function of the seed, a purpose and counters.

Nothing is stored and nothing is used up. So the order of samples and every augmentation are the
same for any number of workers or processes, and a resumed run draws what the uninterrupted one
would have drawn. The mixing function is splitmix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators") in wrapping 64-bit integers.
"""

import zlib

import torch
from torch import Tensor


def _to_int64(value: int) -> int:
    """The signed integer that torch holds for the lowest 64 bits of a Python int."""
    return ((value + 2**63) % 2**64) - 2**63


# The increment and the two multipliers of splitmix64
_GOLDEN_GAMMA = _to_int64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _to_int64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _to_int64(0x94D049BB133111EB)


def _logical_shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift zeros in from the left; torch's own shift repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """One step of splitmix64 on int64 states of any shape."""
    z = z + _GOLDEN_GAMMA
    z = (z ^ _logical_shift_right(z, 30)) * _MULTIPLIER_1
    z = (z ^ _logical_shift_right(z, 27)) * _MULTIPLIER_2
    return z ^ _logical_shift_right(z, 31)


def random_bits(seed: int, purpose: str, *counters: int | Tensor) -> Tensor:
    """64 random bits as int64, one for each element of the counters, which broadcast.

    purpose: keeps apart what is drawn with the same seed and counters, such as "crop" and "flip".
    """
    # Seed, purpose and counters are mixed in one after another, so that their order matters
    z = _mix(torch.tensor(_to_int64(seed)) ^ zlib.crc32(purpose.encode()))
    return more_bits(z, *counters)


def more_bits(bits: Tensor, *counters: int | Tensor) -> Tensor:
    """Mix further counters in, on the device of the bits and the counters.

    more_bits(random_bits(seed, purpose, a), b) is random_bits(seed, purpose, a, b).
    """
    for counter in counters:
        bits = _mix(bits ^ torch.as_tensor(counter, dtype=torch.int64))
    return bits


def to_uniform(bits: Tensor) -> Tensor:
    """Random bits as float32 numbers in [0, 1)."""
    # 24 bits are what a float32 holds exactly, so that 1 is never reached by rounding
    return _logical_shift_right(bits, 40).float() * 2.0**-24


def random_uniform(seed: int, purpose: str, *counters: int | Tensor) -> Tensor:
    """Float32 numbers in [0, 1), one for each element of the counters, which broadcast."""
    return to_uniform(random_bits(seed, purpose, *counters))


def random_seed(seed: int, purpose: str, *counters: int) -> int:
    """One number from 0 to 2**63 - 1, to seed a generator with."""
    return int(_logical_shift_right(random_bits(seed, purpose, *counters), 1))


def permutation(n: int, seed: int, purpose: str, *counters: int) -> Tensor:
    """The numbers 0 to n - 1 in an order that depends on the arguments alone; int64 (n,)."""
    generator = torch.Generator().manual_seed(random_seed(seed, purpose, *counters))
    return torch.randperm(n, generator=generator)
