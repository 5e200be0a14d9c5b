"""Networks from torch.nn modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from inspect import getattr_static
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from funcnet import compat, losses
from funcnet.checkpoint.memory_format import lay_out_as_init
from funcnet.checks import as_axis, as_shape, shown, sizes
from funcnet.combinators import Concat, Loop, Product, Residual, Reversible, Sequential, Sum
from funcnet.interop import blocks
from funcnet.interop.observation import tensor_like
from funcnet.interop.refusal import refusal
from funcnet.interop.twins import LAYERS
from funcnet.interop.unrolled import UNROLLED
from funcnet.layer import Layer, Shape, Spec, Tree
from funcnet.layers import (
    BatchNorm,
    ChannelAffine,
    Identity,
    InstanceNorm,
    Reshape,
    Softmax,
    Upsample2d,
)
from funcnet.layers.pooling import AvgPool, MaxPool
from funcnet.leaves import joined
from funcnet.ops.accumulation import in_float64
from funcnet.running import check
from funcnet.tree import build

Translation: TypeAlias = tuple[Layer, Tree]


def from_torch(module: nn.Module, shape: Sequence[int]) -> tuple[Layer, Tree]:
    """Return (net, params) that compute what a torch.nn module does, for examples of `shape`.

    The module may be a torch.nn.Sequential, nested or not, of modules that have a twin here, or
    one such module. Modules that `to_torch` makes may be among them, except those of `Cast` and
    `wrap`. The outputs are the same in the mode that each module is in:

    - BatchNorm and InstanceNorm that evaluate by running statistics become `ChannelAffine`. Those
      that normalise by x become `BatchNorm`, which needs a key, and `InstanceNorm`.
    - Dropout and attention's dropout keep their p: a key, not the mode, decides whether they drop.
      Kinds of dropout that have no twin are left out in eval mode, and refused in train mode.
    - For recurrent layers and attention, y is the first output, and batch_first=True is expected;
      attention is self-attention.
    - TransformerEncoder and its layers become the Sequential of `Residual`s that they compute.

    Parameters are copies, with dtype and device, and have the same names: what torch.nn calls
    `2.weight` is `params[2]["weight"]`. Whether they require gradients is not carried over; see
    `Frozen`.

    Raises one ValueError that names every module without a twin by its path, every setting that
    cannot be translated, every module that does not fit its input, and parameters that are tied;
    TypeError unless `module` is a torch.nn.Module.

    >>> import funcnet as fn
    >>> import torch
    >>> from torch import nn
    >>> module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> net, params = fn.interop.from_torch(module, (3, 16, 16))
    >>> net
    Sequential(Conv2d(8, kernel_size=3), ChannelAffine(), ReLU())
    >>> x = torch.ones(2, 3, 16, 16)
    >>> torch.allclose(net.apply(params, x), module(x), atol=1e-6)
    True
    >>> module = nn.Sequential(nn.Conv2d(3, 8, 3, padding_mode="reflect"), nn.CELU())
    >>> fn.interop.from_torch(module, (3, 16, 16))
    Traceback (most recent call last):
    ValueError: from_torch: expected modules that have a twin in funcnet, got
      0: Conv2d: expected padding_mode='zeros', got 'reflect'
      1: CELU has no twin
    """
    if not isinstance(module, nn.Module):
        got = shown(module)
        raise TypeError(f"from_torch: expected module to be a torch.nn.Module, got {got}")
    hooks = sum(map(len, compat.hooks_of_all_modules()))
    if hooks:
        raise ValueError(f"from_torch: expected no forward hooks on all modules, got {hooks}")
    translator = _Translator(module)
    takes_integers = any(isinstance(part, nn.Embedding) for part in module.modules())
    like = tensor_like(module)
    dtype = torch.int64 if takes_integers else like.dtype
    x = Spec((2,), as_shape("from_torch", shape), dtype, like.device)
    net, params, _ = translator.of(module, x, "")
    problems = [*translator.problems, *_ties(module)]
    if problems:
        raise refusal("from_torch: expected modules that have a twin in funcnet", problems)
    lay_out_as_init(net, params)
    return net, params


class _Translator:
    """Translates the modules in a module, and notes every problem that it meets."""

    def __init__(self, module: nn.Module) -> None:
        self.problems: list[str] = []
        self.names: dict[int, str] = {id(part): name for name, part in module.named_modules()}

    def of(self, module: nn.Module, x: Spec | None, path: str) -> tuple[Layer, Tree, Spec | None]:
        """Return (layer, params, the spec of y); after a problem, the spec is None."""
        try:
            kind = _kind_of(module)
            if kind in UNROLLED:
                unrolled = UNROLLED[kind](module)
                return self.of(unrolled, x, self.names.get(id(unrolled), path))
            if kind in _COMBINATORS:
                return self._combinator(module, _COMBINATORS[kind], x, path)
            module, shape = _readable(module), None if x is None else x.shape
            _check_settings(module)
            _check_axes(module, kind, shape)
            layer, params = _SPECIAL.get(kind, _twin)(module, shape)
            return layer, params, None if x is None else check(layer, params, x)
        except (ValueError, TypeError) as error:
            self.problems.append(f"{path}: {error}" if path else str(error))
            return Identity(), (), None

    def _combinator(
        self, module: nn.Module, cls: Any, x: Spec | None, path: str
    ) -> tuple[Layer, Tree, Spec | None]:
        children = compat.children(module)
        names, made, owns, outs = [*children], [], [], []
        before = x
        if cls is Reversible and x is not None and x.shape:
            before = x._replace(shape=(x.shape[0] // 2, *x.shape[1:]))
        for name, child in children.items():
            layer, params, out = self.of(child, before, self._path(module, path, name))
            made.append(layer)
            owns.append(params)
            outs.append(out)
            before = out if cls is Sequential else before
        if cls in (Residual, Loop):
            net, params = cls(*made, *([module.n] if cls is Loop else [])), owns[0]
        elif names == [*map(str, range(len(names)))]:
            net, params = cls(*made, **_dim(module)), tuple(owns)
        else:
            net = cls(**dict(zip(names, made, strict=True)), **_dim(module))
            params = dict(zip(names, owns, strict=True))
        return net, params, check(net, params, x) if x is not None and None not in outs else None

    def _path(self, module: nn.Module, path: str, name: str) -> str:
        """Return a child's path in the caller's module, even if unrolling made its parent."""
        if id(module) in self.names:
            return joined(path, name)
        return self.names.get(id(compat.children(module)[name]), path)


def _dim(module: nn.Module) -> dict[str, Any]:
    return {"dim": module.dim} if isinstance(module, blocks.Concat) else {}


def _kind_of(module: nn.Module) -> type[nn.Module]:
    """Return the class in the tables whose forward pass a module runs; ValueError without one."""
    name = type(module).__name__
    kind = next((base for base in type(module).__mro__ if base in _KNOWN), None)
    if kind is None:
        loss = name.removesuffix("Loss")
        if loss in losses.__all__:
            raise ValueError(f"{name} is a loss, which stands beside the network: fn.{loss}()")
        raise ValueError(f"{name} has no twin")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(f"{name}: expected parameters, got none yet: call the module once before")
    redefined = ", ".join(_redefined(module, kind))
    if redefined:
        raise ValueError(
            f"{name} has no twin: it has {redefined} of its own, not {kind.__name__}'s"
        )
    hooks = sum(map(len, compat.forward_hooks(module)))
    if hooks:
        raise ValueError(f"{name}: expected no forward hooks, got {hooks}")
    return kind


def _readable(module: nn.Module) -> nn.Module:
    """Return a copy if reading a weight may change buffers, as with spectral_norm in train mode."""
    is_parametrised = any(map(parametrize.is_parametrized, module.modules()))
    return copy.deepcopy(module) if is_parametrised else module


_OUTSIDE_OF_FORWARD = (
    *("__init__", "__new__", "__init_subclass__", "__annotate__", "__annotate_func__"),
    *("__repr__", "__str__", "extra_repr", "get_name", "__eq__", "__hash__"),
    *("reset_parameters", "train", "eval", "state_dict", "__getstate__", "__setstate__"),
    *("__reduce__", "__reduce_ex__"),
)
"""The ends of the names of methods that no forward pass calls."""


def _redefined(module: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Return the names of the kind's methods for which a module, or its class, has others."""
    cls, found, own = type(module), getattr_static, vars(module)
    names = [*own] if cls is kind else dir(kind)
    methods = (name for name in names if hasattr(getattr(kind, name, None), "__get__"))
    others = [n for n in methods if n in own or found(cls, n) is not found(kind, n)]
    return [name for name in others if not name.endswith(_OUTSIDE_OF_FORWARD)]


