"""Names of leaves, and classes known by name."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import optree
import pytest
import torch
from checkpoint_trees import Average, Moments, texts
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree

import funcnet as fn
from funcnet import tree as trees
from funcnet.ops.trees import flatten, structure_of
from funcnet.testing import strategies

Keys = st.recursive(
    st.none(),
    lambda children: (
        st.dictionaries(texts() | st.integers(-2, 2), children, max_size=4)
        | st.lists(children, max_size=3)
    ),
    max_leaves=20,
)


def names(tree: Any, name: str = "") -> list[str]:
    items = trees.children(tree)
    if items is None:
        return [name]
    below = trees.child_names(name, [key for key, _ in items])
    return [
        leaf for child, (_, node) in zip(below, items, strict=True) for leaf in names(node, child)
    ]


@given(Keys)
def test_no_two_leaves_have_one_name(tree: Any) -> None:
    found = names(tree)
    assert len(set(found)) == len(found)
    assert "__metadata__" not in found


def test_names_are_those_of_torch_nn() -> None:
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 2), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 2)
    )
    net = fn.Sequential(fn.Conv2d(4, 2), fn.ReLU(), fn.Conv2d(4, 2))
    assert names(net.init(fn.key(0), (3, 8, 8))) == list(module.state_dict())


def test_names_of_awkward_keys() -> None:
    tree = {"a.b": 0, "a": {"b": 0}, "": 0, 1: 0, "1": 0, "50%": 0, "__metadata__": 0, "x": [(0,)]}
    expected = ["a%2Eb", "a.b", "%", "1%", "1", "50%25", "__metadata__%", "x.0.0"]
    assert names(tree) == expected


def test_names_of_a_structure_are_those_of_its_tree() -> None:
    for tree in (Moments(1, [2, 3]), {7: 1, "7": 2}):
        assert sorted(trees.leaf_names(optree.tree_structure(tree))) == sorted(names(tree))


def test_two_leaves_of_one_name_are_refused() -> None:
    structure = optree.tree_structure({0.25: [0], 0.5: 0, "0.5": 0})
    with pytest.raises(ValueError, match="different names, got two called '0%2E5'"):
        trees.leaf_names(structure)


def test_a_registered_dataclass_is_a_node_everywhere() -> None:
    average = Average(0.5, {"w": torch.ones(2)})
    for tree_map in (optree.tree_map, _pytree.tree_map):
        doubled = tree_map(lambda x: 2 * x, average)
        assert type(doubled) is Average
        assert doubled.decay == 1.0
        assert torch.equal(doubled.mean["w"], torch.full((2,), 2.0))
    assert trees.children(Moments(1, 2)) == [("first", 1), ("second", 2)]


def test_a_registered_layer_stays_a_leaf_of_pytrees() -> None:
    @fn.register_node
    @dataclass(frozen=True)
    class Twice(fn.Layer):
        factor: int = 2

        def init(self, key: Any, shape: Any, *, dtype: Any = None, device: Any = None) -> Any:
            return ()

        def out_shape(self, shape: Any) -> Any:
            return tuple(shape)

        def fwd(self, params: Any, x: Any, *, key: Any = None) -> Any:
            return self.factor * x, ()

        def bwd(self, params: Any, residuals: Any, grad: Any, *, input_grad: bool = True) -> Any:
            return (), self.factor * grad

    assert optree.tree_leaves({"net": Twice()}) == [Twice()]
    assert trees.children(Twice()) == [("factor", 2)]


def test_registering_again_is_harmless() -> None:
    assert fn.register_node(Moments) is Moments
    assert fn.register_node(fn.ReLU) is fn.ReLU
    assert trees.class_named("__main__.ReLU") is None  # a user's own, not funcnet's


@pytest.mark.parametrize("known", ["optree", "torch", "both"])
def test_a_class_that_other_pytrees_know_already(known: str, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Known:
        value: Any

    if known != "torch":
        namespace = optree.registry.__GLOBAL_NAMESPACE
        optree.register_pytree_node(
            Known, lambda x: ((x.value,), None), lambda _, x: Known(*x), namespace=namespace
        )
    if known != "optree":
        _pytree.register_pytree_node(Known, lambda x: ([x.value], None), lambda x, _: Known(*x))
    assert fn.register_node(fn.register_node(Known)) is Known
    fn.save(tmp_path / "tree", Known(torch.ones(2)))
    doubled = optree.tree_map(lambda x: 2 * x, fn.load(tmp_path / "tree"))
    assert _pytree.tree_leaves(doubled)[0].tolist() == [2.0, 2.0]


def test_a_class_that_is_defined_again_replaces_the_old_one() -> None:
    def define() -> type:
        class Again(NamedTuple):
            x: int

        return fn.register_node(Again)

    old, new = define(), define()
    assert trees.is_known(new)
    assert not trees.is_known(old)


def test_classes_of_one_name_are_told_apart_by_their_modules() -> None:
    ours = Moments

    def define() -> type:
        class Moments(NamedTuple):
            first: Any
            second: Any

        return fn.register_node(Moments)

    other = define()
    assert trees.class_named(trees.class_name(ours)) is ours
    assert trees.class_named(trees.class_name(other)) is other
    assert trees.class_named("elsewhere.Moments") is None  # either might be meant
    del trees._registered[trees.class_name(other)]


def test_a_class_is_found_where_its_module_has_another_name() -> None:
    assert trees.class_named("__main__.Average") is Average
    assert trees.class_named("Average") is None  # only those of funcnet have no module
    assert trees.class_named("elsewhere.Average") is None  # another class, for all that is known


@pytest.mark.parametrize("module", ["schedules", "initializers"])
def test_a_class_of_a_module_with_a_name_of_ours(module: str) -> None:
    cls = fn.register_node(namedtuple("State", "x", module=module))
    assert trees.class_named(f"{module}.State") is cls
    name = {"schedules": "cosine", "initializers": "Normal"}[module]
    with pytest.raises(ValueError, match=f"register_node: .* than {module}.{name} of funcnet"):
        fn.register_node(namedtuple(name, "x", module=module))
    assert trees.class_named(f"{module}.{name}") is getattr(getattr(fn, module), name)


def test_a_class_of_a_script_is_found_where_another_module_has_it() -> None:
    cls = fn.register_node(namedtuple("OfAScript", "x", module="__main__"))
    assert trees.class_named("train.OfAScript") is cls
    assert trees.class_named("OfAScript") is None


def test_a_class_may_have_the_name_of_one_of_funcnet() -> None:
    @fn.register_node
    class Conv2d(NamedTuple):
        x: int

    assert trees.class_named("Conv2d") is fn.Conv2d
    assert trees.class_named(trees.class_name(Conv2d)) is Conv2d


@dataclass
class Mutable:
    x: int


@dataclass(frozen=True)
class Demanding:
    x: int = field(init=False)

    def __init__(self, other: int) -> None:
        object.__setattr__(self, "x", other)


@pytest.mark.parametrize("cls", [int, tuple, dict, Mutable, Mutable(1), torch.Tensor, "Moments"])
def test_what_is_no_namedtuple_or_frozen_dataclass_is_refused(cls: Any) -> None:
    with pytest.raises(TypeError, match=r"namedtuple or frozen dataclass, got [^;]*$"):
        fn.register_node(cls)


@dataclass(frozen=True, init=False)
class Verbose:
    x: int
    y: int = 0

    def __init__(self, x: int, verbose: bool = False, y: int = 0) -> None:
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)


def test_arguments_that_are_not_fields_take_their_defaults() -> None:
    assert trees.build(Verbose, {"y": 1, "x": 2}) == Verbose(2, y=1)
    assert trees.defaults(Verbose) == {"y": 0}
    assert fn.register_node(Verbose) is Verbose


@dataclass(frozen=True, init=False)
class Open:
    x: int

    def __init__(self, x: int, *more: int, **others: int) -> None:
        object.__setattr__(self, "x", x)


def test_arguments_that_may_be_none_at_all_are_not_wanted() -> None:
    assert fn.register_node(Open) is Open
    assert trees.build(Open, {"x": 1}) == Open(1)


@dataclass(frozen=True, init=False)
class Squared:
    x: int
    square: int
    cache: Any = field(init=False, default_factory=dict)

    def __init__(self, x: int) -> None:
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "square", x * x)
        object.__setattr__(self, "cache", {})


def test_a_field_may_follow_from_others(tmp_path: Path) -> None:
    assert fn.register_node(Squared) is Squared
    assert trees.defaults(Squared) == {}
    fn.save(tmp_path / "tree", Squared(3))
    assert fn.load(tmp_path / "tree") == Squared(3)
    names = trees.leaf_names(optree.tree_structure({"a": Squared(3)}))
    assert names == ["a.x", "a.square"]


@fn.register_node
class Twins(namedtuple("Twins", "left right")):
    def __new__(cls, both: Any) -> Any:
        return super().__new__(cls, both, both)


def test_a_namedtuple_is_not_built_by_its_constructor(tmp_path: Path) -> None:
    fn.save(tmp_path / "tree", Twins(1)._replace(right=2))
    tree = fn.load(tmp_path / "tree")
    assert type(tree) is Twins
    assert tuple(tree) == (1, 2)


@dataclass(frozen=True, init=False)
class Names:
    names: dict[str, None]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", dict.fromkeys(names))


def test_a_constructor_by_position_alone() -> None:
    assert trees.build(Names, {"names": {"a": None, "b": None}}) == Names("a", "b")


def test_names_of_funcnet_that_are_no_nodes() -> None:
    for name in ("CheckpointError", "save", "schedules", "register_node", "Nothing"):
        assert trees.class_named(name) is None


def test_an_instance_of_an_unknown_class_is_a_leaf() -> None:
    class Unknown(NamedTuple):
        x: int

    assert trees.children(Unknown(1)) is None
    assert trees.children(Mutable(1)) is None


def test_what_files_see() -> None:
    assert trees.children({"b": 1, 7: 2}) == [("b", 1), (7, 2)]
    assert trees.field_names(Moments) == ["first", "second"]
    assert trees.fields_of(fn.Sequential(a=fn.ReLU())) == {"layers": {"a": fn.ReLU()}}


def test_a_constructor_that_wants_more_than_fields_is_refused() -> None:
    with pytest.raises(TypeError, match="got one that wants other"):
        fn.register_node(Demanding)


def test_a_class_whose_init_sets_what_is_no_field_is_refused() -> None:
    class Scale(fn.Layer):
        def __init__(self, factor: float = 1.0) -> None:
            self.factor = factor

    class Small(fn.Conv2d):
        pass

    with pytest.raises(TypeError, match=r"expected @dataclass\(frozen=True\) above Scale: files"):
        fn.register_node(Scale)
    assert fn.register_node(Small) is Small


# --- While torch.compile looks


@given(strategies.trees(), strategies.trees())
def test_while_compiling_trees_are_what_they_are(tree, other):
    """What has no leaves counts as one there, and for nobody who asks."""
    tree = {"a": tree, "b": [other, {"act": (), 0.5: [None]}, {}]}
    leaves, structure = optree.tree_flatten(tree)
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        found, compiled = flatten(tree)
        again, same = compiled.unflatten(leaves), structure_of(tree).flatten_up_to(tree)
        accessors, paths = compiled.accessors(), compiled.paths()
    for others in (found, optree.tree_leaves(again), same):
        assert [id(leaf) for leaf in others] == [id(leaf) for leaf in leaves]
    assert optree.tree_structure(again) == structure
    assert (accessors, paths) == (structure.accessors(), structure.paths())


def test_while_compiling_a_tree_of_another_structure_is_refused():
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        structure = structure_of({"a": (torch.ones(1), {})})
        for other in ((), {"a": ()}, {"b": (torch.ones(1), {})}):
            with pytest.raises(ValueError, match=r"[Ee]xpected"):
                structure.flatten_up_to(other)
