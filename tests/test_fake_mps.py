"""Everything that runs in a training loop runs on a Mac's GPU, as far as another machine can tell.

MPS has no float64. Fake tensors have a device, a shape and a dtype, but no values; a float64 among
them on MPS is refused here, as PyTorch refuses it there.
"""

from functools import partial
from types import SimpleNamespace

import optree
import pytest
import torch
from registry import draw_x
from test_fake_cuda import NET, OPTIMIZERS, is_tensor, skip_where_torch_cannot
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import funcnet as fn
from funcnet import batch_statistics
from funcnet.checkpoint import storable
from funcnet.testing.registry import REGISTRY
from funcnet.testing.registry.losses import LOSS_ROWS, draw_target

MPS = torch.device("mps:0")
THERE = {MPS, torch.device("meta")}
WIDE = (torch.float64, torch.complex128)


class NoFloat64(TorchDispatchMode):
    """Refuses each operation on MPS that takes or makes a float64, or casts to one while moving."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in optree.tree_leaves((args, kwargs)) if is_tensor(leaf)]
        made = [leaf for leaf in optree.tree_leaves(result) if is_tensor(leaf)]
        if any(x.device in THERE and x.dtype in WIDE for x in given + made):
            raise TypeError(f"{func}: MPS has no float64")
        from_there = any(x.device in THERE and x.dtype not in WIDE for x in given)
        if from_there and any(x.dtype in WIDE for x in made):
            raise TypeError(f"{func}: cast to float64 on MPS, or on the way from there")
        return result


@pytest.fixture
def there():
    """The function that takes a tree of tensors to fake ones on MPS, where float64 is refused."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, NoFloat64():

        def to_mps(tree):
            return optree.tree_map(
                lambda x: mode.from_tensor(x).to(MPS) if is_tensor(x) else x, tree
            )

        yield to_mps


def assert_there(tree):
    assert {leaf.device for leaf in optree.tree_leaves(tree) if is_tensor(leaf)} <= THERE


LAYERS = [cls for cls in REGISTRY if cls is not fn.Cast]  # its examples cast to float64


@pytest.mark.parametrize("cls", LAYERS, ids=lambda cls: cls.__name__)
def test_layers(cls, there):
    layer, shape = REGISTRY[cls].examples[0]
    x = there(draw_x(layer, (2, *shape)))
    with skip_where_torch_cannot():
        params = there(layer.init(fn.key(0), shape))
        y = layer.apply(params, x, key=fn.key(1))
        assert_there((y, layer.vjp(params, x, y, key=fn.key(1))))


