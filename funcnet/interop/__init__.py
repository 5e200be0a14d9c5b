"""Work with torch.nn: modules to networks and back, one inside the other, state dicts."""

from funcnet.interop.as_module import as_module
from funcnet.interop.from_torch import from_torch
from funcnet.interop.state_dict import load_state_dict, state_dict
from funcnet.interop.to_torch import to_torch
from funcnet.interop.wrap import wrap

__all__ = ["as_module", "from_torch", "load_state_dict", "state_dict", "to_torch", "wrap"]
