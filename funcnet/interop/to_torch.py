"""torch.nn modules from networks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import optree
import torch
from torch import Tensor, nn

from funcnet.checks import as_shape, name_of, sizes
from funcnet.combinators import (
    Cast,
    Concat,
    Frozen,
    Loop,
    Product,
    Recompute,
    Repeat,
    Residual,
    Reversible,
    Sequential,
    Sum,
)
from funcnet.combinators.several import Several
from funcnet.interop import blocks
from funcnet.interop.observation import tensor_like
from funcnet.interop.refusal import refusal
from funcnet.interop.state_dict import state_dict, tensors_of
from funcnet.interop.twins import MODULES
from funcnet.interop.wrap import Wrapped
from funcnet.layer import Layer, Shape, Spec, Tree, check_net
from funcnet.layers import (
    GRU,
    LSTM,
    RNN,
    AdaptiveAvgPool1d,
    AdaptiveMaxPool1d,
    BatchNorm,
    ChannelAffine,
    Embedding,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Linear,
    MultiheadAttention,
    PositionalEmbedding,
    RMSNorm,
    Upsample2d,
    UpsampleConv2d,
)
from funcnet.layers.conv import Convolution
from funcnet.layers.conv_transpose import ConvTranspose
from funcnet.layers.recurrent import Recurrent
from funcnet.leaves import joined
from funcnet.running import check


def to_torch(net: Layer, params: Tree, shape: Sequence[int] | None = None) -> nn.Module:
    """Return a torch.nn.Module that computes what `net` does, for torch.export, ONNX and torch.fx.

    Layers become modules of torch.nn: a Sequential becomes torch.nn.Sequential, `UpsampleConv2d`
    torch.nn.Upsample and torch.nn.Conv2d, `Repeat` a torch.nn.Sequential of copies. `Recompute` is
    left out. What torch.nn lacks, such as `Residual` and `Concat`, becomes a small module of this
    package. The gradients are autograd's. Parameters are copies. Those in `Frozen` require no
    gradient, and those in `Cast` have the dtype in which it computes. The module is in eval mode,
    as networks evaluate without a key; a wrapped module keeps its mode.

    `shape` is the shape of one example. It is needed where no parameter tells the sizes that a
    module wants, as for `LayerNorm(elementwise_affine=False)`; params and shape are then checked.

    Raises one ValueError that names every layer without a form in torch.nn, or that needs `shape`,
    by its path; ValueError or TypeError for params that do not fit.

    >>> import funcnet as fn
    >>> net = fn.Sequential(fn.UpsampleConv2d(8), fn.Residual(fn.Sequential(fn.Conv2d(8, 1))))
    >>> params = net.init(fn.key(0), (3, 4, 4))
    >>> module = fn.interop.to_torch(net, params)
    >>> module
    Sequential(
      (0): Sequential(
        (0): Upsample(scale_factor=(2.0, 2.0), mode='nearest')
        (1): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=same)
      )
      (1): Residual(
        (layer): Sequential(
          (0): Conv2d(8, 8, kernel_size=(1, 1), stride=(1, 1))
        )
      )
    )
    >>> x = fn.normal(fn.key(1), (2, 3, 4, 4))
    >>> torch.allclose(module(x), net.apply(params, x), atol=1e-6)
    True
    """
    check_net("to_torch", net)
    tensors_of("to_torch", params)  # which refuses what is not a tree of tensors
    known = None if shape is None else as_shape(net, shape)
    if known is not None:
        check(net, params, _spec_of(net, params, known))
    translator = _Translator()
    module = translator.of(net, params, known, "")
    if translator.problems:
        expected = "to_torch: expected layers that have a form in torch.nn"
        raise refusal(expected, translator.problems)
    module.eval()
    for part, mode in translator.modes:  # on which its y may depend
        part.training = mode
    return module


def _takes_integers(layer: Layer) -> bool:
    """Return whether x is of integers. Only embeddings take them, and every y is of floats."""
    if isinstance(layer, Wrapped):
        return layer.traits.takes_integers
    children = (child for _, child in layer._children())
    return isinstance(layer, Embedding) or any(map(_takes_integers, children))


def _spec_of(layer: Layer, params: Tree, shape: Shape) -> Spec:
    """Return what is known of x, a batch of 2 examples of this shape."""
    leaves: list[Any] = optree.tree_leaves(params)
    like = leaves[0] if leaves else torch.empty(0, dtype=torch.float32)
    return Spec((2,), shape, torch.int64 if _takes_integers(layer) else like.dtype, like.device)


class _Translator:
    """Translates layers, and notes every problem that it meets."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.modes: list[tuple[nn.Module, bool]] = []
        """The modules that were wrapped, and the mode that each was in."""

    def of(self, layer: Layer, params: Tree, shape: Shape | None, path: str) -> nn.Module:
        """Return the module of a layer."""
        try:
            if isinstance(layer, Several):
                layer._check_tree(params)
            if type(layer) in _COMBINATORS:
                return _COMBINATORS[type(layer)](self, layer, params, shape, path)
            module = _SPECIAL.get(type(layer), _twin)(layer, params, shape)
            if isinstance(layer, Wrapped):
                self.modes += [(part, part.training) for part in module.modules()]
            return module
        except (ValueError, TypeError) as error:
            reason = str(error)
        except KeyError as error:  # of add_module
            reason = f"{name_of(layer)} has a name that modules cannot have: {error.args[0]}"
        self.problems.append(f"{path}: {reason}" if path else reason)
        return nn.Identity()

    def children(
        self, layer: Layer, params: Tree, shape: Shape | None, path: str
    ) -> OrderedDict[str, nn.Module]:
        """Return the modules of a combinator's children by their names."""
        children = layer._children()
        shapes = (None,) * len(children) if shape is None else layer._child_shapes(shape)
        parts = zip(children, layer._child_params(params), shapes, strict=True)
        return OrderedDict(
            (name, self.of(child, own, its_shape, joined(path, name)))
            for (name, child), own, its_shape in parts
        )