@pytest.mark.parametrize("row", LOSS_ROWS, ids=lambda row: row.loss.__name__)
def test_losses(row, there):
    for kind in row.targets(row.loss()):
        loss, x = row.loss(), fn.normal(fn.key(0), (3, 4, 2))
        x, target = there((x, draw_target(kind, loss, x, 1)))
        assert_there((loss.apply(x, target), loss.vjp(x, target)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda it: type(it).__name__)
def test_a_training_step(optimizer, there):
    x, target = there((torch.zeros(4, 3, 8, 8), torch.arange(4)))
    params = there(NET.init(fn.key(0), (3, 8, 8)))
    _, grads = fn.value_and_grad(NET, fn.CrossEntropy())(params, x, target, key=fn.key(1))
    grads, _ = fn.clip_by_global_norm(grads, 1.0)
    state = optimizer.init(params)
    for step in (optimizer.step, optimizer.step_):
        new, state = step(params, grads, state)
        assert_there((new, fn.average(params, new, 0.9), state[1:]))


def test_gradients_of_each_example():
    """On meta tensors: a fake one on MPS cannot be indexed by a torch without MPS."""
    net = fn.Sequential(fn.Conv2d(4, 3), fn.GroupNorm(2), fn.Flatten(), fn.Linear(5))
    params = net.init(fn.key(0), (3, 8, 8), device="meta")
    x, target = torch.zeros(4, 3, 8, 8, device="meta"), torch.arange(4, device="meta")
    clipped = partial(fn.clipped_value_and_grad, max_norm=1.0)
    for gradients in (fn.per_example, fn.gradient_norms, clipped):
        with NoFloat64():
            assert_there(gradients(net, fn.CrossEntropy())(params, x, target))


RATES = [0.1, fn.schedules.cosine(0.1, 10), lambda step: 0.1 * 0.5**step]


@pytest.mark.parametrize("lr", RATES, ids=["number", "schedule", "function"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda lr: fn.SGD(lr, momentum=0.9, dampening=0.5),
        lambda lr: fn.AdamW(lr, amsgrad=True),
        lambda lr: fn.RMSprop(lr, momentum=0.9),
    ],
    ids=["SGD", "AdamW", "RMSprop"],
)
def test_counts_of_many_states_on_the_device(optimizer, lr, there):
    """Inside torch.func.vmap a count has no value for Python, and may lie on the device."""
    optimizer, params = optimizer(lr), there({"w": torch.ones(2, 3)})
    state = optimizer.init(params)._replace(step=there(torch.zeros(2, dtype=torch.int64)))
    new, state = torch.func.vmap(optimizer.step)(params, params, state)
    assert_there((new, state))


SCHEDULES = [
    fn.schedules.constant(0.1),
    fn.schedules.linear(0.1, 0.0, 10),
    fn.schedules.cosine(0.1, 10, warmup=2),
    fn.schedules.exponential(0.1, 0.5),
    fn.schedules.piecewise({0: 0.1, 5: 0.01}),
    fn.schedules.one_cycle(0.1, 10),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules(schedule, there):
    assert schedule(there(torch.arange(3))).dtype == torch.float64


@pytest.mark.parametrize("fold", [True, False])
def test_batch_statistics(fold, there, monkeypatch):
    net = fn.Sequential(
        *(fn.Conv2d(4, 3, padding=1), fn.BatchNorm(), fn.ConvTranspose2d(4, 3), fn.BatchNorm()),
        *(fn.ReLU(), fn.BatchNorm(), fn.BatchNorm(affine=False)),
    )
    params, x = there((net.init(fn.key(0), (3, 8, 8)), torch.zeros(2, 3, 8, 8)))
    m = fn.moments(net, params, x, key=fn.key(0))
    m = fn.merge_moments(m, m)
    assert {leaf.dtype for leaf in optree.tree_leaves(m)} == {torch.float64}
    monkeypatch.setattr(batch_statistics, "is_eager", lambda: False)  # m has no values
    plain, params = fn.for_inference(net, params, m, fold=fold)
    assert_there((params, plain.apply(params, x)))


@pytest.mark.parametrize("affine", [True, False])
def test_a_module_that_evaluates(affine, there):
    module = nn.BatchNorm2d(3, affine=affine, device=MPS).eval()
    assert_there(fn.interop.from_torch(module, (3, 4, 4)))


class Buffer(torch.Tensor):
    """A tensor on MPS whose `data_ptr` is its buffer's handle plus an offset, as PyTorch's is."""

    device = MPS
    handle = 0

    def data_ptr(self):
        return self.handle + self.storage_offset() * self.itemsize

    def untyped_storage(self):
        return SimpleNamespace(data_ptr=lambda: self.handle)


def test_tensors_of_two_buffers_share_no_memory():
    """Handles lie closer to each other than the buffers are long."""
    tensors = {str(i): torch.zeros(100).as_subclass(Buffer) for i in range(3)}
    for i, tensor in enumerate(tensors.values()):
        tensor.handle = 1000 + 64 * i
    storable._check_untied(tensors)
    tensors["view"] = tensors["1"][90:]
    tensors["view"].handle = tensors["1"].handle
    with pytest.raises(ValueError, match=r"^view: .* shares memory with 1"):
        storable._check_untied(tensors)


def test_load_names_what_mps_cannot_hold(tmp_path, monkeypatch):
    fn.save(tmp_path / "file", {"w": [torch.ones(3, dtype=torch.float64)]})
    to = torch.Tensor.to

    def refusing(x, device, dtype):
        if dtype in WIDE:
            raise TypeError("Cannot convert a MPS Tensor to float64")
        return to(x, "cpu", dtype)

    monkeypatch.setattr(torch.Tensor, "to", refusing)
    with pytest.raises(TypeError, match=r"^load: w\.0: Cannot convert a MPS Tensor to float64"):
        fn.load(tmp_path / "file", device="mps")
    assert fn.load(tmp_path / "file", device="mps", dtype=torch.float32)["w"][0].sum() == 3
