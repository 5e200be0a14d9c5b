"""Parameters under PyTorch's names, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.checkpoint.memory_format import lay_out_as_init
from funcnet.checks import name_of, shown, sizes
from funcnet.interop.refusal import refusal
from funcnet.layer import Layer, Tree, check_net
from funcnet.leaves import shaped
from funcnet.tree import ROOT, child_names, children, leaf_names


def state_dict(params: Tree) -> dict[str, Tensor]:
    """Return the tensors of a tree of parameters by the names that PyTorch gives them.

    A name joins the keys that lead to a tensor by dots. Layers by position have the names of
    torch.nn.Sequential, `2.weight`; layers by name have those of modules that are attributes,
    `stem.weight`. The dict holds the tensors themselves, as `torch.nn.Module.state_dict` does.

    Raises TypeError for a leaf that is not a tensor.

    >>> import funcnet as fn
    >>> net = fn.Sequential(stem=fn.Conv2d(8, 3), body=fn.Sequential(fn.ReLU(), fn.Conv2d(8, 3)))
    >>> params = net.init(fn.key(0), (3, 16, 16))
    >>> list(fn.interop.state_dict(params))
    ['stem.weight', 'stem.bias', 'body.1.weight', 'body.1.bias']
    """
    return tensors_of("state_dict", params)


def tensors_of(who: str, params: Tree) -> dict[str, Tensor]:
    """Return the tensors by name. Errors begin with `who`."""
    if isinstance(params, Layer):  # which would be taken for a tree of its hyperparameters
        raise TypeError(f"{who}: expected params, as init makes them, got {shown(params)}")
    return dict(_named(who, params, ""))


def load_state_dict(net: Layer, shape: Sequence[int], state: Mapping[str, Tensor]) -> Tree:
    """Return the parameters of `net`, for examples of `shape`, with the values of a state dict.

    The names are those of `state_dict`. The tensors are copies, in the dtype and on the device that
    they have in `state`. They are laid out in memory as by `net.init`.

    Raises one ValueError that names all that is wrong: tensors that are missing, that the network
    does not have, of another shape, sparse, not floating-point, or of a dtype or device other than
    the first one's. Raises TypeError unless net is a Layer and `state` a mapping.

    >>> import funcnet as fn
    >>> import torch
    >>> net = fn.Sequential(fn.Linear(8), fn.ReLU(), fn.Linear(2))
    >>> module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> params = fn.interop.load_state_dict(net, (4,), module.state_dict())
    >>> params[2]["weight"].shape
    torch.Size([2, 8])
    >>> fn.interop.load_state_dict(net, (5,), {"0.bias": torch.zeros(8), "head": torch.zeros(1)})
    Traceback (most recent call last):
    ValueError: load_state_dict: expected the 4 tensors of Sequential of 3 layers, got
      0.weight: missing, expected shape (8, 5)
      2.weight: missing, expected shape (2, 8)
      2.bias: missing, expected shape (2,)
      head: unexpected, of shape (1,)
    """
    check_net("load_state_dict", net)
    if not isinstance(state, Mapping):
        raise TypeError(
            f"load_state_dict: expected state to be a dict of tensors, got {shown(state)}"
        )
    like = shaped(net, shape)
    expected = state_dict(like)
    wrong = list(_differences(expected, state))
    if wrong:
        count = len(expected)
        who = f"load_state_dict: expected the {count} tensors of {name_of(net)}"
        raise refusal(who, wrong, _remedy(state.keys() - expected.keys()))
    structure = optree.tree_structure(like)
    params = structure.unflatten(_copied(state[name]) for name in names_of(structure))
    lay_out_as_init(net, params)
    return params


def names_of(structure: optree.PyTreeSpec) -> list[str]:
    """Return the names of the leaves of a tree, in optree's order."""
    return [name or ROOT for name in leaf_names(structure)]


def _named(who: str, node: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    items = children(node)
    if items is None:
        if not isinstance(node, Tensor):
            raise TypeError(
                f"{who}: expected {name or 'params'} to be a tensor, or a tuple, list or dict "
                f"of such, got {type(node).__name__}"
            )
        yield name or ROOT, node
        return
    names = child_names(name, [child_key for child_key, _ in items])
    for child_name, (_, child) in zip(names, items, strict=True):
        yield from _named(who, child, child_name)


def _differences(expected: Mapping[str, Tensor], state: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each name that is not as expected."""
    first = next((name for name in expected if _is_floating_point(state.get(name))), None)
    for name, leaf in expected.items():
        if name not in state:
            yield f"{name}: missing, expected shape {sizes(leaf.shape)}"
            continue
        value = state[name]
        if not isinstance(value, Tensor):
            yield f"{name}: expected a tensor, got {type(value).__name__}"
            continue
        if value.layout != torch.strided or value.is_nested:
            yield f"{name}: expected a dense tensor, got {_layout(value)}"
            continue
        if value.shape != leaf.shape:
            yield f"{name}: expected shape {sizes(leaf.shape)}, got {sizes(value.shape)}"
        if not value.is_floating_point():
            yield f"{name}: expected a floating-point dtype, got {value.dtype}"
        elif first is not None and _kind(value) != _kind(state[first]):
            yield f"{name}: expected {_kind(state[first])} as {first}, got {_kind(value)}"
    for name in state:
        if name not in expected:
            shape = getattr(state[name], "shape", None)
            yield f"{name}: unexpected" + ("" if shape is None else f", of shape {sizes(shape)}")


_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def _remedy(unexpected: Iterable[Any]) -> str:
    """Say what to do about running statistics, if they are among these names."""
    if not any(str(name).endswith(_RUNNING) for name in unexpected):
        return ""
    return (
        "BatchNorm keeps no running statistics: leave them out to train on, "
        "or evaluate by from_torch(module.eval(), shape)"
    )


def _is_floating_point(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _layout(value: Tensor) -> str:
    return "a nested one" if value.is_nested else str(value.layout)


def _kind(value: Tensor) -> str:
    return f"{value.dtype} on {value.device}"


def _copied(value: Tensor) -> Tensor:
    """Return a row-major copy."""
    return value.detach().clone(memory_format=torch.contiguous_format)
