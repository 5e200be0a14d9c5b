"""What every rank of a group checks: `python tests/ranks.py RANK SIZE FOLDER`.

All checks run in order, in one group of processes, since a process takes seconds to start. Rank r
writes {name of a check: its traceback, or ""} to FOLDER/r.json.
"""

import json
import os
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import optree
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import funcnet as fn
from funcnet.testing import strategies

LIMIT = 300
"""Seconds after which the processes are killed."""

TIMEOUT = timedelta(seconds=100 * LIMIT)
"""The groups' own, which nobody lives to see: an error that came by it alone would be missed."""

CHECKS = []
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11, equal_nan=True)
"""Numbers that differ by rounding alone, in float64."""


def check(function):
    CHECKS.append(function)
    return function


def same_everywhere(tree):
    """Whether every rank has the bits that this one has."""
    ours = [leaf.detach().clone() for leaf in optree.tree_leaves(tree)]
    for leaf in ours:
        theirs = leaf.clone()
        dist.broadcast(theirs, 0)
        if not torch.equal(leaf, theirs):
            return False
    return True


def same(a, b):
    pairs = zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def part(x, rank, size):
    return x.tensor_split(size)[rank]


@contextmanager
def recording(monkeypatch, events):
    """The number of entries of each all-reduce, when it begins."""
    own = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        events.append(tensor.numel())
        return own(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        yield


# --- The law: ranks on parts compute what one process computes on the whole


@check
def the_law(rank, size):
    """Any network of the vocabulary; parts of any sizes, 0 too."""

    @settings(
        derandomize=True,  # so that all ranks draw the same
        database=None,
        deadline=None,
        max_examples=40,
        suppress_health_check=[*HealthCheck],
    )
    @given(
        strategies.cases(
            st.one_of(strategies.layers(), strategies.networks()),
            batches=st.integers(0, 5),
            dtypes=st.just(torch.float64),
        ),
        st.lists(st.integers(0, 5), min_size=size - 1, max_size=size - 1),
        st.integers(1, 200),
        st.data(),
    )
    def law(case, cuts, bucket_bytes, data):
        net, params, x = case
        if net.couples_examples:
            return
        y = net.apply(params, x)
        losses = strategies.losses(*([] if y.ndim > 1 and y.shape[1] else [fn.MSE, fn.L1]))
        loss = data.draw(losses)
        target = data.draw(strategies.targets(loss, y))
        edges = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
        own = slice(*[*pairwise(edges)][rank])
        kept = optree.tree_map(torch.clone, params)
        expected = fn.value_and_grad(net, loss)(params, x, target)
        grads_of = fn.distributed.value_and_grad(net, loss, bucket_bytes=bucket_bytes)
        found = grads_of(params, x[own], target[own])
        close(found, expected)
        assert optree.tree_structure(found) == optree.tree_structure(expected)
        assert same_everywhere(optree.tree_map(torch.nan_to_num, found))
        assert same(params, kept)

    law()


LABELS = [[0, 1, 1, 1, 2, 0, 0], [1, 1, 1, 1, 2, 0, 0], [1, 1, 1, 1, 1, 1, 0], [1] * 7, []]


@check
def the_mean_is_over_places_that_count(rank, size):
    net = fn.Sequential(fn.Flatten(), fn.Linear(4), fn.Tanh(), fn.Linear(3))
    params = net.init(fn.key(0), (2, 2), dtype=torch.float64)
    for labels in LABELS:
        x = fn.normal(fn.key(1), (len(labels), 2, 2), dtype=torch.float64)
        t = torch.tensor(labels, dtype=torch.int64)
        for loss in (fn.CrossEntropy(0.1, 1), fn.CrossEntropy(ignore_index=1, reduction="sum")):
            expected = fn.value_and_grad(net, loss)(params, x, t)
            own = x.split([2, *[0] * (size - 2), 5] if labels else [0] * size)[rank]
            first = 0 if rank == 0 else len(x) - len(own)
            found = fn.distributed.value_and_grad(net, loss)(params, own, t[first:][: len(own)])
            close(found, expected)


@check
def masks_are_those_of_micro_batches(rank, size):
    net = fn.Sequential(fn.Linear(8), fn.Dropout(), fn.Linear(2))
    params = net.init(fn.key(0), (3,), dtype=torch.float64)
    x = fn.normal(fn.key(1), (2 * size, 3), dtype=torch.float64)
    t = torch.zeros(2 * size, 2, dtype=torch.float64)
    expected = fn.value_and_grad(net, fn.MSE(), micro_batch=2)(params, x, t, key=fn.key(5))
    grads_of = fn.distributed.value_and_grad(net, fn.MSE())
    close(grads_of(params, part(x, rank, size), part(t, rank, size), key=fn.key(5)), expected)


@check
def frozen_layers_are_not_sent(rank, size):
    net = fn.Sequential(fn.Linear(8), fn.Frozen(fn.Linear(5)))
    params = net.init(fn.key(0), (3,))
    x, t, events = torch.ones(2, 3), torch.zeros(2, 5), []
    with recording(pytest.MonkeyPatch(), events):
        _, grads = fn.distributed.value_and_grad(net, fn.MSE())(params, x, t)
    assert events == [1 + 8 * 3 + 8]
    assert not any(leaf.any() for leaf in optree.tree_leaves(grads[1]))


@check
def sixteen_bits_are_added_in_float32(rank, size):
    """Three numbers whose sum in bfloat16 is 256 in any order; two cannot tell."""
    numbers = [256.0, 0.5, 0.5 + 2**-8][:size]
    expected = float(torch.tensor(sum(numbers)).bfloat16())
    assert expected == (258 if size == 3 else 256)
    net = fn.Sequential(fn.Linear(1, bias=False))
    params = ({"weight": torch.ones(1, 1, dtype=torch.bfloat16)},)
    x = torch.tensor([[numbers[rank]]], dtype=torch.bfloat16)
    value, grads = fn.distributed.value_and_grad(net, fn.L1("sum"))(params, x, torch.zeros_like(x))
    assert grads[0]["weight"].dtype == value.dtype == torch.bfloat16
    assert float(grads[0]["weight"]) == float(value) == expected


# --- Sent while the backward pass runs


@dataclass(frozen=True)
class Noted(fn.Linear):
    """A layer that notes when its gradient is computed."""

    events = []  # noqa: RUF012

    def _bwd(self, params, x, dy, need):
        self.events.append(f"gradient of {self.out_features}")
        return super()._bwd(params, x, dy, need)


@check
def gradients_leave_before_the_first_is_computed(rank, size):
    net = fn.Sequential(Noted(5), fn.Tanh(), fn.Residual(fn.Sequential(Noted(6), Noted(5))))
    params = net.init(fn.key(0), (4,))
    Noted.events.clear()
    with recording(pytest.MonkeyPatch(), Noted.events):
        fn.distributed.value_and_grad(net, fn.MSE(), bucket_bytes=4 * 36)(
            params, torch.ones(2, 4), torch.zeros(2, 5)
        )
    assert Noted.events == [
        "gradient of 5",
        1 + 6 * 5 + 5,  # with the value of the loss
        "gradient of 6",
        5 * 6 + 6,
        "gradient of 5",
        4 * 5 + 5,
    ]


@check
def buckets_are_of_a_dtype(rank, size):
    net = fn.Sequential(*[fn.Linear(4) for _ in range(6)])
    params, events = net.init(fn.key(0), (4,)), []
    with recording(pytest.MonkeyPatch(), events):
        grads_of = fn.distributed.value_and_grad(net, fn.MSE(), bucket_bytes=200)
        grads_of(params, torch.ones(2, 4), torch.zeros(2, 4))
    assert events == [1 + 20, 60, 40]


# --- Mean, moments


@check
def mean(rank, size):
    numbers = [torch.arange(6.0).view(2, 3) + 10 * r for r in range(size)]
    tree = {
        "a": numbers[rank],
        "b": (numbers[rank].double(), numbers[rank].to(torch.complex64) * 1j),
        "c": torch.tensor(float(rank)),
        "d": numbers[rank].T,
    }
    kept, events = optree.tree_map(torch.clone, tree), []
    with recording(pytest.MonkeyPatch(), events):
        found = fn.distributed.mean(tree, weight=rank + 1)
    assert events == [13, 6, 6]  # float32, float64, complex64
    total = sum(range(1, size + 1))
    expected = sum(x * (r + 1) for r, x in enumerate(numbers)) / total
    torch.testing.assert_close(found["a"], expected)
    torch.testing.assert_close(found["b"], (expected.double(), expected * 1j), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["d"], expected.T)
    assert found["d"].stride() == tree["d"].stride()
    assert same(tree, kept)
    assert same_everywhere(found)
    torch.testing.assert_close(fn.distributed.mean(tree)["c"], torch.tensor((size - 1) / 2))
    assert fn.distributed.mean(()) == ()
    for dtype in (torch.float16, torch.bfloat16):
        alike = torch.tensor([2.0**-24, 2.0**-133, 1.0, 3.0], dtype=dtype)  # two are the smallest
        assert torch.equal(fn.distributed.mean(alike), alike)


@check
def a_rank_of_weight_0_does_not_count(rank, size):
    own = torch.tensor([float("nan") if rank == 0 else 3.0])
    assert fn.distributed.mean(own, weight=min(rank, 1)) == 3.0
    for weight in (1e308, 5e-324):
        assert fn.distributed.mean(torch.ones(2), weight=weight).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=f"expected a weight above 0 on one of {size} ranks"):
        fn.distributed.mean(own, weight=0)


