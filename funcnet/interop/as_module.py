"""A network as a torch.nn.Module whose backward pass is the network's own."""

from __future__ import annotations

from itertools import compress
from typing import Any

import optree
import torch
from torch import Tensor, nn

from funcnet.checks import name_of
from funcnet.compat import over_batched, storage_id
from funcnet.interop.state_dict import names_of, state_dict, tensors_of
from funcnet.keys import Key
from funcnet.layer import Layer, Tree, check_net, public_bwd
from funcnet.ops.inplace import has_no_tape, is_eager
from funcnet.ops.need import Need


def as_module(net: Layer, params: Tree) -> nn.Module:
    """Return a torch.nn.Module that computes y = net(x), and whose gradients are `net`'s own.

    Autograd, torch.optim and other trainers of modules take it. `module(x)` evaluates, whatever the
    module's mode; `module(x, key)` trains with layers that draw numbers. Parameters are row-major
    copies, registered under PyTorch's names, so `load_state_dict(net, shape, module.state_dict())`
    gives the tree of parameters after training. Only the gradients that autograd needs are
    computed. As with torch.nn, the backward pass raises an error if a tensor that it needs was
    changed in place. Submodules hold the parameters and compute nothing. Of their hooks, only
    forward pre-hooks run, without inputs, as torch.nn.utils.prune needs them.
    Under torch.autocast the network computes in its parameters' dtype, and casts an x of autocast's
    dtype to it. `Cast` computes in another dtype.

    There is no second derivative: asking autograd for one raises a RuntimeError. Under torch.func,
    torch.compile and torch.export, autograd goes through `net.apply` instead.

    Raises TypeError unless net is a Layer and params a tree of floating-point tensors, ValueError
    for a name that a module cannot have. Errors of the network pass through.

    >>> import funcnet as fn
    >>> import torch
    >>> net = fn.Sequential(fn.Linear(8), fn.Dropout(0.5), fn.Linear(1))
    >>> module = fn.interop.as_module(net, net.init(fn.key(0), (3,)))
    >>> optimizer = torch.optim.Adam(module.parameters())
    >>> x, target = fn.normal(fn.key(1), (16, 3)), fn.normal(fn.key(2), (16, 1))
    >>> for step in range(3):
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.mse_loss(module(x, fn.key(step)), target)
    ...     loss.backward()
    ...     optimizer.step()
    >>> list(module.state_dict())
    ['0.weight', '0.bias', '2.weight', '2.bias']
    >>> params = fn.interop.load_state_dict(net, (3,), module.state_dict())
    """
    check_net("as_module", net)
    for name, leaf in tensors_of("as_module", params).items():
        if not leaf.is_floating_point():
            raise TypeError(f"as_module: expected {name} to be floating-point, got {leaf.dtype}")
    return NetworkModule(net, params)


class NetworkModule(nn.Module):
    """The module that `as_module` makes."""

    def __init__(self, net: Layer, params: Tree) -> None:
        super().__init__()
        leaves, structure = optree.tree_flatten(params)
        if len({id(leaf) for leaf in leaves}) < len(leaves):
            raise ValueError(
                f"as_module: expected params of {name_of(net)} to be different tensors, got one "
                "in two places"
            )
        self._net = net
        # The tree of params with the positions of the leaves, which torch.compile can follow.
        self._positions: Tree = structure.unflatten(range(len(leaves)))
        # The path of each module that holds leaves, with their positions and their names there.
        self._holders: dict[tuple[str, ...], list[tuple[int, str]]] = {}
        order = {name: i for i, name in enumerate(names_of(structure))}
        for name, leaf in state_dict(params).items():
            # Row-major: pruning, FSDP and torch.optim.LBFGS take no other format.
            own = leaf.detach().clone(memory_format=torch.contiguous_format)
            self._register(order[name], name, nn.Parameter(own))

    def _register(self, position: int, name: str, parameter: nn.Parameter) -> None:
        *parents, last = name.split(".")
        holder: nn.Module = self
        try:
            for step in parents:
                if not isinstance(getattr(holder, step, None), nn.Module):
                    holder.add_module(step, Parameters())
                holder = holder.get_submodule(step)
            holder.register_parameter(last, parameter)
        except KeyError as error:
            raise ValueError(
                f"as_module: expected names that a torch.nn.Module can have, got {name!r}: {error}"
            ) from error
        self._holders.setdefault(tuple(parents), []).append((position, last))

    def forward(self, x: Tensor, key: Key | None = None) -> Tensor:
        """Return y; `key` is for layers that draw numbers, and without one they evaluate."""
        leaves = self._leaves()
        if leaves and isinstance(x, Tensor) and _has_autocast_dtype(x):
            x = x.to(leaves[0].dtype)
        tensors = [x, *leaves] if isinstance(x, Tensor) else []
        params = optree.tree_map(leaves.__getitem__, self._positions)
        if not is_eager() or has_no_tape(*tensors):
            return self._net.apply(params, x, key=key)
        run: Any = _Network.apply
        y: Tensor = run(self._net, optree.tree_structure(params), key, x, *leaves)
        return y

    def _leaves(self) -> list[Tensor]:
        """Return what the modules hold, which may have been replaced, or be made by their hooks."""
        leaves: list[Any] = [None] * sum(map(len, self._holders.values()))
        for path, places in self._holders.items():
            holder: Any = self
            for step in path:
                holder = getattr(holder, step)
            if isinstance(holder, Parameters) and holder._pre_hooks:
                for hook in holder._pre_hooks.values():
                    hook(holder, ())
            for i, name in places:
                leaves[i] = getattr(holder, name)
        return leaves

    def extra_repr(self) -> str:
        return name_of(self._net)


