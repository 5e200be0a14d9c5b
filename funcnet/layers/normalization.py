"""Normalisation: the entries of a set are shifted and scaled to mean 0 and variance 1.

For the entries x of a set, with mean μ and population variance σ²,

    x̂ = (x − μ)·r,  r = 1/√(σ² + ε),        y = weight ∘ x̂ + bias

so that, with dy for ∂L/∂y and means over the same set,

    dbias = Σ dy,  dweight = Σ dy ∘ x̂       over the entries that share them
    dx̂ = weight ∘ dy
    dx = r·(dx̂ − mean(dx̂) − x̂ · mean(dx̂ ∘ x̂)).

    layer         a set is                                            weight and bias have
    LayerNorm     the last axes of an example                         their sizes
    RMSNorm       the same, with 0 for μ, and no bias                 their sizes
    GroupNorm     a group of channels of an example, all positions    a number a channel
    InstanceNorm  one channel of an example, all positions            a number a channel
    BatchNorm     one channel of all examples, all positions          a number a channel

`ops/normalization.py` and `ops/group_norm.py` call PyTorch's kernels for these formulas. The
residuals are x, and μ and r of each set. For half precision, μ and r are in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from torch import Tensor

from funcnet.checks import check_divided, name_of
from funcnet.fields import READ_OFF, Flag, Number, Size
from funcnet.initializers import Ones, Zeros
from funcnet.keys import Key
from funcnet.layer import Layer, Shape, Spec, same_part
from funcnet.ops import normalization
from funcnet.ops.accumulation import widened
from funcnet.ops.group_norm import group_norm, group_norm_gradients, group_normalised
from funcnet.ops.need import Need
from funcnet.ops.products import over_positions, rows
from funcnet.param import Param
from funcnet.running import dx_alone


@dataclass(frozen=True)
class _EpsilonKind(Number):
    """A finite number ≥ 0. An int above 1 is refused: it is probably torch.nn's channel count."""

    least: float = 0.0

    def convert(self, owner: type, name: str, value: Any) -> Any:
        number = super().convert(owner, name, value)
        if isinstance(number, int) and number > 1:
            raise ValueError(
                f"{owner.__name__}: expected {name} to be a float, or at most 1, got {number}: "
                f"{READ_OFF}"
            )
        return number


Epsilon: TypeAlias = Annotated[float, _EpsilonKind()]
"""A finite number ≥ 0."""

EpsilonOrNone: TypeAlias = Annotated["float | None", _EpsilonKind(may_be_none=True)]
"""A finite number ≥ 0, or None."""

_CHANNELS = "C…"


@dataclass(frozen=True)
class OverLastAxes(Layer):
    """A normalisation over the last `num_dims` axes."""

    num_dims: Size = 1

    _fresh = True

    def _check_x(self, x: Spec) -> None:
        super()._check_x(x)
        self._out_shape(x.shape)

    def _out_shape(self, shape: Shape) -> Shape:
        if len(shape) < self.num_dims:
            # LayerNorm(64) of torch.nn, for 64 channels
            advice = f": {READ_OFF}" if self.num_dims in shape else ""
            raise ValueError(
                f"{name_of(self)}: expected the shape of one example to have at least "
                f"{self.num_dims} axes, got {shape}{advice}"
            )
        return shape