_EXPECTED: dict[str, Any] = {
    "padding_mode": "zeros",
    "return_indices": False,
    "divisor_override": None,
    "max_norm": None,
    "scale_grad_by_freq": False,
    "batch_first": True,
    "proj_size": 0,
    "add_zero_attn": False,
}
"""The only value that a setting may have, whatever module has it."""


def _check_settings(module: nn.Module) -> None:
    """Raise ValueError that names every setting that cannot be translated."""
    wrong = [
        f"expected {name}={value!r}, got {got!r}"
        for name, value in _EXPECTED.items()
        if (got := getattr(module, name, value)) is not value and got != value
    ]
    if isinstance(module, nn.MultiheadAttention):
        if module.bias_k is not None:
            wrong.append("expected add_bias_kv=False")
        if not module.kdim == module.vdim == module.embed_dim:
            wrong.append("expected kdim and vdim to be embed_dim")
    lacks_bias = getattr(module, "affine", False) and module.bias is None
    if lacks_bias and not _has_statistics(module):
        wrong.append("expected bias=True")
    between = module.dropout if isinstance(module, nn.RNNBase) and module.num_layers > 1 else 0.0
    if module.training and between > 0:
        wrong.append(f"expected dropout=0.0 in train mode, got {between}")
    if wrong:
        raise ValueError(f"{type(module).__name__}: {'; '.join(wrong)}")


