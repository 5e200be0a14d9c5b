"""A user's script: `.ci/run` checks its types, against an installed funcnet.

An annotation says what a type checker is to infer. `tests/test_package.py` runs it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import funcnet as fn
from funcnet.layer import Shape
from funcnet.ops.need import Need
from funcnet.testing import check_function, check_vjp

# Networks and gradients
net = fn.Sequential(fn.Linear(8), fn.ReLU(), fn.Residual(fn.Linear(8)), fn.Linear(2))
first: fn.Layer = net[0]
rest: fn.Sequential = net[1:]
key, data_key = fn.split(fn.key(0))
params = net.init(key, (4,), dtype=torch.float32)
x, target = fn.normal(data_key, (3, 4)), torch.tensor([0, 1, 1])
y: Tensor = net.apply(params, x, key=key)
shape: tuple[int, ...] = net.out_shape((4,))
dx: Tensor | None = net.vjp(params, x, y)[1]
table: str = fn.summary(net, (4,))
loss = fn.CrossEntropy(label_smoothing=0.1)
value: Tensor
value, grads = fn.value_and_grad(net, loss)(params, x, target, key=key)
grads, norm = fn.clip_by_global_norm(grads, 1.0)
norms: Tensor = fn.gradient_norms(net, loss)(params, x, target)[1]
values, total = fn.clipped_value_and_grad(net, loss, 1.0)(params, x, target)
paths: list[str] = [path for path, _ in fn.gradients_by_layer(net, loss)(params, x, target)]
layers: list[fn.Layer] = [record.layer for record in fn.trace(net, params, x)]
inference: fn.Layer = fn.for_inference(net, params, fn.moments(net, params, x, key=key))[0]

# Optimisers
adam = fn.Adam(fn.schedules.cosine(1e-3, steps=10))
state: fn.AdamState = adam.init(params)
params, state = adam.step(params, grads, state)
count: Tensor = state.step
sharded: fn.distributed.Sharded[fn.AdamState] = fn.distributed.Sharded(adam)
sgd_state: fn.SGDState = fn.SGD(lambda step: 0.1 / (1 + step), momentum=0.9).init(params)
parts = fn.Partition(lambda path, leaf: path, {"0.weight": adam, "0.bias": None})
some: list[fn.Optimizer[Any]] = [adam, parts, fn.SGD(0.1), fn.RMSprop()]
lr: float = fn.schedules.one_cycle(0.1, steps=10)(3)

# Files
fn.save_model("model.safetensors", net, params, metadata={"data": "digits"})
loaded: fn.Layer = fn.load_model("model.safetensors")[0]
shapes: dict[str, tuple[int, ...]] = fn.inspect("model.safetensors").shapes
found: tuple[int, Any] | None = fn.Checkpoints("run").latest(like=params)
tree, skipped = fn.load("model.safetensors", like=params, strict=False)

# torch.nn
module: nn.Module = fn.interop.to_torch(net, params)
ours: fn.Layer = fn.interop.from_torch(nn.Sequential(nn.Linear(4, 2)), (4,))[0]
named: dict[str, Tensor] = fn.interop.state_dict(params)


@fn.register_node
@dataclass(frozen=True)
class Scale(fn.Layer):
    """y = w ∘ x;  dx = w ∘ dy,  dw = Σ x ∘ dy."""

    start: float = 1.0

    def _params(self, shape: Shape) -> dict[str, fn.Param]:
        return {"weight": fn.Param(shape, fn.initializers.Constant(self.start))}

    def _fwd(self, params: Any, x: Tensor, key: fn.Key | None) -> tuple[Tensor, Tensor]:
        return params["weight"] * x, x

    def _bwd(self, params: Any, x: Tensor, dy: Tensor, need: Need) -> Any:
        dweight = (x * dy).sum(0) if need.params else None
        return {"weight": dweight}, params["weight"] * dy if need.input else None


scale: Scale = Scale(2.0)
check_vjp(scale, scale.init(key, (4,)), x)
check_vjp(loss, y, target, budget=1.0)
check_function(nn.functional.gelu, x, reference=nn.functional.gelu)
