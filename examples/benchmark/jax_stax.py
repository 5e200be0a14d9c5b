"""The contender from JAX: stax under jit. Imported only where JAX is installed.

JAX's images are (N, H, W, C) here, its fastest layout, and its kernels (h, w, C, O); weights and
data are turned once, outside of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import torch
from contenders import Contender
from jax.example_libraries import optimizers, stax
from networks import LEARNING_RATE, MOMENTUM
from problem import Problem
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from translate import leaves

import funcnet as fn

Array: TypeAlias = Any
StaxLayer: TypeAlias = tuple[Callable[..., Any], Callable[..., Array]]
Apply: TypeAlias = Callable[[Any, Array], Array]


def jax_stax(problem: Problem) -> Contender:
    """The network in stax; its training step compiled whole, in the memory of the state before."""
    platform = "cpu" if problem.device.type == "cpu" else "gpu"
    jax.config.update("jax_default_device", jax.devices(platform)[0])
    jax.config.update("jax_enable_x64", problem.dtype == torch.float64)
    _, apply = stax.serial(*map(_stax, problem.network.net))
    weights = [
        _weights(layer, leaves(tree))
        for layer, tree in zip(problem.network.net, problem.params(), strict=True)
    ]
    make = _one_layer if problem.network.is_layer else _whole_network
    return make(apply, weights, _picture_array(problem.x()), _picture_array(problem.target()))


def _whole_network(apply: Apply, weights: Any, x: Array, target: Array) -> Contender:
    init, update, params_of = optimizers.momentum(LEARNING_RATE, MOMENTUM)

    def loss_of(params: Any, x: Array, target: Array) -> Array:
        return jnp.mean(jnp.square(apply(params, x) - target))

    def one_step(state: Any, x: Array, target: Array) -> tuple[Array, Any]:
        loss, grads = jax.value_and_grad(loss_of)(params_of(state), x, target)
        return loss, update(0, grads, state)

    step = jax.jit(one_step, donate_argnums=0)
    predict = jax.jit(lambda state, x: apply(params_of(state), x))
    state = init(weights)

    def train() -> Array:
        nonlocal state
        loss, state = jax.block_until_ready(step(state, x, target))
        return loss

    return Contender(
        train,
        lambda: jax.block_until_ready(predict(state, x)),
        lambda: _params(params_of(state)),
        _tensor,
    )


def _one_layer(apply: Apply, weights: Any, x: Array, grad: Array) -> Contender:
    last: Any = ()

    @jax.jit
    def forward_and_back(weights: Any, x: Array, grad: Array) -> tuple[Array, Any]:
        y, back = jax.vjp(lambda x, weights: apply(weights, x), x, weights)
        return y, back(grad)

    def train() -> Array:
        nonlocal last
        y, last = jax.block_until_ready(forward_and_back(weights, x, grad))
        return y

    predict = jax.jit(apply)
    return Contender(
        train,
        lambda: jax.block_until_ready(predict(weights, x)),
        lambda: [_tensor(last[0]), *_params(last[1])],
        _tensor,
    )


def _stax(layer: fn.Layer) -> StaxLayer:
    if isinstance(layer, fn.Conv2d):
        padding = layer.padding
        padding = padding.upper() if isinstance(padding, str) else [(p, p) for p in padding]
        return stax.GeneralConv(
            ("NHWC", "HWIO", "NHWC"), layer.out_channels, layer.kernel_size, layer.stride, padding
        )
    if isinstance(layer, fn.UpsampleConv2d):
        conv = fn.Conv2d(layer.out_channels, layer.kernel_size, padding=layer.padding)
        return stax.serial(_upsample(*layer.scale), _stax(conv))
    if isinstance(layer, fn.Upsample2d):
        return _upsample(*layer.scale)
    if isinstance(layer, fn.Sigmoid):
        return stax.Sigmoid
    if isinstance(layer, fn.ReLU):
        return stax.Relu
    raise ValueError(f"expected a layer that stax has, got {layer}")


def _upsample(rows: int, columns: int) -> StaxLayer:
    return stax.elementwise(lambda x: jnp.repeat(jnp.repeat(x, rows, axis=1), columns, axis=2))


def _weights(layer: fn.Layer, params: list[Tensor]) -> Any:
    """The parameters of `_stax(layer)`."""
    arrays: tuple[Array, ...] = ()
    if params:
        weight, bias = params
        arrays = (_array(weight.permute(2, 3, 1, 0)), _array(bias.reshape(1, 1, 1, -1)))
    return [(), arrays] if isinstance(layer, fn.UpsampleConv2d) else arrays


def _params(weights: Any) -> list[Tensor]:
    """Weights and biases in turn, in PyTorch's layouts."""
    tensors = map(from_dlpack, jax.tree.leaves(weights))
    return [
        tensor.flatten() if i % 2 else tensor.permute(3, 2, 0, 1)
        for i, tensor in enumerate(tensors)
    ]


def _picture_array(pictures: Tensor) -> Array:
    return _array(pictures.permute(0, 2, 3, 1))


def _tensor(result: Array) -> Tensor:
    """A loss, or images, as a tensor."""
    tensor = from_dlpack(result)
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor


def _array(tensor: Tensor) -> Array:
    return jnp.from_dlpack(tensor.contiguous()).copy()
