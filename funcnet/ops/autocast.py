"""torch.autocast is a global state: layers compute in the dtype that they are handed instead."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A block in which autocast is off on the device of x."""
    device = "cpu" if x.is_cpu else x.device.type  # x.device takes ten times as long as x.is_cpu
    available = x.is_cpu or torch.amp.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device):
        return _NOTHING
    return torch.autocast(device, enabled=False)