@check
def moments(rank, size):
    net = fn.Sequential(fn.Conv2d(3, 2), fn.BatchNorm(), fn.Repeat(fn.ReLU(), 2))
    params = net.init(fn.key(0), (2, 4, 4), dtype=torch.float64)
    x = fn.normal(fn.key(1), (7, 2, 4, 4), dtype=torch.float64)
    of = partial(fn.moments, net, params, key=fn.key(2))
    own = x.split([3, *[0] * (size - 2), 4])[rank]
    found = fn.distributed.merge_moments(of(own))
    torch.testing.assert_close(found, of(x), rtol=1e-12, atol=1e-12)
    assert same_everywhere(found)
    assert fn.distributed.merge_moments(((), ())) == ((), ())


# --- Training


NET = fn.Sequential(
    fn.Conv2d(6, 3, padding=1), fn.ReLU(), fn.Flatten(), fn.Linear(5), fn.Tanh(), fn.Linear(3)
)
DECAY = fn.Partition(
    lambda path, leaf: "first" if path.startswith("0.") else "decay" if leaf.ndim > 1 else "plain",
    {"first": None, "decay": fn.AdamW(0.01), "plain": fn.SGD(0.1)},
)
OPTIMIZERS = [fn.Adam(0.01, amsgrad=True), fn.SGD(fn.schedules.cosine(0.1, 9), 0.9), DECAY]