_RANKS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (1, 2),
    nn.BatchNorm2d: (3,),
    nn.BatchNorm3d: (4,),
    nn.InstanceNorm1d: (2,),
    nn.InstanceNorm2d: (3,),
    nn.InstanceNorm3d: (4,),
    nn.Softmax2d: (3,),
}
"""The number of axes of an example. With fewer, some modules take the batch for the channels."""


def _check_axes(module: nn.Module, kind: type[nn.Module], shape: Shape | None) -> None:
    """Raise ValueError for an example of more or fewer axes than a module takes."""
    if shape is not None and len(shape) not in _RANKS.get(kind, (len(shape),)):
        name, ranks = type(module).__name__, " or ".join(map(str, _RANKS[kind]))
        raise ValueError(f"{name}: expected one example to have {ranks} axes, got shape {shape}")


# --- Modules with the layer's own name and arguments


def _twin(module: nn.Module, shape: Shape | None) -> Translation:
    cls = LAYERS[_kind_of(module)]
    settings = {f.name: _setting(module, f.name) for f in fields(cls) if f.init}
    layer = build(cls, {name: value for name, value in settings.items() if value is not _UNSAID})
    if isinstance(layer, (MaxPool, AvgPool)) and layer.stride == layer.kernel_size:
        layer = replace(layer, stride=None)
    if shape is None:
        return layer, ()
    layer.out_shape(shape)  # refuses what has too few axes for params
    return layer, _learned(layer._params(shape), module) or ()


_UNSAID = object()


def _setting(module: nn.Module, name: str) -> Any:
    """Return a module's setting for a field of its layer, or `_UNSAID` if it has none."""
    if name == "num_dims":
        return len(module.normalized_shape)  # type: ignore[arg-type]
    if name == "bias":
        if isinstance(module, nn.LayerNorm) and not module.elementwise_affine:
            return _UNSAID
        bias = getattr(module, "bias", getattr(module, "in_proj_bias", None))
        return bias is not None and bias is not False
    return getattr(module, name, _UNSAID)


def _learned(declared: Mapping[str, Any], module: Any) -> dict[str, Any]:
    """Return copies of the parameters that a layer declares."""
    params: dict[str, Any] = {}
    for name, param in declared.items():
        value = getattr(module, name)
        is_branch = isinstance(param, Mapping)
        params[name] = _learned(param, value) if is_branch else value.detach().clone()
    return params


