"""A user's script: `.ci/run` checks its types, against an installed funcnet."""

import torch
from torch import Tensor

import funcnet as fn
from funcnet.testing import check_vjp

net = fn.Sequential(fn.Linear(8), fn.ReLU(), fn.Linear(2))
params = net.init(fn.key(0), (4,))
x, target = fn.normal(fn.key(1), (3, 4)), torch.tensor([0, 1, 1])
adam = fn.Adam(fn.schedules.cosine(1e-3, steps=10))
state = adam.init(params)
value, grads = fn.value_and_grad(net, fn.CrossEntropy())(params, x, target)
params, state = adam.step(params, grads, state)
y: Tensor = net.apply(params, x)
shape: tuple[int, ...] = net.out_shape((4,))
check_vjp(net, params, x)
