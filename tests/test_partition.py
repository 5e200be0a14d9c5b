"""Partition: each part as its optimiser would do it alone, and nothing else."""

import dataclasses
import pickle
from collections import OrderedDict, defaultdict, namedtuple

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_optimizers import gradients
from test_properties import close, same
from test_transforms import compile_whole

import funcnet as fn
from funcnet.testing import strategies

ADAMW, SGD = fn.AdamW(0.1), fn.SGD(0.1, momentum=0.9)


def by_rank(path, leaf):
    return "decay" if leaf.ndim > 1 else "plain"


def by_layer(path, leaf):
    return "frozen" if path.startswith("0.") else by_rank(path, leaf)


PARTITION = fn.Partition(by_layer, {"decay": ADAMW, "plain": SGD, "frozen": None})


def parameters():
    net = fn.Sequential(fn.Conv2d(2, 3), fn.ReLU(), fn.Conv2d(4, 3))
    return net.init(fn.key(0), (1, 8, 8))


@pytest.mark.parametrize("method", ["step", "step_"])
def test_each_part_is_stepped_alone(method):
    params = parameters()
    frozen = optree.tree_map(torch.clone, params[0])
    weight, bias = {"2.weight": params[2]["weight"].clone()}, params[2]["bias"].clone()
    state, adamw_state, sgd_state = PARTITION.init(params), ADAMW.init(weight), SGD.init(bias)
    for step in range(3):
        grads = gradients(params, step)
        params, state = getattr(PARTITION, method)(params, grads, state)
        weight, adamw_state = ADAMW.step(weight, {"2.weight": grads[2]["weight"]}, adamw_state)
        bias, sgd_state = SGD.step(bias, grads[2]["bias"], sgd_state)
    assert same(params, (frozen, (), {"weight": weight["2.weight"], "bias": bias}))
    assert same(state.parts["decay"], adamw_state)
    assert int(state.parts["plain"].step) == 3


@given(strategies.trees(), st.integers(0, 9))
def test_of_any_tree(tree, seed):
    """Two halves that are treated alike are the whole; leaves go back to where they were."""
    labels = iter(range(10**6))
    halves = fn.Partition(
        lambda path, leaf: "ab"[(sum(path.encode()) + seed) % 2], {"a": SGD, "b": SGD}
    )
    grads = optree.tree_map(lambda leaf: torch.full_like(leaf, next(labels)), tree)
    expected, _ = SGD.step(tree, grads, SGD.init(tree))
    assert same(halves.step(tree, grads, halves.init(tree))[0], expected)
    tree = optree.tree_map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), tree)
    written, _ = halves.step_(tree, grads, halves.init(tree))
    assert written is tree
    assert same(tree, expected)


def test_paths_are_names_in_files(tmp_path):
    Pair = namedtuple("Pair", "left right")
    one = torch.ones(1)
    tree = {
        "a.b": [one.clone(), (one.clone(), one.clone())],
        "": one.clone(),
        "d": OrderedDict(z=one.clone(), y={"7": one.clone(), "x": {7: one.clone()}}),
        "%": one.clone(),
    }
    seen = []
    fn.Partition(lambda path, leaf: seen.append(path) or "a", {"a": SGD}).init(tree)
    fn.save(tmp_path / "tree", tree)
    assert sorted(seen) == sorted(fn.inspect(tmp_path / "tree").shapes)
    seen.clear()
    others = {"pair": Pair(one, one), "default": defaultdict(list, k=one), "state": SGD.init([one])}
    fn.Partition(lambda path, leaf: seen.append(path) or "a", {"a": None}).init(others)
    names = ["default.k", "pair.left", "pair.right", "state.momentum.0", "state.step"]
    assert sorted(seen) == names


def test_a_lone_tensor_has_the_empty_path():
    seen = []
    partition = fn.Partition(lambda path, leaf: seen.append(path) or "a", {"a": SGD})
    p, _ = partition.step(torch.ones(2), torch.ones(2), partition.init(torch.ones(2)))
    assert torch.equal(p, torch.full((2,), 0.9))
    assert set(seen) == {""}


@pytest.mark.parametrize("method", ["step", "step_"])
def test_frozen_leaves_come_back_as_they_are(method):
    """Whatever they and their gradients are."""
    count, view = torch.tensor(3), torch.ones(1).expand(4)
    params = {"count": count, "view": view, "w": torch.ones(2)}
    partition = fn.Partition(lambda path, _: path, {"count": None, "view": None, "w": SGD})
    grads = {"count": None, "view": (torch.ones(7),), "w": torch.ones(2)}
    new, state = getattr(partition, method)(params, grads, partition.init(params))
    assert new["count"] is count
    assert new["view"] is view
    assert torch.equal(new["w"], torch.full((2,), 0.9))
    assert [*state.parts] == ["w"]