def train(optimizer, params, state, steps, rank, size, in_place=False):
    """Steps on batches that a key names, each rank on its part."""
    grads_of = fn.distributed.value_and_grad(NET, fn.CrossEntropy())
    step = optimizer.step_ if in_place else optimizer.step
    for n in steps:
        key = fn.fold_in(fn.key(7), n)
        x, t = fn.normal(key, (7, 2, 4, 4)), fn.permutation(key, 7) % 3
        _, grads = grads_of(params, part(x, rank, size), part(t, rank, size))
        params, state = step(params, grads, state)
    return params, state


@check
def sharded_steps_are_those_of_the_optimizer(rank, size):
    for optimizer in OPTIMIZERS:
        sharded = fn.distributed.Sharded(optimizer)
        for in_place in (False, True):
            runs = []
            for which in (optimizer, sharded):
                params = NET.init(fn.key(0), (2, 4, 4))
                kept = optree.tree_map(torch.clone, params)
                runs.append(
                    train(which, params, which.init(params), range(4), rank, size, in_place)
                )
                assert same(params, kept) != in_place
            (expected, whole), (found, own) = runs
            assert same(found, expected), (optimizer, in_place)
            assert same_everywhere(found)
            strides = [[leaf.stride() for leaf in optree.tree_leaves(p)] for p in (found, params)]
            assert strides[0] == strides[1]
            assert type(own) is type(whole)
    moments = sum(x.nbytes for x in optree.tree_leaves(sharded.init(params)))
    most = max(leaf.nbytes for leaf in optree.tree_leaves(params))
    assert moments <= 2 * (sum(x.nbytes for x in optree.tree_leaves(params)) / size + most)


