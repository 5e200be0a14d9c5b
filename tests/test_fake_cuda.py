"""Everything that runs in a training loop runs on a GPU, as far as a machine without one can tell.

Fake tensors have a device, a shape and a dtype, but no values. On them torch refuses operands of
two devices, and whatever needs a value; copies between the devices are refused here.
"""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from pathlib import Path

import optree
import pytest
import torch
from registry import EXAMPLES, draw_x, key_for
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import funcnet as fn
from funcnet.testing.registry.losses import LOSS_ROWS, draw_target

CUDA = "cuda:0"
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
IMAGES = [(*example, torch.channels_last) for example in EXAMPLES if len(example[1]) == 3]
CASES = [(*example, torch.contiguous_format) for example in EXAMPLES] + IMAGES


class HostCopyError(AssertionError):
    """A GPU would have to wait for the host, or the host for it."""


class NoHostCopies(TorchDispatchMode):
    """Refuses each operation that copies between devices, or reads a value from a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in optree.tree_leaves((args, kwargs, result)) if is_tensor(leaf)]
        devices = {t.device.type for t in tensors}
        reads = func is torch.ops.aten._local_scalar_dense.default and "cuda" in devices
        if reads or (func in COPIES and len(devices) > 1):
            raise HostCopyError(f"{func} between {devices}")
        return result


def is_tensor(leaf):
    return isinstance(leaf, torch.Tensor)


def on_gpu(mode, tree):
    """The tree with fake tensors on a GPU in the place of tensors."""

    def fake(leaf):
        return mode.from_tensor(leaf).to(CUDA) if is_tensor(leaf) else leaf

    return optree.tree_map(fake, tree)


def alike(found, tree):
    """Whether two trees have the same structure, shapes and dtypes, all on the GPU."""

    def told(leaf):
        return torch.device(CUDA), leaf.shape, leaf.dtype

    def seen(leaf):
        return leaf.device, leaf.shape, leaf.dtype

    return optree.tree_map(seen, found) == optree.tree_map(told, tree)


@contextmanager
def skip_where_torch_cannot():
    """Skip where a decomposition of torch's own wants a build that knows GPUs.

    Without one, it cannot index a fake tensor on a GPU (in F.unfold), nor lay it out anew.
    """
    try:
        yield
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        if "not linked" in str(error) and "torch/_decomp" in Path(frames[-1].filename).as_posix():
            pytest.skip(f"torch: {error}")
        raise


@pytest.mark.parametrize(("layer", "shape", "memory_format"), CASES, ids=str)
def test_layers(layer, shape, memory_format):
    params, x = layer.init(fn.key(3), shape), draw_x(layer, (2, *shape))
    x = x.contiguous(memory_format=memory_format)
    y = layer.apply(params, x, key=fn.key(1))
    dparams, dx = layer.vjp(params, x, y, key=fn.key(1))
    with FakeTensorMode() as mode:
        params, x, grad = on_gpu(mode, (params, x, y))
        for key in (None, fn.key(1)) if key_for(layer) is None else (fn.key(1),):
            with skip_where_torch_cannot(), NoHostCopies():
                assert alike(layer.apply(params, x, key=key), y)
                found = layer.vjp(params, x, grad, key=key)
            assert alike(found[0], dparams)
            assert found[1] is None if dx is None else alike(found[1], dx)


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (row.loss(reduction=reduction), kind)
        for row in LOSS_ROWS
        for reduction in ("mean", "sum")
        for kind in row.targets(row.loss())
    ],
    ids=str,
)
def test_losses(loss, kind):
    x = fn.normal(fn.key(0), (3, 4, 2))
    target = draw_target(kind, loss, x, 1)
    with FakeTensorMode() as mode:
        x, target = on_gpu(mode, (x, target))
        with NoHostCopies():
            value, dx = loss.apply(x, target), loss.vjp(x, target)
        assert alike(value, torch.zeros(()))
        assert alike(dx, x)


OPTIMIZERS = [
    fn.SGD(0.1),
    fn.SGD(fn.schedules.cosine(0.1, 10), momentum=0.9, weight_decay=0.1, nesterov=True),
    fn.Adam(weight_decay=0.1, amsgrad=True, maximize=True),
    fn.AdamW(fn.schedules.constant(0.1)),
    fn.RMSprop(weight_decay=0.1, momentum=0.9, centered=True),
    fn.Partition(
        lambda path, leaf: "bias" if leaf.ndim == 1 else "weight",
        {"weight": fn.Adam(), "bias": fn.SGD(0.1, momentum=0.9)},
    ),
]
NET = fn.Sequential(
    fn.Conv2d(8, 3, padding=1),
    fn.GroupNorm(2),
    fn.ReLU(),
    fn.Residual(fn.Sequential(fn.Conv2d(8, 3, padding="same"), fn.BatchNorm(), fn.SiLU())),
    fn.MaxPool2d(2),
    fn.Dropout2d(0.2),
    fn.UpsampleConv2d(4),
    fn.Flatten(),
    fn.Dropout(),
    fn.Linear(5),
)


@pytest.mark.parametrize("step", ["step", "step_"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda it: type(it).__name__)
def test_a_training_step(optimizer, step):
    start, x, target = NET.init(fn.key(0), (3, 8, 8)), torch.zeros(4, 3, 8, 8), torch.arange(4)
    value_and_grad = fn.value_and_grad(NET, fn.CrossEntropy())
    with FakeTensorMode() as mode:
        params, x, target = on_gpu(mode, (start, x, target))
        state = optimizer.init(params)
        with NoHostCopies():
            for i in range(2):
                value, grads = value_and_grad(params, x, target, key=fn.fold_in(fn.key(1), i))
                grads, norm = fn.clip_by_global_norm(grads, 1.0)
                params, state = getattr(optimizer, step)(params, grads, state)
                mean = fn.average(params, params, 0.9)
        for tree in (params, grads, mean):
            assert alike(tree, start)
        assert alike((value, norm), (torch.zeros(()), torch.zeros(())))


def test_batch_statistics():
    params, x = NET.init(fn.key(0), (3, 8, 8)), torch.zeros(4, 3, 8, 8)
    with FakeTensorMode() as mode:
        params, x = on_gpu(mode, (params, x))
        with NoHostCopies():
            m = fn.moments(NET, params, x, key=fn.key(1))
            net, own = fn.for_inference(NET, params, fn.merge_moments(m, m), fold=False)
            assert alike(net.apply(own, x), torch.zeros(4, 5))


def test_what_is_refused():
    with FakeTensorMode(), NoHostCopies():
        on_cpu, there = torch.ones(2), torch.ones(2, device=CUDA)
        for copy in (lambda: there.cpu(), lambda: on_cpu.to(CUDA), lambda: there.to("cpu", float)):
            with pytest.raises(HostCopyError):
                copy()
        with pytest.raises(RuntimeError, match="on the same device"):
            on_cpu + there
        with pytest.raises(Exception, match="_local_scalar_dense"):
            there.sum().item()
