"""Batch normalisation without state: measure on examples, merge, and make a network for inference.

`BatchNorm` normalises by its batch. To evaluate one example at a time, measure each layer's batch
statistics as a network sees them in training, and put fixed numbers in their place: with mean μ and
variance σ² of a channel,

    weight · (x − μ)/√(σ² + ε) + bias = s·x + t,   s = weight/√(σ² + ε),  t = bias − s·μ.

That is a `ChannelAffine`. After a layer that is linear in its parameters it can be left out: the
weight and bias of that layer become s·weight and s·bias + t.

The moments of a channel are (count, mean, M2), M2 = Σ (x − mean)². Moments of two sets A and B of
examples merge without the examples (Chan, Golub and LeVeque, "Updating formulae and a pairwise
algorithm for computing sample variances", 1979), with n for count and δ = mean_B − mean_A:

    n = n_A + n_B,  mean = mean_A + δ·n_B/n,  M2 = M2_A + M2_B + δ²·n_A·n_B/n
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from funcnet.checks import count_of, name_of, shown
from funcnet.combinators.several import Several
from funcnet.combinators.wrapper import Wrapper
from funcnet.keys import Key
from funcnet.layer import Layer, Shape, Tree, check_net, writes
from funcnet.layers import (
    BatchNorm,
    ChannelAffine,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Linear,
    UpsampleConv2d,
)
from funcnet.leaves import mapped, same
from funcnet.ops.accumulation import in_float64
from funcnet.ops.inplace import TENSORS, is_eager
from funcnet.running import run_fwd

Moments: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""(count, mean, M2) of a `BatchNorm`'s x, in float64; mean and M2 (C,).

They are on x's device, on the CPU where that has no float64 (MPS).

count has as many axes, of size 1, as x has after the channels: it remembers the rank of x. Within
`Repeat` all three have an axis for the copies in front.
"""


def moments(net: Layer, params: Tree, x: Tensor, *, key: Key) -> Tree:
    """The moments of what each `BatchNorm` of `net` sees when the network is applied to x.

    The network runs once, as `net.apply(params, x, key=key)` does. The result is a tree like
    params, with (count, mean, M2) for a `BatchNorm` and () for any other layer. For each channel
    these are the number of values, their mean, and the sum of squared deviations from it, in
    float64: on x's device, on the CPU for MPS, which has no float64. All are 0 for no examples.

    Raises what `apply` raises; ValueError if a `BatchNorm` runs more than once with the same
    parameters, as in a `Loop`, because one mean and one variance cannot describe both runs;
    TypeError if net is not a Layer.

    >>> import funcnet as fn
    >>> import torch
    >>> net = fn.Sequential(fn.ReLU(), fn.BatchNorm())
    >>> params = net.init(fn.key(0), (1,))
    >>> m = fn.moments(net, params, torch.tensor([[1.0], [3.0]]), key=fn.key(1))
    >>> m[0], [float(moment) for moment in m[1]]
    ((), [2.0, 2.0, 2.0])
    """
    check_net("moments", net)
    observed = mapped(
        net, lambda path, layer, _: _Observed(layer) if isinstance(layer, BatchNorm) else layer
    )
    observed.apply(params, x, key=key)
    return _collected(observed, params, (), "")


def merge_moments(m: Tree, other: Tree) -> Tree:
    """The moments of two sets of examples together, from those of each.

    Raises ValueError, with the path to the layer, for trees or channels that differ.

    >>> import funcnet as fn
    >>> import torch
    >>> net, x = fn.BatchNorm(affine=False), torch.tensor([[1.0], [3.0], [5.0], [9.0]])
    >>> halves = [fn.moments(net, (), half, key=fn.key(0)) for half in x.split(2)]
    >>> [float(moment) for moment in fn.merge_moments(*halves)]
    [4.0, 4.5, 35.0]
    """
    return _merged(m, other, "")