@check
def every_leaf_has_one_owner(rank, size):
    params = NET.init(fn.key(0), (2, 4, 4))
    kept = fn.distributed.Sharded(fn.SGD(0.1, 0.9)).init(params).momentum
    own = [x is not None for x in optree.tree_leaves(kept, none_is_leaf=True)]
    owners = torch.tensor(own).int()
    dist.all_reduce(owners)
    assert owners.tolist() == [1] * 6


@check
def a_restart_goes_on_to_the_same_parameters(rank, size):
    folder = Path(sys.argv[3])
    sharded = fn.distributed.Sharded(fn.Adam(0.01))
    params = NET.init(fn.key(0), (2, 4, 4))
    params, state = train(sharded, params, sharded.init(params), range(3), rank, size)
    fn.save(folder / f"state-{rank}.safetensors", (params, state))
    expected = train(sharded, params, state, range(3, 6), rank, size)
    loaded = fn.load(folder / f"state-{rank}.safetensors")
    # A file does not keep the memory format, which decides how sums are rounded.
    loaded = optree.tree_map(
        lambda x, saved: torch.empty_like(x).copy_(saved), (params, state), loaded
    )
    assert same(train(sharded, *loaded, range(3, 6), rank, size), expected)
    dist.barrier()
    of_another = fn.load(folder / f"state-{(rank + 1) % size}.safetensors")
    with pytest.raises(ValueError, match="expected first moments with the structure of params"):
        sharded.step(params, params, of_another[1])


# --- What is refused


@check
def trees_that_differ_are_refused_on_all_ranks(rank, size):
    message = f"with trees of the same structure.*on all ranks; rank {size - 1} and rank 0 differ"
    group, last = dist.new_group(), rank == size - 1
    with pytest.raises(ValueError, match=message):
        fn.distributed.mean({"b" if last else "a": torch.ones(3)}, group)
    with pytest.raises(ValueError, match=message):
        fn.distributed.mean(torch.ones(2 if last else 3), group)
    params = fn.Linear(2).init(fn.key(0), (3,))
    sharded = fn.distributed.Sharded(fn.SGD(0.1), group)
    step = partial(sharded.step, params, params, sharded.init(params))
    with pytest.raises(ValueError, match=message):
        fn.distributed.mean(params, group) if last else step()


@check
def what_is_refused_at_once(rank, size):
    net = fn.Sequential(a=fn.Linear(3), b=fn.Sequential(fn.BatchNorm()))
    with pytest.raises(ValueError, match=r"expected layers that treat.*got b: layer 0: BatchNorm"):
        fn.distributed.value_and_grad(net, fn.MSE())
    with pytest.raises(ValueError, match="bucket_bytes >= 1, got 0"):
        fn.distributed.value_and_grad(fn.ReLU(), fn.MSE(), bucket_bytes=0)
    with pytest.raises(TypeError, match="expected a loss"):
        fn.distributed.value_and_grad(fn.ReLU(), fn.ReLU())
    with pytest.raises(TypeError, match="expected optimizer to be an optimiser"):
        fn.distributed.Sharded(fn.ReLU())
    others = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="expected a group that rank 1"):
            fn.distributed.mean(torch.ones(2), others)
    with pytest.raises(TypeError, match=r"distributed\.mean: expected floating-point tensors, got"):
        fn.distributed.mean({"a": torch.ones(2, dtype=torch.int64)}, dist.new_group())
    with pytest.raises(
        ValueError, match=r"distributed\.mean: expected weight to be finite and >= 0, got -1"
    ):
        fn.distributed.mean(torch.ones(2), dist.new_group(), weight=-1)


