"""Explicit randomness: immutable keys instead of a global generator.

A key is 128 bits. A cryptographic hash derives new keys from old ones, so that two keys that are
derived differently are different for all practical purposes. NumPy's counter-based generator Philox
draws numbers from a key (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). It
always runs on the CPU, so that a key means the same numbers on every device.

    >>> import funcnet as fn
    >>> weights_key, noise_key = fn.split(fn.key(0))
    >>> fn.uniform(weights_key, (2, 3)).shape
    torch.Size([2, 3])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from funcnet.checks import as_index, as_int, name_of, shown

_KEY_BYTES = 16
_KEYS = 2 ** (8 * _KEY_BYTES)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Key:
    """A source of random numbers that is a value: immutable, hashable, picklable. Made by `key`.

    >>> isinstance(key(0), Key), hash(key(0)) == hash(key(0))
    (True, True)
    """

    data: int
    _halves: Tensor = field(init=False, repr=False, compare=False)
    """The low and the high 64 bits of data, a tensor of int64.

    torch.compile takes a tensor for an input of the graph; for an int, it would compile again when
    the int changes. It takes an array of NumPy for an input, too, but neither in
    torch.inference_mode nor inside of torch.func.grad.
    """

    def __post_init__(self) -> None:
        data = self.data
        if not (type(data) is int and 0 <= data < _KEYS):
            raise ValueError(f"Key: expected an int in [0, 2**128), got {data!r}")
        own = bytearray(data.to_bytes(_KEY_BYTES, "little"))
        object.__setattr__(self, "_halves", torch.frombuffer(own, dtype=torch.int64))

    def __repr__(self) -> str:
        return f"Key(0x{self.data:032x})"

    def __reduce__(self) -> tuple[type[Key], tuple[int]]:
        return Key, (self.data,)


class _TracedKey(Key):
    """A key that is derived in a function which torch.compile traces: its halves are a tensor."""

    def __init__(self, halves: Tensor) -> None:
        object.__setattr__(self, "_halves", halves)

    @property
    def data(self) -> int:
        """The bits, which the halves hold once the compiled function runs."""
        low, high = (half % 2**64 for half in self._halves.tolist())
        return int(low + (high << 64))

    def __eq__(self, other: object) -> bool:
        return self.data == other.data if isinstance(other, Key) else NotImplemented

    __hash__ = Key.__hash__


_ROOT = Key(0)


def key(seed: int) -> Key:
    """The key of a seed, an int in [0, 2⁶⁴).

    Raises TypeError or ValueError for anything else.

    >>> key(0) == key(0), key(0) == key(1)
    (True, False)
    """
    return _derive("seed", _ROOT, _uint64("key", "seed", seed))


def split(key: Key, num: int = 2) -> tuple[Key, ...]:
    """`num` new keys, all different. `split(key, 3)` starts with the keys of `split(key, 2)`.

    Raises ValueError if `num` is below 1, TypeError for what is not a key or an int.

    >>> first, second = split(key(0))
    >>> len(set(split(first, 5)) | {second})
    6
    """
    check_key("split", key)
    return tuple(_derive("split", key, i) for i in range(as_int("split", "num", num, 1)))


def fold_in(key: Key, data: int) -> Key:
    """The key for item number `data` (a step, a layer), an int in [0, 2⁶⁴).

    Raises TypeError or ValueError for anything else.

    >>> fold_in(key(0), 7) == fold_in(key(0), 7)
    True
    """
    check_key("fold_in", key)
    return _derive("fold_in", key, _uint64("fold_in", "data", data))


def uniform(
    key: Key,
    shape: Sequence[int],
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Numbers drawn uniformly from [low, high); float32 on the CPU unless told otherwise.

    Raises ValueError unless low ≤ high, both are within the range of the dtype, and high − low is
    within that of float32 (of float64, if that is the dtype), in which numbers are drawn. Raises
    TypeError for another dtype than float16, bfloat16, float32 and float64, and for what is not a
    number, key or shape.

    >>> bool((uniform(key(0), (1000,), -1.0, 1.0).abs() <= 1).all())
    True
    """
    low, high = _number("uniform", "low", low), _number("uniform", "high", high)
    if not low <= high:
        raise ValueError(f"uniform: expected low <= high, got low={low}, high={high}")
    check_dtype("uniform", dtype)
    check_device("uniform", device)
    dtype = dtype or torch.float32
    most, widest = torch.finfo(dtype).max, float(np.finfo(_draw_dtype(dtype)).max)
    if not (max(abs(low), abs(high)) <= most and high - low <= widest):
        raise ValueError(f"uniform: expected a range within {dtype}, got [{low}, {high})")
    return _drawn("uniform", key, shape, (low, high), dtype).to(device=device)