def for_inference(net: Layer, params: Tree, m: Tree, fold: bool = True) -> tuple[Layer, Tree]:
    """(net, params) without `BatchNorm`, which evaluates each example alone.

    A `BatchNorm` becomes a `ChannelAffine`. With `fold`, one that follows directly on a Conv, a
    ConvTranspose or an UpsampleConv2d in a Sequential is folded into that layer, and is gone:
    later positions move, names stay. After a Linear it is folded where x was (N, C). A layer that
    had no bias gets one. Applied to x, the result is what `net` computes from x in training, if m
    was measured on x. New parameters have the dtype and device of params, of m if there are none.
    Layers that stay as they were keep their tensors, which are not copied.

    Raises ValueError, with the path to the layer, for moments of another network, or of a single
    value per channel; TypeError if net is not a Layer.

    >>> import funcnet as fn
    >>> net = fn.Sequential(fn.Conv2d(8, 3, bias=False), fn.BatchNorm(), fn.ReLU())
    >>> params, x = net.init(fn.key(0), (3, 8, 8)), fn.normal(fn.key(1), (16, 3, 8, 8))
    >>> m = fn.moments(net, params, x, key=fn.key(2))
    >>> fn.for_inference(net, params, m)[0]
    Sequential(Conv2d(8, kernel_size=3), ReLU())
    >>> fn.for_inference(net, params, m, fold=False)[0]
    Sequential(Conv2d(8, kernel_size=3, bias=False), ChannelAffine(), ReLU())
    """
    check_net("for_inference", net)
    if not isinstance(fold, bool):
        raise TypeError(f"for_inference: expected fold to be True or False, got {shown(fold)}")
    learned = (leaf for leaf in optree.tree_leaves(params) if isinstance(leaf, Tensor))
    like = next((leaf for leaf in learned if leaf.is_floating_point()), None)
    return _inferred(net, params, m, "", fold, like)


# --- Measuring


@dataclass(frozen=True)
class _Observed(Wrapper):
    """A `BatchNorm` that notes the moments of each x."""

    noted: list[Moments] = field(default_factory=list, compare=False)

    def _describe(self) -> str:
        return name_of(self.layer)  # as the network that was given

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        self.noted.append(_measured(x))
        return run_fwd(self.layer, params, x, key)


def _measured(x: Tensor) -> Moments:
    x = in_float64(x)
    count = x.numel() // max(x.shape[1], 1)
    if count:
        variance, mean = torch.var_mean(x, (0, *range(2, x.ndim)), correction=0)
    else:  # not NaN, so that other examples may be merged with none
        variance, mean = x.new_zeros(2, x.shape[1])
    return x.new_full((1,) * (x.ndim - 2), count), mean, variance * count


def _collected(layer: Layer, params: Tree, copies: Shape, path: str) -> Tree:
    """The tree of moments that the observed layers have noted."""
    if isinstance(layer, _Observed):
        return _stacked(layer, copies, path)
    children = layer._children()
    if not children:
        return ()
    names = layer._param_names(params)
    copies = (*copies, *layer._copy_axes())
    parts = [
        _collected(child, own, copies, path + layer._path_step(name))
        for (name, child), own in zip(children, layer._child_params(params), strict=True)
    ]
    return _whole(params, names, layer._part_by_name(names, parts))


def _stacked(observed: _Observed, copies: Shape, path: str) -> Moments:
    """The moments of all copies, which have run one after the other."""
    runs, expected = len(observed.noted), torch.Size(copies).numel()
    if runs != expected:
        raise ValueError(
            f"{path}{name_of(observed.layer)}: expected to run once with the same parameters, "
            f"ran {runs / expected:g} times: moments cannot tell those runs apart, as in a Loop"
        )
    count, mean, m2 = (
        torch.stack(found).reshape((*copies, *found[0].shape))
        for found in zip(*observed.noted, strict=True)
    )
    return count, mean, m2


# --- Merging