# --- Layers


NOT_IN_TORCH = {"method", "weight_init", "bias_init", "num_dims"}
"""The fields that torch.nn does not know."""


def _twin(layer: Layer, params: Tree, shape: Shape | None) -> nn.Module:
    """Return the module of the layer's own name and arguments."""
    if type(layer) not in MODULES:
        raise ValueError(f"{name_of(layer)} has no form in torch.nn")
    settings = {f.name: getattr(layer, f.name) for f in fields(layer) if f.init}
    options = {name: value for name, value in settings.items() if name not in NOT_IN_TORCH}
    for cls, arguments in _SIZES.items():
        if isinstance(layer, cls):
            options |= arguments(layer, params, shape)
    return _loaded(layer, params, MODULES[type(layer)], **options)


def _loaded(layer: Layer, params: Tree, cls: Any, *arguments: Any, **options: Any) -> nn.Module:
    """Return a module with copies of params."""
    copies = {name: leaf.detach().clone() for name, leaf in state_dict(params).items()}
    try:
        with torch.device("meta"):  # nothing is drawn
            module: nn.Module = cls(*arguments, **options)
        module.load_state_dict(copies, assign=True)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"{name_of(layer)}: expected params that fit, got {error}") from error
    return module


def _size(layer: Layer, params: Tree, name: str, axis: int) -> int:
    """Return a size of a parameter."""
    leaf = params.get(name) if isinstance(params, dict) else None
    if not isinstance(leaf, Tensor):
        raise ValueError(
            f"{name_of(layer)}: expected params with {name!r}, got {_described(params)}"
        )
    if leaf.ndim <= axis:
        raise ValueError(
            f"{name_of(layer)}: expected {name} of {axis + 1} axes or more, got shape "
            f"{sizes(leaf.shape)}"
        )
    return leaf.shape[axis]


def _described(params: Tree) -> str:
    if isinstance(params, dict):
        return f"keys {', '.join(map(repr, params))}"
    return f"a {type(params).__name__}"


def _known(layer: Layer, shape: Shape | None) -> Shape:
    """Return the shape of an example. Raises ValueError where it is not known."""
    if shape is None:
        raise ValueError(f"{name_of(layer)} needs shape, as none of its parameters tells its sizes")
    return shape


def _normalized(layer: Any, params: Tree, shape: Shape | None) -> dict[str, Any]:
    if layer.elementwise_affine:
        sizes = tuple(_size(layer, params, "weight", axis) for axis in range(layer.num_dims))
    else:
        sizes = _known(layer, shape)[-layer.num_dims :]
    return {"normalized_shape": sizes}


def _channels(layer: Any, params: Tree, shape: Shape | None) -> int:
    return _size(layer, params, "weight", 0) if layer.affine else _known(layer, shape)[0]


_SIZES: dict[type[Layer], Callable[[Any, Tree, Shape | None], dict[str, Any]]] = {
    Linear: lambda layer, params, _: {"in_features": _size(layer, params, "weight", 1)},
    Convolution: lambda layer, params, _: {
        "in_channels": _size(layer, params, "weight", 1) * layer.groups
    },
    ConvTranspose: lambda layer, params, _: {"in_channels": _size(layer, params, "weight", 0)},
    ChannelAffine: lambda layer, params, _: {"channels": _size(layer, params, "weight", 0)},
    PositionalEmbedding: lambda layer, params, _: {
        "embedding_dim": _size(layer, params, "weight", 1)
    },
    MultiheadAttention: lambda layer, params, _: {
        "embed_dim": _size(layer, params, "in_proj_weight", 1)
    },
    Recurrent: lambda layer, params, _: {
        "input_size": _size(layer, params, "weight_ih_l0", 1),
        "batch_first": True,
    },
    LayerNorm: _normalized,
    RMSNorm: _normalized,
    GroupNorm: lambda layer, params, shape: {"num_channels": _channels(layer, params, shape)},
}
"""The arguments that torch.nn wants beside the layer's own."""


