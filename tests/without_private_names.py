"""Run funcnet on a torch that has dropped every private name: `python THIS FILE`.

`results` is what is computed with the names and without; the script writes it to FILE.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

COMPAT = Path(__file__).parents[1] / "funcnet" / "compat.py"
UNDOCUMENTED = frozenset(("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"))
"""Names without an underscore that torch does not document."""


def is_private(name: str) -> bool:
    return name in UNDOCUMENTED or (name.startswith("_") and not name.endswith("__"))


class Lookups:
    """The getattr that funcnet.compat looks names up with, which finds some of them gone."""

    def __init__(self, is_gone: Callable[[str], bool]) -> None:
        self.is_gone = is_gone
        self.paths = {id(torch): "torch"}
        self.found: dict[str, Any] = {}
        """What each path led to, None for what is gone."""
        self.owners: dict[str, Any] = {}

    def __call__(self, owner: Any, name: str, *default: Any) -> Any:
        if not default:
            return getattr(owner, name)
        value = default[0] if self.is_gone(name) else getattr(owner, name, *default)
        if owner is not None:
            path = f"{self.paths.get(id(owner), type(owner).__name__)}.{name}"
            self.paths[id(value)] = path
            self.found[path], self.owners[path] = value, owner
        return value


def load(is_gone: Callable[[str], bool]) -> tuple[Any, Lookups]:
    """Return (funcnet.compat as it is where some names are gone, its lookups)."""
    spec = importlib.util.spec_from_file_location("funcnet.compat", COMPAT)
    assert spec is not None
    assert spec.loader is not None
    module, lookups = importlib.util.module_from_spec(spec), Lookups(is_gone)
    vars(module)["getattr"] = lookups
    spec.loader.exec_module(module)
    return module, lookups


@contextmanager
def taken_away(lookups: Lookups) -> Iterator[list[str]]:
    """Take private functions and classes out of torch's own modules; they come back afterwards."""
    namespaces = (ModuleType, type(torch.ops.aten))
    paths = [
        path
        for path, owner in lookups.owners.items()
        if isinstance(owner, namespaces)
        and not isinstance(lookups.found[path], ModuleType)
        and any(map(is_private, path.split(".")))
    ]
    try:
        for path in paths:
            setattr(lookups.owners[path], path.rpartition(".")[2], None)
        yield paths
    finally:
        for path in paths:
            setattr(lookups.owners[path], path.rpartition(".")[2], lookups.found[path])


def layers(fn: Any) -> list[tuple[Any, tuple[int, ...]]]:
    return [
        (fn.Softmax(dim=1), (3, 4)),
        (fn.LogSoftmax(dim=-1), (3, 4)),
        (fn.PReLU(3), (3, 4, 2)),
        (fn.AdaptiveAvgPool2d((3, 2)), (2, 7, 5)),
        (fn.AdaptiveAvgPool3d((2, 3, 1)), (2, 5, 4, 3)),
        (fn.MultiheadAttention(2, causal=True), (5, 4)),
        (fn.LSTM(3, bidirectional=True), (4, 2)),
    ]


def results() -> dict[str, list[torch.Tensor]]:
    """Values and gradients of all that is computed by a private name of torch."""
    import optree

    import funcnet as fn

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    found = {}
    for net, shape in layers(fn):
        dtype = torch.float32 if isinstance(net, fn.LSTM) else torch.float64
        x = normal(2, *shape, dtype=dtype)
        params = net.init(fn.key(0), shape, dtype=dtype)
        y, residuals = net.fwd(params, x)
        gradients = net.bwd(params, residuals, normal(*y.shape, dtype=dtype))
        found[repr(net)] = [y, *optree.tree_leaves(gradients)]
    logits, classes = normal(4, 5, 3), torch.randint(5, (4, 3), generator=generator)
    for target in (classes, normal(4, 5, 3).softmax(1)):
        loss = fn.CrossEntropy(label_smoothing=0.1)
        found[f"CrossEntropy, {target.dtype}"] = [
            loss.apply(logits, target),
            loss.vjp(logits, target),
        ]
    tree = {"a": normal(3, 4), "b": (normal(2), normal(1))}
    grads = optree.tree_map(lambda p: normal(*p.shape), tree)
    for optimizer in (
        fn.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        fn.Adam(0.1, amsgrad=True, weight_decay=0.1, maximize=True),
        fn.AdamW(0.1),
        fn.RMSprop(0.1, centered=True, momentum=0.9),
    ):
        params, written = tree, optree.tree_map(torch.clone, tree)
        state, other = optimizer.init(params), optimizer.init(written)
        for _ in range(3):
            params, state = optimizer.step(params, grads, state)
            optimizer.step_(written, grads, other)
        found[repr(optimizer)] = [*optree.tree_leaves(params), *optree.tree_leaves(written)]
    relu = torch.nn.ReLU()
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), relu, torch.nn.Linear(4, 4), relu).double()
    torch.nn.utils.vector_to_parameters(normal(40), module.parameters())
    x, dy = normal(3, 4), normal(3, 4)
    for translate in (fn.interop.from_torch, fn.interop.wrap):
        net, params = translate(module, (4,))
        found[repr(net)] = [net.apply(params, x), *optree.tree_leaves(net.vjp(params, x, dy))]
        found[f"vmap of {net!r}"] = [torch.func.vmap(net.apply, (None, 0))(params, x[:, None])]
    clipped, norm = fn.clip_by_global_norm(grads, 0.5)
    found["clip_by_global_norm"] = [norm, *optree.tree_leaves(clipped)]
    return found


def main(path: str) -> None:
    compat, _ = load(is_private)
    sys.modules["funcnet.compat"] = compat
    with taken_away(load(lambda name: False)[1]) as paths:
        import funcnet as fn
        import funcnet.testing

        assert getattr(torch, "_foreach_add") is None, paths  # noqa: B009
    assert fn.Softmax.__module__ == "funcnet.layers.activations"
    for net, shape in layers(fn):
        dtype = torch.float32 if isinstance(net, fn.LSTM) else torch.float64
        params = net.init(fn.key(1), shape, dtype=dtype)
        funcnet.testing.check_vjp(net, params, fn.normal(fn.key(2), (2, *shape), dtype=dtype))
    torch.save(results(), path)


if __name__ == "__main__":
    main(sys.argv[1])