@pytest.mark.parametrize(
    ("grads", "got"),
    [
        (((1, 2), (3,)), "none at '1.1'"),
        (((1, 2), (3, 4), 5), "more at '2'"),
        ((), "none at '0.0', '0.1', '1.0', '1.1'"),
        ({"a": 1}, "none at '0.0', '0.1', '1.0', '1.1', more at 'a'"),
        (((1, 2), (3, 4), 5, 6, 7, 8), "more at '2', '3', '4', '5'"),
        (((1, 2), (3, 4), 5, 6, 7, 8, 9), "more at '2', '3', '4', '5', …"),
        ([(1, 2), (3, 4)], "other containers"),
    ],
)
def test_trees_of_another_structure_are_told_by_their_leaves(grads, got):
    params = optree.tree_map(torch.tensor, ((1.0, 2.0), (3.0, 4.0)))
    for optimizer in (SGD, fn.Partition(lambda path, _: "a", {"a": SGD})):
        with pytest.raises(ValueError, match="expected grads with the structure of") as caught:
            optimizer.step(params, optree.tree_map(float, grads), optimizer.init(params))
        assert str(caught.value).endswith(f" of params, got {got}")


@pytest.mark.parametrize("method", ["step", "step_"])
def test_nothing_is_changed_by_a_step_that_is_refused(method):
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    partition = fn.Partition(lambda path, _: path, {"a": SGD, "b": ADAMW})
    state = partition.init(params)
    kept = optree.tree_map(torch.clone, (params, state))
    step = getattr(partition, method)
    with pytest.raises(ValueError, match=r"AdamW.* expected grads\['b'\] like params"):
        step(params, {"a": torch.ones(2), "b": torch.ones(3)}, state)
    with pytest.raises(ValueError, match="Partition: expected grads with the structure of params"):
        step(params, {"a": torch.ones(2)}, state)
    bad = fn.PartitionState({"a": state.parts["a"], "b": state.parts["a"]})
    with pytest.raises(TypeError, match=r"AdamW.* expected an AdamState"):
        step(params, params, bad)
    for bad in (state.parts, fn.PartitionState({"a": state.parts["a"]})):
        with pytest.raises(TypeError, match=r"expected a PartitionState of \['a', 'b'\]"):
            step(params, params, bad)
    rate = fn.Partition(lambda path, _: path, {"a": SGD, "b": fn.SGD(lambda step: -1.0)})
    with pytest.raises(ValueError, match=r"SGD: expected lr\(step\) to be finite and >= 0"):
        getattr(rate, method)(params, params, rate.init(params))
    labels = {"a": "a", "b": "c"}
    unknown = fn.Partition(lambda path, _: labels[path], {"a": SGD, "b": ADAMW})
    message = r"Partition: expected label\('b', leaf\) to be one of \['a', 'b'\], got 'c'"
    with pytest.raises(ValueError, match=message):
        unknown.init(params)
    with pytest.raises(ValueError, match=message):
        getattr(unknown, method)(params, params, state)
    assert same((params, state), kept)


@pytest.mark.parametrize("label", [None, 0, ["a"]])
def test_a_label_is_a_str(label):
    with pytest.raises(ValueError, match=r"expected label\('', leaf\) to be one of \['a'\], got"):
        fn.Partition(lambda path, leaf: label, {"a": SGD}).init(torch.ones(1))


def test_labels_that_have_changed_since_init_are_refused():
    params, names = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": "x", "b": "y"}
    partition = fn.Partition(lambda path, _: names[path], {"x": SGD, "y": SGD})
    state = partition.init(params)
    names["b"] = "x"
    with pytest.raises(ValueError, match="expected velocities with the structure of params"):
        partition.step_(params, params, state)
    assert same(params, {"a": torch.ones(2), "b": torch.ones(2)})


def test_states_are_saved_and_resumed_bit_for_bit(tmp_path):
    params = parameters()
    _, state = PARTITION.step(params, gradients(params, 0), PARTITION.init(params))
    fn.save(tmp_path / "state", state)
    again = fn.load(tmp_path / "state")
    assert type(again) is fn.PartitionState
    grads = gradients(params, 1)
    assert same(PARTITION.step(params, grads, again), PARTITION.step(params, grads, state))