# --- A rank that fails


@dataclass(frozen=True)
class Failing(fn.Linear):
    """A layer whose backward pass fails on one rank."""

    def _bwd(self, params, x, dy, need):
        if dist.get_rank() == 1:
            raise ZeroDivisionError("no gradient today")
        return super()._bwd(params, x, dy, need)


@check
def a_rank_that_raises_in_its_backward_pass_ends_the_others(rank, size):
    net, group = fn.Sequential(fn.Linear(3), Failing(3)), dist.new_group(timeout=TIMEOUT)
    params, x = net.init(fn.key(0), (3,)), torch.ones(2, 3)
    told = "^distributed.value_and_grad: rank 1 raised ZeroDivisionError: no gradient today"
    error, match = (ZeroDivisionError, "^no gradient") if rank == 1 else (RuntimeError, told)
    with pytest.raises(error, match=match):
        fn.distributed.value_and_grad(net, fn.MSE(), group)(params, x, x)


@check
def a_rank_that_refuses_its_part_ends_the_others(rank, size):
    net, group = fn.Linear(3), dist.new_group(timeout=TIMEOUT)
    params, target = net.init(fn.key(0), (3,)), torch.ones(2, 3)
    x = torch.ones(2, 4) if rank == 1 else target
    own = r"Linear\(3\): expected x of shape \(N, …, 3\), got \(2, 4\)"
    told = f"rank 1 raised ValueError: {own}"
    error, match = (ValueError, own) if rank == 1 else (RuntimeError, told)
    with pytest.raises(error, match=match):
        fn.distributed.value_and_grad(net, fn.MSE(), group)(params, x, target)


@check
def a_step_that_one_rank_refuses_changes_nothing_on_the_others(rank, size):
    sharded = fn.distributed.Sharded(fn.SGD(0.1), dist.new_group(timeout=TIMEOUT))
    params = NET.init(fn.key(0), (2, 4, 4))
    kept, grads = optree.tree_map(torch.clone, params), params[:1] if rank == 1 else params
    error = ValueError if rank == 1 else RuntimeError
    with pytest.raises(error, match="expected grads with the structure"):
        sharded.step_(params, grads, sharded.init(params))
    assert same(params, kept)


@check
def a_rank_that_does_not_come_is_named_after_the_timeout(rank, size):
    group = dist.new_group(timeout=timedelta(seconds=2))
    if rank != 1:
        with pytest.raises(RuntimeError, match=r"distributed\.mean: lost rank 1: "):
            fn.distributed.mean(torch.ones(3), group)
    dist.barrier()


@check
def a_rank_that_dies_ends_the_others(rank, size):
    """The last check: a group that has lost a rank is of no more use."""
    sharded, last = fn.distributed.Sharded(fn.Adam(0.01)), size - 1
    checkpoints = fn.Checkpoints(Path(sys.argv[3]) / f"checkpoints-{rank}")
    params = NET.init(fn.key(0), (2, 4, 4))
    state = sharded.init(params)
    for n in range(4):
        params, state = train(sharded, params, state, [n], rank, size)
        checkpoints.save(n + 1, (params, state))
    if rank == last:
        os._exit(7)
    with pytest.raises(RuntimeError, match=f"lost rank {last}: "):
        train(sharded, params, state, [4], rank, size)
    step, tree = checkpoints.latest()
    assert step == 4
    assert same(tree, (params, state))


def main():
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
    )
    found = {}
    for function in CHECKS:
        try:
            function(rank, size)
            found[function.__name__] = ""
        except BaseException:
            found[function.__name__] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(found))
        if os.environ.get("VERBOSE_RANKS"):
            print(rank, function.__name__, round(time.process_time(), 1), found[function.__name__])


if __name__ == "__main__":
    main()
    os._exit(0)  # a group that has lost a rank cannot be taken down in order
