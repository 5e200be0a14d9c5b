"""Many processes: what every rank of a group of 2, and of 3, checks (`tests/ranks.py`)."""

import gc
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import optree
import pytest
import ranks
import torch
import torch.distributed as dist
from test_gradients import Height

import funcnet as fn

NAMES = [function.__name__ for function in ranks.CHECKS]


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def found(request, tmp_path_factory):
    """For each rank, {name of a check: its traceback, or ""}; and how the processes ended."""
    size, folder = request.param, tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(Path(ranks.__file__))]
    processes = [
        subprocess.Popen([*command, str(rank), str(size), str(folder)]) for rank in range(size)
    ]

    def kill():
        for process in processes:
            process.kill()

    limit = threading.Timer(ranks.LIMIT, kill)
    limit.start()
    try:
        ends = [process.wait() for process in processes]
    finally:
        limit.cancel()
        kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)], ends


@pytest.mark.parametrize("name", NAMES)
def test_every_rank(found, name):
    reports, _ = found
    alive = reports[:-1] if name == NAMES[-1] else reports
    # A check that a rank was killed in is not in its report.
    assert [report.get(name) for report in alive] == [""] * len(alive), name


def test_the_last_rank_died_in_the_last_check(found):
    reports, ends = found
    assert ends == [0] * (len(ends) - 1) + [7]
    assert NAMES[-1] not in reports[-1]


# --- One process


@pytest.fixture
def alone():
    """A group of this process alone; what is in it, held by nobody else."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gc.collect()
    gc.disable()
    yield weakref.ref(dist.group.WORLD)
    gc.enable()
    if dist.is_initialized():
        dist.destroy_process_group()


def take_gradients(net, params, x):
    fn.distributed.value_and_grad(net, fn.MSE())(params, x, torch.zeros(5, 3))


def take_steps(net, params, x):
    optimizer = fn.distributed.Sharded(fn.Adam(0.1))
    params, state = optimizer.step(params, params, optimizer.init(params))
    optimizer.step_(params, params, state)


def take_means(net, params, x):
    fn.distributed.mean(params)
    batch_norm = fn.BatchNorm()
    own = fn.moments(batch_norm, batch_norm.init(fn.key(0), (4,)), x, key=fn.key(2))
    fn.distributed.merge_moments(own)


def fail(net, params, x):
    with pytest.raises(ValueError, match="Linear"):
        fn.distributed.value_and_grad(net, fn.MSE())(params, x[:, 1:], torch.zeros(5, 3))


@pytest.mark.parametrize("use", [take_gradients, take_steps, take_means, fail])
def test_a_group_ends_when_it_is_destroyed(alone, use):
    """A group that is kept alive keeps gloo's threads: they abort Python if it ends before them."""
    net = fn.Sequential(fn.Linear(8), fn.Tanh(), fn.Linear(3))
    use(net, net.init(fn.key(0), (4,)), fn.normal(fn.key(1), (5, 4)))
    dist.destroy_process_group()
    assert alone() is None


@pytest.mark.usefixtures("alone")
def test_a_loss_without_a_target():
    net = fn.Linear(3)
    params, x = net.init(fn.key(0), (4,)), fn.normal(fn.key(1), (5, 4))
    expected = fn.value_and_grad(net, Height())(params, x, None)
    found = fn.distributed.value_and_grad(net, Height())(params, x, None)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_in_a_compiled_function(alone):
    net = fn.Linear(3)
    params, x = net.init(fn.key(0), (4,)), fn.normal(fn.key(1), (5, 4))
    moments = fn.moments(fn.BatchNorm(affine=False), (), x, key=fn.key(2))
    optimizer = fn.distributed.Sharded(fn.SGD(0.1, momentum=0.9))

    def train(params, x):
        state = optimizer.init(params)
        value, grads = fn.distributed.value_and_grad(net, fn.MSE())(params, x, x[:, :3])
        params, state = optimizer.step(params, grads, state)
        mean = fn.distributed.mean({"value": 2 * value})
        return params, state, mean, fn.distributed.merge_moments(moments)

    torch._dynamo.reset()
    found = optree.tree_leaves(torch.compile(train, backend="eager")(params, x))
    assert all(map(torch.equal, found, optree.tree_leaves(train(params, x))))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"no graph holds .* of funcnet\.dist"):
        torch.compile(train, backend="eager", fullgraph=True)(params, x)


def test_without_a_group_it_says_what_to_call():
    assert not dist.is_initialized()
    expected = "expected torch.distributed.init_process_group to have been called"
    with pytest.raises(RuntimeError, match=rf"distributed\.mean: {expected}"):
        fn.distributed.mean(torch.ones(2))
    with pytest.raises(RuntimeError, match=f"Sharded: {expected}"):
        fn.distributed.Sharded(fn.SGD(0.1)).init(torch.ones(2))


def test_values():
    grads_of = fn.distributed.value_and_grad
    sharded = fn.distributed.Sharded(fn.Adam(0.1))
    in_small_buckets = grads_of(fn.ReLU(), fn.MSE(), bucket_bytes=9)
    for value in (grads_of(fn.ReLU(), fn.MSE()), in_small_buckets, sharded):
        assert eval(repr(value), {**vars(fn), "Sharded": fn.distributed.Sharded}) == value
        assert hash(value) == hash(value)
    assert repr(sharded) == "Sharded(Adam(lr=0.1))"