def _merged(m: Tree, other: Tree, path: str) -> Tree:
    if _is_moments(m) and _is_moments(other):
        shapes = [tuple(tuple(part.shape) for part in tree) for tree in (m, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"merge_moments: {path}expected moments of shapes {shapes[0]}, got {shapes[1]}"
            )
        return _merged_moments(m, other)
    names = _names(m)
    if _is_moments(m) or _is_moments(other) or names is None or not _has_names(other, names):
        raise ValueError(
            f"merge_moments: {path}expected moments of the same layers, "
            f"{_description(m)}, got {_description(other)}"
        )
    before = "" if isinstance(m, Mapping) else "layer "
    pairs = zip(names, _parts(m, names), _parts(other, names), strict=True)
    parts = [_merged(a, b, f"{path}{before}{name}: ") for name, a, b in pairs]
    return _whole(m, names, parts)


def _merged_moments(m: Moments, other: Moments) -> Moments:
    (count, mean, m2), (more, mean_of_more, m2_of_more) = m, other
    total = count + more
    each = (*mean.shape[:-1], 1)  # for each copy of a layer
    share = torch.where(total > 0, more / total, 0.0).reshape(each)
    delta = mean_of_more - mean
    return (
        total,
        mean + delta * share,
        m2 + m2_of_more + delta.square() * share * count.reshape(each),
    )


# --- Inference


def _inferred(
    layer: Layer, params: Tree, m: Tree, path: str, fold: bool, like: Tensor | None
) -> tuple[Layer, Tree]:
    """(layer, params) without `BatchNorm`. `like` is a parameter of the network, if it has any."""
    if isinstance(layer, BatchNorm):
        scale, shift = _scale_and_shift(layer, params, m, path)
        like = m[1] if like is None else like
        return ChannelAffine(), {"weight": scale.to(like), "bias": shift.to(like)}
    children = layer._children()
    names = layer._param_names(params)
    _check_trees(layer, names, params, m, path)
    in_sequence = fold and _composes(layer)
    made: list[tuple[str, Layer, Tree]] = []
    of_params, of_m = (layer._part_by_child(names, _parts(tree, names)) for tree in (params, m))
    for (name, child), own, found in zip(children, of_params, of_m, strict=True):
        where = path + layer._path_step(name)
        if isinstance(child, BatchNorm) and made and in_sequence and _absorbs(made[-1][1], found):
            scale, shift = _scale_and_shift(child, own, found, where)
            into, last, of_last = made.pop()
            made.append((into, *_folded(last, of_last, scale, shift, where)))
        else:
            made.append((name, *_inferred(child, own, found, where, fold, like)))
    layers, parts = [child for _, child, _ in made], [part for _, _, part in made]
    if same(layers, [child for _, child in children]):
        return layer, params
    if isinstance(layer, Several):
        kept = [name for name, _, _ in made]
        params = _whole(params, kept, parts)
        return layer._with(tuple(layers), tuple(kept) if layer.names else ()), params
    beside = _beside(params, names)
    params = _whole(params, names, layer._part_by_name(names, parts))
    return layer._with_children(layers), {**params, **beside} if beside else params


def _composes(layer: Layer) -> bool:
    """Whether y is what the children make one after the other, and nothing else."""
    return isinstance(layer, Several) and layer._composes and writes(layer, "_composes")


def _check_trees(layer: Layer, names: list[str], params: Tree, m: Tree, path: str) -> None:
    """Raise ValueError unless params and moments have a part for each child of these names."""
    if names != [""] and (_is_moments(m) or not _has_names(m, names)):
        expected = f"those of {count_of(names)}" if names else "()"
        raise ValueError(
            f"{path}{name_of(layer)}: expected moments m to be {expected}, got {_description(m)}"
        )
    beside = {} if isinstance(layer, Several) else _beside(params, names)
    if names not in ([], [""]) and not _has_names(params, [*names, *beside]):
        raise ValueError(
            f"{path}{name_of(layer)}: expected params of {count_of(names)}, "
            f"got {_description(params)}"
        )


def _scale_and_shift(layer: BatchNorm, params: Tree, m: Tree, path: str) -> tuple[Tensor, Tensor]:
    """(s, t) of each channel, (…, C) in float64."""
    if not _is_moments(m):
        raise ValueError(
            f"{path}{name_of(layer)}: expected moments m to be (count, mean, M2), "
            f"got {_description(m)}"
        )
    count, mean, m2 = (in_float64(part) for part in m)
    # Values cannot be seen under vmap and compile; on meta, and of a FakeTensor, there are none.
    has_values = is_eager() and type(count) in TENSORS and not count.is_meta
    if has_values and not bool((count > 1).all()):
        raise ValueError(
            f"{path}{name_of(layer)}: expected moments of at least 2 values per channel, "
            f"got count {count.min().item():g}"
        )
    variance = m2 / count.reshape(*mean.shape[:-1], 1)
    # For the kernels, 1/√0 is 0.
    spread = variance + layer.eps
    scale = torch.where(spread == 0, 0.0, spread.rsqrt())
    if not layer.affine:
        return scale, -scale * mean
    weight, bias = _learned(layer, params, mean, path)
    scale = scale * weight.to(scale.device)
    return scale, bias.to(scale.device) - scale * mean


def _learned(layer: BatchNorm, params: Tree, mean: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """Weight and bias. Raises ValueError unless they have the shape of the mean."""
    expected = {"weight": tuple(mean.shape), "bias": tuple(mean.shape)}
    got = {}
    if isinstance(params, Mapping):
        got = {name: tuple(getattr(value, "shape", ())) for name, value in params.items()}
    if got != expected:
        raise ValueError(
            f"{path}{name_of(layer)}: expected params of the shapes of m, {expected}, got "
            f"{got or _description(params)}"
        )
    return params["weight"], params["bias"]


_TRANSPOSED = {ConvTranspose1d, ConvTranspose2d, ConvTranspose3d}
_ABSORBING = {Linear, Conv1d, Conv2d, Conv3d, UpsampleConv2d, *_TRANSPOSED}
"""Layers with y = weight · x + bias. Not their subclasses, which may compute anything."""


def _absorbs(layer: Layer, m: Tree) -> bool:
    """Whether a `BatchNorm` with these moments, right after the layer, may become part of it."""
    if type(layer) is Linear and _is_moments(m):
        count, mean, _ = m
        # With positions, axis 1 does not count Linear's features.
        return bool(count.ndim < mean.ndim)
    return type(layer) in _ABSORBING


def _folded(
    layer: Any, params: Tree, scale: Tensor, shift: Tensor, path: str
) -> tuple[Layer, Tree]:
    """(layer, params) whose y is scale · y + shift, with one scale and one shift a channel.

    Weights are (O, C/groups, …), of a transposed convolution (C, O/groups, …), with an axis for
    the copies of a layer in front; scale and shift are (…, O).
    """
    weight, copies, transposed = params["weight"], scale.ndim - 1, type(layer) in _TRANSPOSED
    channels = weight.shape[copies + 1] * layer.groups if transposed else weight.shape[copies]
    if weight.shape[:copies] != scale.shape[:-1] or channels != scale.shape[-1]:
        raise ValueError(
            f"{path}expected moments m of {channels} channels, got shape {tuple(scale.shape)}"
        )
    scaled = weight.to(scale.device)
    if transposed:
        scaled = torch.unflatten(scaled, copies, (layer.groups, -1))
        factor = torch.unflatten(scale, -1, (layer.groups, 1, -1))
    else:
        factor = scale[..., None]
    factor = factor.reshape((*factor.shape, *(1,) * (scaled.ndim - factor.ndim)))
    scaled = (scaled * factor).reshape(weight.shape)
    bias = scale * params["bias"].to(scale.device) + shift if layer.bias else shift
    return replace(layer, bias=True), {"weight": scaled.to(weight), "bias": bias.to(weight)}


# --- Trees of moments


def _is_moments(m: Tree) -> bool:
    return isinstance(m, tuple) and len(m) == 3 and all(isinstance(part, Tensor) for part in m)


def _names(tree: Tree) -> list[str] | None:
    """The names of a tree's parts, as `_children` gives them; None for a leaf."""
    if isinstance(tree, tuple):
        return [str(i) for i in range(len(tree))]
    return [str(name) for name in tree] if isinstance(tree, Mapping) else None


def _has_names(tree: Tree, names: list[str]) -> bool:
    found = _names(tree)
    return found is not None and sorted(found) == sorted(names)


def _beside(params: Tree, names: list[str]) -> dict[str, Tree]:
    """A combinator's own entries in a dict of parameters, beside those of its children."""
    if names == [""] or not isinstance(params, Mapping):
        return {}
    return {name: own for name, own in params.items() if name not in names}


def _parts(tree: Tree, names: list[str]) -> list[Tree]:
    """The parts of a tree that belong to the children of these names."""
    if names == [""]:
        return [tree]
    return [tree[key] for key in (names if isinstance(tree, Mapping) else range(len(names)))]


def _whole(like: Tree, names: list[str], parts: Sequence[Tree]) -> Tree:
    """The tree of these parts, in a container like that of `like`."""
    if names == [""]:
        return parts[0]
    if isinstance(like, Mapping):
        return dict(zip(names, parts, strict=True))
    return tuple(parts)


def _description(tree: Tree) -> str:
    if _is_moments(tree):
        return "(count, mean, M2)"
    if isinstance(tree, tuple):
        return f"a tuple of {len(tree)}" if tree else "()"
    if isinstance(tree, Mapping):
        return f"a dict with keys {', '.join(map(repr, tree))}"
    return type(tree).__name__
