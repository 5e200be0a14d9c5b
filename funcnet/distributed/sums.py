"""Sums over all ranks, in few messages, sent while others are still computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from funcnet.distributed.call import Call
from funcnet.ops.accumulation import accumulator_dtype


@dataclass
class Sums:
    """Tensors that are added up over all ranks, which add the same ones in the same order.

    They are packed into buckets, one all-reduce each, by the dtype to add up in: float32 for 16
    bits, which do not hold a sum of many small terms. A bucket leaves when it has `bucket_bytes`.
    """

    call: Call
    bucket_bytes: float = float("inf")
    _open: dict[torch.dtype, dict[Hashable, Tensor]] = field(default_factory=dict)
    _sizes: Counter[torch.dtype] = field(default_factory=Counter)
    _sent: list[tuple[Callable[[], None], Tensor, dict[Hashable, Tensor]]] = field(
        default_factory=list
    )

    @property
    def is_under_way(self) -> bool:
        """Whether a bucket has left."""
        return bool(self._sent)

    def add(self, name: Hashable, tensor: Tensor) -> None:
        """Put a tensor into the open bucket of its dtype."""
        dtype = accumulator_dtype(tensor.dtype)
        bucket = self._open.setdefault(dtype, {})
        bucket[name] = tensor
        self._sizes[dtype] += tensor.numel() * dtype.itemsize
        if self._sizes[dtype] >= self.bucket_bytes:
            self._send(dtype)

    def send(self) -> None:
        """Send the open buckets."""
        for dtype in [*self._open]:
            self._send(dtype)

    def _send(self, dtype: torch.dtype) -> None:
        bucket = self._open.pop(dtype)
        del self._sizes[dtype]
        # Ranks may differ in memory format: entries are sent in row-major order.
        packed = torch.cat([x.to(dtype).reshape(-1) for x in bucket.values()])
        self._sent.append((self.call.all_reduce(packed), packed, bucket))

    def wait(self) -> dict[Hashable, Tensor]:
        """The sums by name: new tensors with the dtypes and memory formats of what was added."""
        self.send()
        found = {}
        for wait, packed, bucket in self._sent:
            wait()
            parts = torch.split(packed, [x.numel() for x in bucket.values()])
            for (name, x), part in zip(bucket.items(), parts, strict=True):
                found[name] = torch.empty_like(x).copy_(part.view(x.shape))
        self._sent.clear()
        return found
