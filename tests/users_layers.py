"""Right layers, as users write them: smooth and kinked ones, single and coupled over the batch,
with odd trees, with random numbers, and with values that autograd cannot follow."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import funcnet as fn


@dataclass(frozen=True)
class Plain(fn.Layer):
    """A layer without parameters that keeps shapes."""

    def init(self, key, shape, *, dtype=None, device=None):
        return ()

    def out_shape(self, shape):
        return tuple(shape)


@dataclass(frozen=True)
class Dense(fn.Layer):
    """y = tanh(W x + b)."""

    size: int = 4

    def init(self, key, shape, *, dtype=None, device=None):
        a, b = fn.split(key)
        return {
            "weight": fn.normal(a, (self.size, shape[0]), dtype=dtype, device=device),
            "bias": fn.normal(b, (self.size,), dtype=dtype, device=device),
        }

    def out_shape(self, shape):
        return (self.size,)

    def fwd(self, params, x, *, key=None):
        y = torch.tanh(x @ params["weight"].T + params["bias"])
        return y, (x, y)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        x, y = residuals
        dz = grad * (1 - y * y)
        dparams = {"weight": dz.T @ x, "bias": dz.sum(0)}
        return dparams, dz @ params["weight"] if input_grad else None


@dataclass(frozen=True)
class Elementwise(Plain):
    """y = f(x) for each entry."""

    name: str

    def fwd(self, params, x, *, key=None):
        y = {
            "abs": x.abs,
            "clip": lambda: x.clamp(-0.5, 0.5),
            "exp": x.exp,
            "log": x.log,
            "sqrt": x.sqrt,
            "square": x.square,
            "cube": lambda: x**3,
            "reciprocal": x.reciprocal,
            "softplus": lambda: F.softplus(x),
            "steps": lambda: x.floor() + x,
            "leaky": lambda: F.leaky_relu(x, 0.1),
            "identity": x.clone,
        }[self.name]()
        return y, x

    def bwd(self, params, x, grad, *, input_grad=True):
        if not input_grad:
            return (), None
        slope = {
            "abs": lambda: torch.where(x >= 0, 1.0, -1.0),  # not autograd's choice at 0
            "clip": lambda: (x.abs() < 0.5) * 1.0,
            "exp": x.exp,
            "log": x.reciprocal,
            "sqrt": lambda: 0.5 / x.sqrt(),
            "square": lambda: 2 * x,
            "cube": lambda: 3 * x**2,
            "reciprocal": lambda: -1 / x.square(),
            "softplus": x.sigmoid,
            "steps": lambda: torch.ones_like(x),
            "leaky": lambda: torch.where(x > 0, 1.0, 0.1),
            "identity": lambda: torch.ones_like(x),
        }[self.name]()
        return (), grad * slope.to(grad.dtype)


@dataclass(frozen=True)
class Softmax(Plain):
    """Softmax over the last axis. Its gradient sums to 0, but for rounding."""

    def fwd(self, params, x, *, key=None):
        y = x.softmax(-1)
        return y, y

    def bwd(self, params, y, grad, *, input_grad=True):
        return (), y * (grad - (y * grad).sum(-1, keepdim=True)) if input_grad else None


@dataclass(frozen=True)
class SoftmaxOfBias(fn.Layer):
    """softmax(x + b) with one number b, whose gradient is 0, but for rounding."""

    def init(self, key, shape, *, dtype=None, device=None):
        return {"bias": fn.normal(key, (1,), dtype=dtype, device=device)}

    def out_shape(self, shape):
        return tuple(shape)

    def fwd(self, params, x, *, key=None):
        return Softmax().fwd((), x + params["bias"])

    def bwd(self, params, y, grad, *, input_grad=True):
        _, dx = Softmax().bwd((), y, grad)
        return {"bias": dx.sum().reshape(1)}, dx if input_grad else None


@dataclass(frozen=True)
class BatchNorm(fn.Layer):
    """(x − mean) / √(var + ε) over the batch: examples are coupled."""

    def init(self, key, shape, *, dtype=None, device=None):
        return {"scale": torch.ones(shape, dtype=dtype, device=device)}

    def out_shape(self, shape):
        return tuple(shape)

    def fwd(self, params, x, *, key=None):
        centred = x - x.mean(0)
        inverse = (centred.square().mean(0) + 1e-3).rsqrt()
        return params["scale"] * centred * inverse, (centred * inverse, inverse)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        unit, inverse = residuals
        g = grad * params["scale"]
        dx = inverse * (g - g.mean(0) - unit * (g * unit).mean(0))
        return {"scale": (grad * unit).sum(0)}, dx if input_grad else None


@dataclass(frozen=True)
class LayerNorm(Plain):
    """Each example with mean 0 and variance 1. A constant example gives nothing but rounding."""

    def fwd(self, params, x, *, key=None):
        axes = tuple(range(1, x.ndim))
        centred = x - x.mean(axes, keepdim=True)
        scale = (centred.square().mean(axes, keepdim=True) + 1e-5).rsqrt()
        y = centred * scale
        return y, (y, scale)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        y, scale = residuals
        axes = tuple(range(1, y.ndim))
        centred = grad - grad.mean(axes, keepdim=True)
        dx = scale * (centred - y * (y * grad).mean(axes, keepdim=True))
        return (), dx if input_grad else None


@dataclass(frozen=True)
class MaxPool(Plain):
    """The largest of each pair of neighbours on the last axis; of two equal ones, the second."""

    def out_shape(self, shape):
        return (*shape[:-1], shape[-1] // 2)

    def fwd(self, params, x, *, key=None):
        a, b = x[..., 0::2], x[..., 1::2]
        a = a[..., : b.shape[-1]]
        return torch.maximum(a, b), (a > b, x.shape)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        if not input_grad:
            return (), None
        first, shape = residuals
        dx = grad.new_zeros(shape)
        dx[..., 0 : 2 * first.shape[-1] : 2] = grad * first
        dx[..., 1::2] = grad * ~first
        return (), dx


@dataclass(frozen=True)
class Dropout(Plain):
    """Dropout with p = 1/2 by the key; the identity without one."""

    def fwd(self, params, x, *, key=None):
        if key is None:
            return x.clone(), None
        kept = fn.bernoulli(key, 0.5, x.shape, device=x.device) * 2
        return x * kept, kept

    def bwd(self, params, kept, grad, *, input_grad=True):
        if not input_grad:
            return (), None
        return (), grad.clone() if kept is None else grad * kept


@dataclass(frozen=True)
class Noise(Plain):
    """Adds numbers drawn from its key; without one it adds nothing."""

    def fwd(self, params, x, *, key=None):
        return (x.clone() if key is None else x + fn.normal(key, x.shape, dtype=x.dtype)), None

    def bwd(self, params, residuals, grad, *, input_grad=True):
        return (), grad.clone() if input_grad else None


@dataclass(frozen=True)
class Passing(fn.Layer):
    """layer(x), whose params are the layer's."""

    layer: fn.Layer

    def init(self, key, shape, *, dtype=None, device=None):
        return self.layer.init(key, shape, dtype=dtype, device=device)

    def out_shape(self, shape):
        return self.layer.out_shape(shape)

    def fwd(self, params, x, *, key=None):
        return self.layer.fwd(params, x, key=key)

    def bwd(self, params, residuals, grad, **need):
        return self.layer.bwd(params, residuals, grad, **need)