@dataclass(frozen=True)
class LayerNorm(OverLastAxes):
    """y = weight ∘ (x − μ)/√(σ² + ε) + bias, with μ and σ² over the last `num_dims` axes.

    The gradients stand at the head of `funcnet.layers.normalization`. `eps` is ε.

    Shapes: x (N, …, D₁, …, Dₖ) with k = num_dims ≥ 1; y has x's shape.
    Parameters: {"weight": (D₁, …, Dₖ), "bias": (D₁, …, Dₖ)}, ones and zeros; without "bias" if
    bias=False, () if elementwise_affine=False.

    Raises ValueError for an example of fewer than `num_dims` axes, or params that do not fit.
    Ba et al., "Layer normalization", 2016.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LayerNorm.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.LayerNorm(eps=0.0)
    >>> layer.apply(layer.init(fn.key(0), (2,)), torch.tensor([[1.0, 3.0], [7.0, 5.0]]))
    tensor([[-1.,  1.],
            [ 1., -1.]])
    """

    eps: Epsilon = 1e-5
    elementwise_affine: Flag = True
    bias: Flag = True

    def _params(self, shape: Shape) -> dict[str, Param]:
        sizes = shape[-self.num_dims :]
        return _weight_and_bias(sizes, self.elementwise_affine, self.bias)

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        weight, bias = _opened(params)
        y, mean, rstd = normalization.layer_norm(x, self.num_dims, weight, bias, self.eps)
        return y, (x, mean, rstd)

    def _bwd(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        (x, mean, rstd), (weight, bias) = residuals, _opened(params)
        dx, dweight, dbias = normalization.layer_norm_gradients(
            dy, x, mean, rstd, weight, bias, self.num_dims, self.eps, need
        )
        return _gradients(params, dweight, dbias), dx

    def _bwd_each(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        x, mean, rstd = residuals
        normalised = normalization.layer_normalised(x, mean, rstd, self.num_dims, self.eps)
        dweight = rows(dy * normalised, self.num_dims).sum(1)
        dbias = rows(dy, self.num_dims).sum(1) if self.bias else None
        return _gradients(params, dweight, dbias), dx_alone(self, params, residuals, dy, need)


@dataclass(frozen=True)
class RMSNorm(OverLastAxes):
    """y = weight ∘ x·r, with r = 1/√(mean(x²) + ε) over the last `num_dims` axes. Then

        dweight = Σ dy ∘ x·r,    dx = r·(dx̂ − x·r² · mean(dx̂ ∘ x)),  dx̂ = weight ∘ dy.

    `eps` is ε. None stands for the distance from 1 to the next larger number of x's dtype, or of
    float32 for half precision.

    Shapes: x (N, …, D₁, …, Dₖ) with k = num_dims ≥ 1; y has x's shape.
    Parameters: {"weight": (D₁, …, Dₖ)}, ones; () if elementwise_affine=False.

    Raises ValueError for an example of fewer than `num_dims` axes, or params that do not fit.
    Zhang and Sennrich, "Root mean square layer normalization", 2019.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RMSNorm.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.RMSNorm(eps=0.0)
    >>> layer.apply(layer.init(fn.key(0), (2,)), torch.tensor([[1.0, -7.0]]))
    tensor([[ 0.2000, -1.4000]])
    """

    eps: EpsilonOrNone = None
    elementwise_affine: Flag = True

    def _params(self, shape: Shape) -> dict[str, Param]:
        return _weight_and_bias(shape[-self.num_dims :], self.elementwise_affine, bias=False)

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        weight, _ = _opened(params)
        y, rstd = normalization.rms_norm(x, self.num_dims, weight, self.eps)
        return y, (x, rstd)

    def _bwd(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        (x, rstd), (weight, _) = residuals, _opened(params)
        dx, dweight = normalization.rms_norm_gradients(dy, x, rstd, weight, self.num_dims, need)
        return _gradients(params, dweight), dx

    def _bwd_each(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        x, rstd = residuals
        normalised = normalization.rms_normalised(x, rstd, self.num_dims)
        dweight = rows(dy * normalised, self.num_dims).sum(1)
        return _gradients(params, dweight), dx_alone(self, params, residuals, dy, need)


@dataclass(frozen=True)
class OverGroups(Layer):
    """A normalisation over groups of channels of an example, and all positions."""

    _axes = _CHANNELS
    _fresh = True

    def _groups(self, x: Tensor) -> int:
        """The number of groups."""
        raise NotImplementedError

    # eps and affine are fields of each subclass.

    def _params(self: Any, shape: Shape) -> dict[str, Param]:
        return _weight_and_bias(shape[:1], self.affine)

    def _fwd(self: Any, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        weight, bias = _opened(params)
        y, mean, rstd = group_norm(x, self._groups(x), weight, bias, self.eps)
        return y, (x, mean, rstd)

    def _bwd(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        (x, mean, rstd), (weight, _) = residuals, _opened(params)
        dx, dweight, dbias = group_norm_gradients(dy, x, mean, rstd, weight, self._groups(x), need)
        return _gradients(params, dweight, dbias), dx

    def _bwd_each(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        x, mean, rstd = residuals
        normalised = group_normalised(x, mean, rstd, self._groups(x))
        dweight, dbias = over_positions(dy * normalised), over_positions(dy)
        return _gradients(params, dweight, dbias), dx_alone(self, params, residuals, dy, need)


@dataclass(frozen=True)
class GroupNorm(OverGroups):
    """y = weight ∘ (x − μ)/√(σ² + ε) + bias, with μ and σ² over a group of channels of an example.

    The C channels are cut into `num_groups` groups of neighbours. The gradients stand at the head
    of `funcnet.layers.normalization`. `eps` is ε.

    Shapes: x (N, C, …), with any number of axes after the channels, or none; y has x's shape.
    Parameters: {"weight": (C,), "bias": (C,)}, ones and zeros; () if affine=False.

    Raises ValueError unless num_groups divides C, or for params that do not fit.
    Wu and He, "Group normalization", 2018.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GroupNorm.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.GroupNorm(2, eps=0.0)
    >>> layer.apply(layer.init(fn.key(0), (4,)), torch.tensor([[1.0, 3.0, 6.0, 2.0]]))
    tensor([[-1.,  1.,  1., -1.]])
    """

    num_groups: Size
    eps: Epsilon = 1e-5
    affine: Flag = True

    def _out_shape(self, shape: Shape) -> Shape:
        check_divided(self, "num_groups", shape[0])
        return shape

    def _groups(self, x: Tensor) -> int:
        return self.num_groups


@dataclass(frozen=True)
class InstanceNorm(OverGroups):
    """y = weight ∘ (x − μ)/√(σ² + ε) + bias, with μ and σ² over one channel of one example.

    It is `GroupNorm` with a group for each channel. `eps` is ε.

    Shapes: x (N, C, …), with at least two positions after the channels; y has x's shape.
    Parameters: (), or if affine=True {"weight": (C,), "bias": (C,)}, ones and zeros.

    Raises ValueError for a single value per channel, or params that do not fit.
    Ulyanov et al., "Instance normalization: the missing ingredient for fast stylization", 2016.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.InstanceNorm2d.html

    >>> import torch
    >>> InstanceNorm(eps=0.0).apply((), torch.tensor([[[1.0, 3.0], [6.0, 2.0]]]))
    tensor([[[-1.,  1.],
             [ 1., -1.]]])
    """

    eps: Epsilon = 1e-5
    affine: Flag = False

    def _out_shape(self, shape: Shape) -> Shape:
        if math.prod(shape[1:]) < 2:
            raise ValueError(
                f"{name_of(self)}: expected at least 2 values per channel of an example, "
                f"got shape {shape}"
            )
        return shape

    def _groups(self, x: Tensor) -> int:
        return x.shape[1]


@dataclass(frozen=True)
class BatchNorm(Layer):
    """y = weight ∘ (x − μ)/√(σ² + ε) + bias, with μ and σ² over one channel of the whole batch.

    σ² is the population variance. There are no running averages: `moments` measures means and
    variances on examples of your choice, and `for_inference` makes a network of them that evaluates
    each example alone. So this layer is for training, and `apply` needs a key. It may be any key,
    since nothing is drawn. The gradients stand at the head of `funcnet.layers.normalization`. `eps`
    is ε.

    Shapes: x (N, C, …), with any number of axes after the channels, or none; y has x's shape.
    Parameters: {"weight": (C,), "bias": (C,)}, ones and zeros; () if affine=False.

    Raises ValueError without a key, for a single value per channel (one example of one position),
    or for params that do not fit.
    Ioffe and Szegedy, "Batch normalization", 2015.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.BatchNorm(eps=0.0)
    >>> params = layer.init(fn.key(0), (2,))
    >>> layer.apply(params, torch.tensor([[1.0, 6.0], [3.0, 2.0]]), key=fn.key(0))
    tensor([[-1.,  1.],
            [ 1., -1.]])
    """

    eps: Epsilon = 1e-5
    affine: Flag = True

    _axes = _CHANNELS
    _fresh = True
    couples_examples = True

    def _params(self, shape: Shape) -> dict[str, Param]:
        return _weight_and_bias(shape[:1], self.affine)

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        if key is None:
            raise ValueError(
                f"{name_of(self)}: expected a key, since it normalises by its batch as in training,"
                " got None. To evaluate, measure the batch statistics with fn.moments, make a "
                "network without them by fn.for_inference, and apply that"
            )
        if x.shape[0] * math.prod(x.shape[2:]) == 1:  # _out_shape does not see the batch
            raise ValueError(
                f"{name_of(self)}: expected at least 2 values per channel in a batch, "
                f"got x of shape {tuple(x.shape)}"
            )
        weight, bias = _opened(params)
        y, mean, rstd = normalization.batch_norm(x, weight, bias, self.eps)
        return y, (x, mean, rstd)

    def _bwd(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        (x, mean, rstd), (weight, _) = residuals, _opened(params)
        dx, dweight, dbias = normalization.batch_norm_gradients(
            dy, x, mean, rstd, weight, self.eps, need
        )
        return _gradients(params, dweight, dbias), dx


@dataclass(frozen=True)
class ChannelAffine(Layer):
    """y = weight ∘ x + bias, with one weight and one bias for each channel. Then

        dbias = Σ dy,  dweight = Σ dy ∘ x    over examples and positions,    dx = weight ∘ dy.

    `for_inference` puts it in the place of a `BatchNorm`.

    Shapes: x (N, C, …), with any number of axes after the channels, or none; y has x's shape.
    Parameters: {"weight": (C,), "bias": (C,)}, ones and zeros.

    Raises ValueError or TypeError for params that do not fit.

    >>> import torch
    >>> params = {"weight": torch.tensor([1.0, 10.0]), "bias": torch.tensor([0.0, 0.5])}
    >>> ChannelAffine().apply(params, torch.tensor([[2.0, 3.0]]))
    tensor([[ 2.0000, 30.5000]])
    """

    _axes = _CHANNELS
    _fresh = True
    _tile = same_part

    def _params(self, shape: Shape) -> dict[str, Param]:
        return _weight_and_bias(shape[:1])

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        return normalization.channel_affine(x, params["weight"], params["bias"]), x

    def _bwd(self, params: Any, x: Tensor, dy: Tensor, need: Need) -> Any:
        dx, dweight, dbias = normalization.channel_affine_gradients(dy, x, params["weight"], need)
        return _gradients(params, dweight, dbias), dx

    def _bwd_each(self, params: Any, x: Tensor, dy: Tensor, need: Need) -> Any:
        dweight, dbias = over_positions(dy * widened(x)), over_positions(dy)
        return _gradients(params, dweight, dbias), dx_alone(self, params, x, dy, need)


def _weight_and_bias(sizes: Shape, affine: bool = True, bias: bool = True) -> dict[str, Param]:
    """The parameters of a normalisation, ones and zeros."""
    if not affine:
        return {}
    weight = {"weight": Param(sizes, Ones())}
    return {**weight, "bias": Param(sizes, Zeros())} if bias else weight


def _opened(params: Any) -> tuple[Tensor | None, Tensor | None]:
    """(weight, bias), None where there is none."""
    return (params["weight"], params.get("bias")) if params else (None, None)


def _gradients(params: Any, dweight: Tensor | None, dbias: Tensor | None = None) -> Any:
    """dparams, like params; None where they are not needed."""
    if not isinstance(params, Mapping):
        return ()
    if dweight is None:
        return None
    return {"weight": dweight} if dbias is None else {"weight": dweight, "bias": dbias}