# --- Other modules


def _norm(module: Any, shape: Shape | None) -> Translation:
    """Return the layer of BatchNorm and InstanceNorm of any rank."""
    name = type(module).__name__
    if _has_statistics(module):
        return ChannelAffine(), _affine(module)
    if isinstance(module, nn.SyncBatchNorm):
        raise ValueError(f"{name}: expected eval mode, got train mode")
    is_instance = isinstance(module, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d))
    layer = (InstanceNorm if is_instance else BatchNorm)(module.eps, module.affine)
    return layer, _learned(layer._params((module.num_features,)), module) or ()


def _has_statistics(module: Any) -> bool:
    """Whether a norm evaluates by running statistics."""
    return not module.training and getattr(module, "running_mean", None) is not None


def _affine(module: Any) -> dict[str, Tensor]:
    """weight ∘ (x − μ)/√(σ² + ε) + bias as a scale and a shift, with running μ and σ²."""
    like = module.running_mean if module.weight is None else module.weight
    mean, variance = (in_float64(x) for x in (module.running_mean, module.running_var))
    scale = (variance + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * in_float64(module.weight.detach())
    shift = -mean * scale
    if module.bias is not None:
        shift = shift + in_float64(module.bias.detach())
    return {"weight": scale.to(like), "bias": shift.to(like)}


def _upsample(module: Any, shape: Shape | None) -> Translation:
    name = type(module).__name__
    if module.mode not in ("nearest", "nearest-exact"):  # equal for whole numbers
        raise ValueError(f"{name}: expected mode='nearest', got {module.mode!r}")
    if shape is None:
        return Identity(), ()
    if len(shape) != 3:
        raise ValueError(f"{name}: expected one example to have 3 axes, got shape {shape}")
    if module.size is None:
        scale = _pair(module.scale_factor)
    else:
        scale = tuple(n / max(m, 1) for n, m in zip(_pair(module.size), shape[1:], strict=True))
    if not all(float(n).is_integer() and n >= 1 for n in scale):
        raise ValueError(f"{name}: expected a scale of whole numbers, got {sizes(scale)}")
    return Upsample2d(tuple(map(int, scale))), ()


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value, value)


def _unflatten(module: Any, shape: Shape | None) -> Translation:
    name = type(module).__name__
    if not isinstance(module.dim, int):
        raise ValueError(f"{name}: expected dim to be an int, got {module.dim!r}")
    if shape is None:
        return Identity(), ()
    axis = as_axis(name, "dim", module.dim, shape)
    example = torch.empty(shape, device="meta")
    try:
        return Reshape(*torch.unflatten(example, axis - 1, module.unflattened_size).shape), ()
    except RuntimeError as error:
        raise ValueError(f"{name}: {error}") from error


def _dropout(module: nn.Module, shape: Shape | None) -> Translation:
    """Return Identity for a dropout without a twin, since it drops nothing in eval mode."""
    if module.training:
        raise ValueError(f"{type(module).__name__} has no twin in train mode")
    return Identity(), ()


_COMBINATORS: dict[type[nn.Module], type[Layer]] = {
    nn.Sequential: Sequential,
    blocks.Residual: Residual,
    blocks.Loop: Loop,
    blocks.Sum: Sum,
    blocks.Product: Product,
    blocks.Concat: Concat,
    blocks.Reversible: Reversible,
}

_SPECIAL: dict[type[nn.Module], Callable[[Any, Shape | None], Translation]] = {
    **dict.fromkeys([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm], _norm),
    **dict.fromkeys([nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d], _norm),
    blocks.BatchNorm: _norm,
    **dict.fromkeys(
        [nn.Dropout1d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout], _dropout
    ),
    nn.Softmax2d: lambda module, shape: (Softmax(1), ()),
    nn.Unflatten: _unflatten,
    nn.Upsample: _upsample,
}

_KNOWN = {**LAYERS, **_COMBINATORS, **_SPECIAL, **UNROLLED}


# --- Parameters that are tied


def _ties(module: nn.Module) -> Iterator[str]:
    """Yield a line for each parameter that another module has too."""
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name:
            yield f"{name}: expected a parameter of its own, got one tied to {first}"