def _batch_norm(layer: Any, params: Tree, shape: Shape | None) -> nn.Module:
    """Return a module without running statistics, which normalises by the batch in any mode."""
    ranked = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
    cls = blocks.BatchNorm if shape is None else ranked.get(len(shape), blocks.BatchNorm)
    options = {"eps": layer.eps, "affine": layer.affine, "track_running_stats": False}
    return _loaded(layer, params, cls, _channels(layer, params, shape), **options)


def _instance_norm(layer: Any, params: Tree, shape: Shape | None) -> nn.Module:
    """Return torch.nn.InstanceNorm where the rank is known, else GroupNorm, a group a channel."""
    ranked = {2: nn.InstanceNorm1d, 3: nn.InstanceNorm2d, 4: nn.InstanceNorm3d}
    cls = None if shape is None else ranked.get(len(shape))
    channels, options = _channels(layer, params, shape), {"eps": layer.eps, "affine": layer.affine}
    arguments = (channels, channels) if cls is None else (channels,)
    return _loaded(layer, params, cls or nn.GroupNorm, *arguments, **options)


def _adaptive_1d(layer: Any, params: Tree, shape: Shape | None) -> nn.Module:
    """Return the pooling, or Identity if it keeps its only axis: torch.nn cannot express that."""
    return nn.Identity() if layer.output_size == (None,) else _twin(layer, params, shape)


def _upsample(layer: Any, params: Tree, shape: Shape | None) -> nn.Module:
    return nn.Upsample(scale_factor=tuple(map(float, layer.scale)), mode="nearest")


def _upsample_conv(layer: Any, params: Tree, shape: Shape | None) -> nn.Module:
    upsample, conv = layer._steps
    return nn.Sequential(_upsample(upsample, (), None), _twin(conv, params, None))


def _wrapped(layer: Any, params: Tree, shape: Shape | None) -> nn.Module:
    """Return a copy of the module that `wrap` has wrapped."""
    copies = optree.tree_map(lambda leaf: nn.Parameter(leaf.detach().clone()), params)
    module: nn.Module = copy.deepcopy(layer.module)
    for name, tensor in layer.tensors(copies, tensor_like(module)).items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        setattr(owner, last, tensor.requires_grad_(getattr(owner, last).requires_grad))
    if layer.traits.needs_row_major:
        module.register_forward_pre_hook(_without_gaps)
    return module


def _without_gaps(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Return x in row-major order; convolutions with weights like ours return channels_last."""
    return (args[0].contiguous(),)


_SPECIAL: dict[type[Layer], Callable[[Any, Tree, Shape | None], nn.Module]] = {
    **dict.fromkeys([RNN, LSTM, GRU], lambda *of: blocks.First(_twin(*of))),
    **dict.fromkeys([AdaptiveAvgPool1d, AdaptiveMaxPool1d], _adaptive_1d),
    BatchNorm: _batch_norm,
    InstanceNorm: _instance_norm,
    Upsample2d: _upsample,
    UpsampleConv2d: _upsample_conv,
    Wrapped: _wrapped,
}


# --- Combinators


def _only(to: _Translator, layer: Any, *rest: Any) -> nn.Module:
    return to.of(layer.layer, *rest)


def _cast(to: _Translator, layer: Cast, params: Tree, *rest: Any) -> nn.Module:
    cast = optree.tree_map(lambda leaf: leaf.to(layer.dtype), params)
    out = next((leaf.dtype for leaf in optree.tree_leaves(params)), None)
    module = _only(to, layer, cast, *rest)
    return blocks.Cast(module, layer.dtype, out if _takes_integers(layer) else None)


def _repeat(to: _Translator, layer: Repeat, params: Tree, *rest: Any) -> nn.Module:
    if any(leaf.shape[:1] != (layer.n,) for leaf in optree.tree_leaves(params)):
        raise ValueError(f"{name_of(layer)}: expected params with a leading axis of {layer.n}")
    copies = layer._params_of_turns(params)
    return nn.Sequential(*(_only(to, layer, own, *rest) for own in copies))


def _several(cls: Callable[[OrderedDict[str, nn.Module]], nn.Module]) -> Any:
    return lambda to, layer, *rest: cls(to.children(layer, *rest))


_COMBINATORS: dict[type[Layer], Callable[..., nn.Module]] = {
    Sequential: _several(nn.Sequential),
    Residual: lambda to, layer, *rest: blocks.Residual(_only(to, layer, *rest)),
    Recompute: _only,
    Frozen: lambda to, layer, *rest: _only(to, layer, *rest).requires_grad_(False),
    Cast: _cast,
    Repeat: _repeat,
    Loop: lambda to, layer, *rest: blocks.Loop(_only(to, layer, *rest), layer.n),
    Sum: _several(blocks.Sum),
    Product: _several(blocks.Product),
    Reversible: _several(blocks.Reversible),
    Concat: lambda to, layer, *rest: blocks.Concat(to.children(layer, *rest), layer.dim),
}