class Parameters(nn.Module):
    """A submodule that holds parameters, and computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        handle = self.register_forward_pre_hook(lambda *_: None)
        handle.remove()
        # The dict of all that will be registered; torch.compile cannot follow compat.forward_hooks.
        self._pre_hooks: Any = handle.hooks_dict_ref()


def _has_autocast_dtype(x: Tensor) -> bool:
    """Whether x has the dtype that modules return under torch.autocast, whatever theirs is."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return False
    return x.dtype == torch.get_autocast_dtype(device)


class _Network(torch.autograd.Function):
    """y = f(params, x), with f's own gradient."""

    @staticmethod
    def forward(
        ctx: Any, net: Layer, structure: Any, key: Key | None, x: Tensor, *leaves: Tensor
    ) -> Tensor:
        y, residuals = net.fwd(structure.unflatten(leaves), x, key=key)
        kept, ctx.of_residuals = optree.tree_flatten(residuals)
        ctx.kept = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in kept]
        ctx.net, ctx.structure = net, structure
        ctx.x = x if x.requires_grad else None
        ctx.save_for_backward(*leaves, *(leaf for leaf in kept if isinstance(leaf, Tensor)))
        # Autograd forbids writing to a view made in here, and has to know if y is a view of x.
        is_of_x = storage_id(y.untyped_storage()) == storage_id(x.untyped_storage())
        return y if is_of_x else y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        count = ctx.structure.num_leaves
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint computes them for one read
        leaves, tensors = saved[:count], iter(saved[count:])
        kept = [next(tensors).detach() if other is None else other[0] for other in ctx.kept]
        params, residuals = ctx.structure.unflatten(leaves), ctx.of_residuals.unflatten(kept)
        _, _, _, of_x, *of_leaves = ctx.needs_input_grad
        need, wanted = Need(params=any(of_leaves), input=of_x), (of_x, *of_leaves)

        def of(grad: Tensor) -> tuple[Any, ...]:
            dparams, dx = public_bwd(ctx.net, params, residuals, grad, need)
            dleaves = ctx.structure.flatten_up_to(dparams) if need.params else [None] * count
            return tuple(compress((dx, *dleaves), wanted))

        with torch.no_grad():
            found = iter(over_batched(of, grad))
        gradients = tuple(next(found) if is_wanted else None for is_wanted in wanted)
        if torch.is_grad_enabled():  # with create_graph=True
            once: Any = _Once.apply
            starts = [start for start in (ctx.x, *leaves) if start is not None]
            gradients = once(name_of(ctx.net), len(starts), *starts, *gradients)
        return None, None, None, *gradients


class _Once(torch.autograd.Function):
    """Gradients that cannot be differentiated. Otherwise autograd would take them for constants.

    `tensors` are the `count` tensors on which they depend, then the gradients.
    """

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> Any:
        ctx.name = name
        return tensors[count:]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"as_module: expected a first derivative of {ctx.name}, got a second: gradients are "
            "written by hand. Let autograd differentiate net.apply for it"
        )