def test_partitions_nest():
    inner = fn.Partition(lambda path, _: path[-1], {"a": SGD, "b": None})
    outer = fn.Partition(lambda path, _: "in" if "x" in path else "out", {"in": inner, "out": SGD})
    params = {"x": {"a": torch.ones(1), "b": torch.ones(1)}, "y": torch.ones(1)}
    new, _ = outer.step(params, params, outer.init(params))
    close(new, {"x": {"a": torch.tensor([0.9]), "b": torch.ones(1)}, "y": torch.tensor([0.9])})


def test_every_partition_labels_by_the_paths_of_the_tree():
    tree = {"x": [torch.ones(1), torch.ones(1)], "a.b": torch.ones(1)}
    seen = []
    nested = fn.Partition(lambda path, leaf: seen.append(path) or "a", {"a": SGD})
    for _ in range(2):
        nested = fn.Partition(lambda path, leaf: "in", {"in": nested, "out": SGD})
    state = nested.init(tree)
    nested.step(tree, tree, state)
    assert seen == ["a%2Eb", "x.0", "x.1"] * 2


def test_over_stacked_parameters():
    params = {"w": fn.normal(fn.key(0), (3, 2, 2)), "b": fn.normal(fn.key(1), (3, 2))}
    partition = fn.Partition(by_rank, {"decay": ADAMW, "plain": SGD})

    def two_steps(params):
        state = partition.init(params)
        for _ in range(2):
            params, state = partition.step(params, params, state)
        return params

    each = [two_steps({name: leaf[i] for name, leaf in params.items()}) for i in range(3)]
    stacked = optree.tree_map(lambda *leaves: torch.stack(leaves), *each)
    close(torch.func.vmap(two_steps)(params), stacked)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled():
    params = {"w": torch.ones(2, 2), "b": torch.ones(2), "f": [torch.ones(1)]}
    partition = fn.Partition(
        lambda path, leaf: "frozen" if path == "f.0" else by_rank(path, leaf),
        {"decay": SGD, "plain": fn.SGD(0.5), "frozen": None},
    )
    state = partition.init(params)
    close(
        compile_whole(partition.step)(params, params, state),
        partition.step(params, params, state),
    )


def test_they_are_values():
    parts = {"plain": SGD, "decay": ADAMW, "frozen": None}
    same_parts = {"frozen": None, "decay": ADAMW, "plain": SGD}
    partition = fn.Partition(by_layer, parts)
    assert partition == fn.Partition(by_layer, same_parts) != fn.Partition(by_rank, parts)
    assert hash(partition) == hash(fn.Partition(by_layer, same_parts))
    parts.clear()
    assert partition == PARTITION
    assert pickle.loads(pickle.dumps(partition)) == partition
    assert dataclasses.replace(partition) == partition
    assert repr(fn.Partition(len, {"a": SGD})) == (
        "Partition(<built-in function len>, {'a': SGD(0.1, momentum=0.9)})"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fn.Partition("a", {}), "Partition: expected label to be a function"),
        (lambda: fn.Partition(len, [SGD]), "Partition: expected a dict of optimisers by name"),
        (lambda: fn.Partition(len, (SGD, SGD)), "Partition: expected a dict of optimisers by name"),
        (lambda: fn.Partition(len, [("a", SGD)]), "Partition: expected a dict of optimisers by"),
        (lambda: fn.Partition(len, (["a", SGD],)), "Partition: expected a dict of optimisers by"),
        (lambda: fn.Partition(len, (("a", SGD, 0),)), "Partition: expected a dict of optimisers"),
        (lambda: fn.Partition(len, (("a", SGD), SGD)), "Partition: expected a dict of optimisers"),
        (lambda: fn.Partition(len, {1: SGD}), "Partition: expected names that are str, got 1"),
        (lambda: fn.Partition(len, {"a": 0.1}), "expected an optimiser or None for 'a', got 0.1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_errors_of_a_part_name_it():
    def label(path, leaf):
        return "moved" if path == moved else "rest"

    params = {"a": torch.ones(2), "b": torch.ones(3)}
    optimizer = fn.Partition(label, {"rest": fn.SGD(0.1, momentum=0.9), "moved": fn.Adam()})
    moved = "a"
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=r"^rest: SGD\(.*expected grads\['b'\] like params"):
        optimizer.step(params, {**params, "b": torch.ones(4)}, state)
    with pytest.raises(TypeError, match=r"^rest: SGD\(.*expected floating-point tensors, got to"):
        optimizer.init({**params, "b": torch.arange(3)})
    moved = "b"
    with pytest.raises(ValueError, match=r"^moved: Adam\(\): expected first moments with the stru"):
        optimizer.step(params, params, state)