@dataclass(frozen=True)
class Weighted(fn.Layer):
    """y = w · (layer(x) + …); params hold w beside those of the layers, by the fields' names."""

    layer: fn.Layer
    other: fn.Layer | None = None

    def parts(self):
        pairs = (("layer", self.layer), ("other", self.other))
        return {name: part for name, part in pairs if part}

    def init(self, key, shape, *, dtype=None, device=None):
        like = {"dtype": dtype, "device": device}
        parts = {name: part.init(key, shape, **like) for name, part in self.parts().items()}
        return {**parts, "w": fn.uniform(key, (), 1.0, 2.0, **like)}

    def out_shape(self, shape):
        return self.layer.out_shape(shape)

    def fwd(self, params, x, *, key=None):
        made = {name: part.fwd(params[name], x, key=key) for name, part in self.parts().items()}
        total = sum(y for y, _ in made.values())
        return params["w"] * total, (made, total)

    def bwd(self, params, residuals, grad, *, input_grad=True, param_grad=True):
        made, total = residuals
        need = {"input_grad": input_grad, "param_grad": param_grad}
        each = {
            name: part.bwd(params[name], made[name][1], params["w"] * grad, **need)
            for name, part in self.parts().items()
        }
        dparams = {name: dpart for name, (dpart, _) in each.items()}
        dx = sum(dx for _, dx in each.values()) if input_grad else None
        return {**dparams, "w": (grad * total).sum()} if param_grad else None, dx


@dataclass(frozen=True)
class OddTree(fn.Layer):
    """Parameters in dicts, lists, tuples and None, one of them unused."""

    def init(self, key, shape, *, dtype=None, device=None):
        a, b, c = (fn.normal(k, (), dtype=dtype, device=device) for k in fn.split(key, 3))
        return {"gains": [a, (b, None)], "unused": {"c": c}, "nothing": ()}

    def out_shape(self, shape):
        return tuple(shape)

    def fwd(self, params, x, *, key=None):
        a, (b, _) = params["gains"]
        return a * x + b * x.square(), x

    def bwd(self, params, x, grad, *, input_grad=True):
        a, (b, _) = params["gains"]
        da, db = (grad * x).sum(), (grad * x.square()).sum()
        dparams = {
            "gains": [da, (db, None)],
            "unused": {"c": torch.zeros_like(params["unused"]["c"])},
            "nothing": (),
        }
        return dparams, grad * (a + 2 * b * x) if input_grad else None


@dataclass(frozen=True)
class Opaque(Dense):
    """A Dense whose forward pass autograd cannot follow."""

    def fwd(self, params, x, *, key=None):
        with torch.no_grad():
            return super().fwd(params, x)


@dataclass(frozen=True)
class HalfOpaque(Dense):
    """A Dense whose bias autograd cannot follow, so that autograd is wrong."""

    def fwd(self, params, x, *, key=None):
        return super().fwd({**params, "bias": params["bias"].detach()}, x)


@dataclass(frozen=True)
class Flatten(Plain):
    """(N, C, H, W) to (N, C·H·W)."""

    def out_shape(self, shape):
        return (torch.Size(shape).numel(),)

    def fwd(self, params, x, *, key=None):
        return x.flatten(1).clone(), x.shape

    def bwd(self, params, shape, grad, *, input_grad=True):
        return (), grad.reshape(shape).clone() if input_grad else None


RIGHT = [
    *map(Elementwise, ("abs", "clip", "exp", "square", "cube", "reciprocal", "softplus")),
    *map(Elementwise, ("steps", "leaky", "identity")),
    Dense(),
    Softmax(),
    SoftmaxOfBias(),
    BatchNorm(),
    LayerNorm(),
    MaxPool(),
    Dropout(),
    OddTree(),
    Opaque(),
    HalfOpaque(),
    Weighted(fn.Frozen(fn.Linear(2))),
    fn.Sequential(Dense(5), Softmax(), fn.Sequential(), Elementwise("abs"), Dense(2)),
    fn.Sequential(BatchNorm(), fn.ReLU(), Dense(3), MaxPool()),
]
