"""Trees on disk: files are complete or refused, keep every bit, and can be read by others.

    >>> import funcnet as fn, tempfile, os, torch
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> net = fn.Sequential(fn.Conv2d(4, 3), fn.ReLU())
    >>> params = net.init(fn.key(0), (3, 8, 8))
    >>> fn.save_model(path, net, params, metadata={"epoch": 3})
    >>> again, params = fn.load_model(path)
    >>> again == net
    True
    >>> fn.inspect(path).shapes
    {'0.weight': (4, 3, 3, 3), '0.bias': (4,)}

`funcnet.checkpoint.container` describes the bytes of a file, `funcnet.checkpoint.structure` the
JSON of a tree's structure, `funcnet.tree` names like `0.weight`.
"""

from funcnet.checkpoint.checkpoints import Checkpoints
from funcnet.checkpoint.files import inspect, load, load_model, save, save_model
from funcnet.checkpoint.inspection import Inspection
from funcnet.checkpoint.structure import CheckpointError

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Inspection",
    "inspect",
    "load",
    "load_model",
    "save",
    "save_model",
]