def normal(
    key: Key,
    shape: Sequence[int],
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Numbers from the normal distribution N(mean, std²); float32 on the CPU unless told otherwise.

    Raises ValueError unless std ≥ 0, and mean ± std within the range of the dtype; TypeError for
    another dtype than float16, bfloat16, float32 and float64, or what is not a number, key or
    shape.

    >>> normal(key(0), (2, 3), dtype=torch.float64).dtype
    torch.float64
    """
    mean, std = _number("normal", "mean", mean), _number("normal", "std", std)
    if not std >= 0:
        raise ValueError(f"normal: expected std >= 0, got {std}")
    check_dtype("normal", dtype)
    check_device("normal", device)
    dtype = dtype or torch.float32
    if not abs(mean) + std <= torch.finfo(dtype).max:
        raise ValueError(f"normal: expected mean ± std within {dtype}, got {mean} ± {std}")
    return _drawn("normal", key, shape, (mean, std), dtype).to(device=device)


def bernoulli(
    key: Key, p: float, shape: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """A bool tensor, each entry True with probability p.

    Raises ValueError unless 0 ≤ p ≤ 1, TypeError for what is not a key, number or shape.

    >>> bernoulli(key(0), 1.0, (3,))
    tensor([True, True, True])
    """
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"bernoulli: expected a probability p in [0, 1], got {shown(p)}")
    if not 0 <= p <= 1:
        raise ValueError(f"bernoulli: expected a probability p in [0, 1], got {p}")
    check_device("bernoulli", device)
    return _drawn("bernoulli", key, shape, (float(p),), torch.bool).to(device=device)


def permutation(key: Key, n: int) -> Tensor:
    """The numbers 0 … n − 1 in random order, int64 on the CPU. Every order is equally probable.

    Raises ValueError unless 0 ≤ n < 2⁶³, TypeError for what is not a key or an int.

    >>> sorted(permutation(key(0), 5).tolist())
    [0, 1, 2, 3, 4]
    """
    count = as_int("permutation", "n", n, 0)
    if count >= 2**63:
        raise ValueError(f"permutation: expected n < 2**63, got {count}")
    return _drawn("permutation", key, (count,), (), torch.int64)


def check_draw(
    who: object, key: Key, dtype: torch.dtype | None, device: torch.device | str | None
) -> None:
    """Raise unless numbers can be drawn with this key, in this dtype and for this device."""
    check_key(who, key)
    check_dtype(who, dtype)
    check_device(who, device)


def check_dtype(who: object, dtype: torch.dtype | None) -> None:
    """Raise TypeError unless networks can compute in this dtype, which None leaves open."""
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(
            f"{name_of(who)}: expected a floating-point dtype of torch, of 16 bits or more, "
            f"got {shown(dtype)}"
        )


def check_device(who: object, device: torch.device | str | None) -> None:
    """Raise ValueError or TypeError unless torch knows this device. None leaves it open."""
    if device is None or isinstance(device, torch.device):
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{name_of(who)}: expected a device of torch, such as 'cpu', got {shown(device)}"
        ) from None


def check_key(who: object, key: Key) -> None:
    """Raise TypeError unless this is a key."""
    if not isinstance(key, Key):
        raise TypeError(
            f"{name_of(who)}: expected a key made by funcnet.key(seed), got {shown(key)}"
        )


def halves(key: Key) -> tuple[Any, Any]:
    """The low and the high 64 bits of a key as int64: ints, or tensors under torch.compile."""
    if torch.compiler.is_compiling():
        return key._halves[0], key._halves[1]
    return _signed(key.data % 2**64), _signed(key.data >> 64)


def _signed(number: int) -> int:
    """The int64 with the bits of a number in [0, 2⁶⁴)."""
    return number - 2**64 if number >= 2**63 else number


def _derive(purpose: str, key: Key, item: int) -> Key:
    if torch.compiler.is_compiling():
        return _TracedKey(_derive_halves(key._halves, purpose, _signed(item)))
    message = key.data.to_bytes(_KEY_BYTES, "little") + item.to_bytes(8, "little")
    return Key(int.from_bytes(_hash(purpose, message), "little"))


@torch.library.custom_op("funcnet::derive_key", mutates_args=())
def _derive_halves(halves: Tensor, purpose: str, item: int) -> Tensor:
    """The halves of the derived key, computed when a compiled function runs."""
    message = halves.numpy().tobytes() + item.to_bytes(8, "little", signed=True)
    return torch.from_numpy(np.frombuffer(_hash(purpose, message), np.int64).copy())


@_derive_halves.register_fake
def _(halves: Tensor, purpose: str, item: int) -> Tensor:
    return torch.empty_like(halves)


def _hash(purpose: str, message: bytes) -> bytes:
    return blake2b(message, digest_size=_KEY_BYTES, person=purpose.encode()).digest()


# --- Drawing: one operation to torch.compile, which cannot look into NumPy


def _drawn(
    kind: str, key: Key, shape: Sequence[int], numbers: Sequence[float], dtype: torch.dtype
) -> Tensor:
    check_key(kind, key)
    sizes = _sizes(kind, shape)
    if torch.compiler.is_compiling():
        drawn: Tensor = _draw_halves(key._halves, kind, sizes, numbers, dtype)
        return drawn
    return _draw(key.data, kind, sizes, numbers, dtype)


def _draw(
    data: int, kind: str, sizes: Sequence[int], numbers: Sequence[float], dtype: torch.dtype
) -> Tensor:
    generator = np.random.Generator(np.random.Philox(key=data))
    return _DRAWS[kind](generator, tuple(sizes), *numbers, dtype)


@torch.library.custom_op("funcnet::draw", mutates_args=())
def _draw_halves(
    halves: Tensor, kind: str, sizes: Sequence[int], numbers: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """`_draw`, when a compiled function runs."""
    return _draw(_TracedKey(halves).data, kind, sizes, numbers, dtype)


@_draw_halves.register_fake
def _(
    halves: Tensor, kind: str, sizes: Sequence[int], numbers: Sequence[float], dtype: torch.dtype
) -> Tensor:
    return halves.new_empty(sizes, dtype=dtype)


_Sizes: TypeAlias = tuple[int, ...]


def _draw_dtype(dtype: torch.dtype) -> type[np.floating]:
    """NumPy's dtype in which numbers of a dtype are drawn."""
    return np.float64 if dtype == torch.float64 else np.float32


def _draw_uniform(
    generator: np.random.Generator, sizes: _Sizes, low: float, high: float, dtype: torch.dtype
) -> Tensor:
    unit = generator.random(sizes, _draw_dtype(dtype))
    x = (torch.from_numpy(np.asarray(unit)) * (high - low) + low).to(dtype)
    return x.clamp(*_within(low, high, dtype))


def _draw_normal(
    generator: np.random.Generator, sizes: _Sizes, mean: float, std: float, dtype: torch.dtype
) -> Tensor:
    standard = generator.standard_normal(sizes, _draw_dtype(dtype))
    return torch.from_numpy(np.asarray(standard)).mul_(std).add_(mean).to(dtype)


def _draw_bernoulli(
    generator: np.random.Generator, sizes: _Sizes, p: float, _: torch.dtype
) -> Tensor:
    drawn = np.empty(sizes, np.bool_)
    flat = drawn.reshape(-1)
    # In parts, as the numbers in float64 take eight times the memory of what is drawn.
    for start in range(0, flat.size, _AT_ONCE):
        part = flat[start : start + _AT_ONCE]
        part[:] = generator.random(part.size) < p
    return torch.from_numpy(drawn)


_AT_ONCE = 2**16


def _draw_permutation(generator: np.random.Generator, sizes: _Sizes, _: torch.dtype) -> Tensor:
    order = generator.permutation(sizes[0])
    return torch.from_numpy(order.astype(np.int64, copy=False))


_DRAWS: dict[str, Callable[..., Tensor]] = {
    "uniform": _draw_uniform,
    "normal": _draw_normal,
    "bernoulli": _draw_bernoulli,
    "permutation": _draw_permutation,
}


# --- Arguments


def _number(who: str, name: str, value: Any) -> float:
    try:
        number = None if isinstance(value, (bool, str)) else float(value)
    except TypeError:
        number = None
    except OverflowError:
        raise ValueError(f"{who}: expected {name} to fit in a float, got a larger int") from None
    if number is None:
        raise TypeError(f"{who}: expected {name} to be a number, got {shown(value)}")
    if not -math.inf < number < math.inf:  # math.isfinite() would break a graph of torch.compile
        raise ValueError(f"{who}: expected {name} to be finite, got {number}")
    return number


def _uint64(who: str, name: str, value: int) -> int:
    # as_index() would make a graph of torch.compile for this int alone, such as a step's.
    number = value if type(value) is int else as_index(who, name, value)
    if not 0 <= number < 2**64:
        raise ValueError(f"{who}: expected {name} in [0, 2**64), got {number}")
    return number


def _sizes(who: str, shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"{who}: expected shape to be a sequence of ints, got {shown(shape)}")
    return tuple(_uint64(who, "every size in shape", size) for size in shape)


def _within(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """The least and the greatest number of the dtype in [low, high), which rounding may leave; low,
    rounded, where there is none."""
    first, last = (torch.tensor([end], dtype=dtype, device="cpu") for end in (low, high))
    above = torch.nextafter(first, torch.full_like(first, math.inf))
    if first.item() < low and above.item() < high:
        first = above
    if last.item() >= high:
        last = torch.nextafter(last, torch.full_like(last, -math.inf))
    return first.item(), max(first.item(), last.item())
