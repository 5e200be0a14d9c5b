"""torch.autocast is a global state: layers compute in the dtype that they are handed instead."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A block in which autocast is off on the device of x."""
    if x.is_cpu:  # asked first, as `device` takes ten times as long
        device, enabled = "cpu", torch.is_autocast_enabled("cpu")
    else:
        device = x.device.type
        enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not enabled:
        return _NOTHING
    return torch.autocast(device, enabled=False)
