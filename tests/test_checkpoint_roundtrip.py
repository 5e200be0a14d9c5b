"""What is saved comes back as it was, in the same bytes everywhere, for every reader."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import textwrap
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from checkpoint_trees import DTYPES, Average, Moments, bits, same, trees
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import funcnet as fn
from funcnet import schedules
from funcnet.checkpoint.data import matches
from funcnet.checkpoint.files import opened


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all examples: they also replace each other."""
    return tmp_path_factory.mktemp("checkpoint") / "tree.safetensors"


@given(tree=trees())
def test_a_tree_comes_back_as_it_was(tree: Any, path: Path) -> None:
    fn.save(path, tree)
    for mmap in (False, True):
        assert same(fn.load(path, mmap=mmap), tree)
    assert same(fn.load(path, like=tree), tree)
    assert os.listdir(path.parent) == [path.name]


@given(tree=trees())
def test_the_same_tree_gives_the_same_bytes(tree: Any, path: Path) -> None:
    fn.save(path, tree)
    first = path.read_bytes()
    fn.save(path, fn.load(path))
    assert path.read_bytes() == first


@given(
    tensors=st.lists(
        st.builds(
            lambda size, dtype: torch.ones(size, dtype=dtype),
            st.sampled_from([0, 1, 5, 16, 32, 64]),
            st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.float64]),
        )
    )
)
def test_the_data_lie_in_the_order_of_the_format(tensors: list[torch.Tensor], path: Path) -> None:
    """A tensor of a multiple of 64 bytes starts at one, so a map of the file can serve for it."""
    fn.save(path, tensors)
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    assert size % 64 == 0
    header = json.loads(data[8:size])
    spans = [header[str(i)]["data_offsets"] for i in range(len(tensors))]
    end = 0
    for i in sorted(
        range(len(tensors)), key=lambda i: (tensors[i].nbytes % 64 > 0, -tensors[i].itemsize)
    ):
        assert spans[i] == [end, end + tensors[i].nbytes]
        end = spans[i][1]
    assert size + end == len(data)


@given(tree=trees())
def test_safetensors_reads_the_same_tensors(tree: Any, path: Path) -> None:
    fn.save(path, tree)
    info = fn.inspect(path)
    tensors = load_file(path)
    assert tensors.keys() == info.shapes.keys() == info.dtypes.keys()
    for name, tensor in tensors.items():
        assert (tensor.shape, tensor.dtype) == (info.shapes[name], info.dtypes[name])
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
    leaves = [leaf for leaf in _leaves(tree) if isinstance(leaf, torch.Tensor)]
    assert sorted(map(bits, leaves)) == sorted(map(bits, tensors.values()))


def _leaves(node: Any) -> list[Any]:
    from funcnet.tree import children

    items = children(node)
    return [node] if items is None else [leaf for _, child in items for leaf in _leaves(child)]


def test_bytes_are_the_same_in_every_process(tmp_path: Path) -> None:
    script = (
        "import sys, torch, funcnet as fn\n"
        "net = fn.Sequential(fn.Conv2d(4, 3), fn.ReLU(), fn.Conv2d(2, 3))\n"
        "params = net.init(fn.key(0), (3, 8, 8))\n"
        "fn.save_model(sys.argv[1], net, params, metadata={'b': 1, 'a': [2.5, None]})\n"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script, str(tmp_path / seed)]
        subprocess.run(command, check=True, env=environment)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_of_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    every_byte = torch.arange(256, dtype=torch.uint8)
    tensor = (every_byte % 2 if dtype == torch.bool else every_byte).view(dtype)
    fn.save(tmp_path / "t", tensor)
    assert same(fn.load(tmp_path / "t"), tensor)


def test_every_bit_of_a_float_comes_back(tmp_path: Path) -> None:
    patterns = [0x7FC00001, 0x7F800001, 0xFFFFFFFF, 0x80000000, 0x00000001, 0x807FFFFF, 0xFF800000]
    raw = torch.tensor(patterns, dtype=torch.int64).to(torch.uint32)
    tensor = raw.view(torch.float32).reshape(7, 1).expand(7, 2).t()  # the NaNs are copied, too
    fn.save(tmp_path / "t", tensor)
    assert bits(fn.load(tmp_path / "t")) == bits(tensor)


def test_what_requires_a_gradient_comes_back_so(tmp_path: Path) -> None:
    ones, tree = torch.ones(2), {}
    for needs in (False, True):
        tree[f"tensor {needs}"] = ones.clone().requires_grad_(needs)
        tree[f"parameter {needs}"] = torch.nn.Parameter(ones.clone(), requires_grad=needs)
    fn.save(tmp_path / "tree", tree)
    again = fn.load(tmp_path / "tree")
    for name, leaf in tree.items():
        assert (type(again[name]), again[name].requires_grad) == (type(leaf), leaf.requires_grad)


def test_python_values_come_back_exactly(tmp_path: Path) -> None:
    tree = [0, -1, 2**63, -(10**5000), True, False, "", "a\0b", 0.1, -0.0, 5e-324, 1e308]
    tree += [math.inf, -math.inf, math.nan, -math.nan]
    fn.save(tmp_path / "t", tree)
    assert same(fn.load(tmp_path / "t"), tree)


def test_containers_come_back_as_they_were(tmp_path: Path) -> None:
    tree = {
        "tuple": (),
        "list": [],
        "dict": {},
        "ordered": OrderedDict(),
        "ordered, in its order": OrderedDict(z=1, a=2),
        1: "int key",
        "1": "str key",
        "namedtuple": Moments({}, None),
        "dataclass": Average(0.9, [torch.ones(1)]),
    }
    fn.save(tmp_path / "t", tree)
    back = fn.load(tmp_path / "t")
    assert same(back, tree)
    assert list(back) == list(tree)


def test_a_whole_state_of_training_comes_back(tmp_path: Path) -> None:
    net = fn.Sequential(fn.Conv2d(4, 3), fn.ReLU())
    params = net.init(fn.key(0), (3, 8, 8))
    sgd = fn.SGD(0.1, momentum=0.9)
    state = {"params": params, "state": sgd.init(params), "key": fn.key(3), "epoch": 7, "net": net}
    state |= {"sgd": sgd, "loss": fn.MSE(), "history": [{"loss": 0.1 + 0.2, "psnr": math.inf}]}
    fn.save(tmp_path / "t", state)
    assert same(fn.load(tmp_path / "t"), state)


RATES = [
    schedules.constant(0.1),
    schedules.linear(0.1, last=0.0, steps=9),
    schedules.cosine(0.1, steps=9, warmup=2),
    schedules.exponential(0.1, rate=0.5),
    schedules.piecewise({0: 0.1, 5: 0.01}),
    schedules.one_cycle(0.1, steps=9),
]


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: type(rate).__name__)
def test_schedules_come_back(rate: Any, tmp_path: Path) -> None:
    fn.save(tmp_path / "t", {"rate": rate, "optimizer": fn.SGD(rate, momentum=0.9)})
    assert fn.load(tmp_path / "t") == {"rate": rate, "optimizer": fn.SGD(rate, momentum=0.9)}
    assert fn.load(tmp_path / "t")["rate"](5) == rate(5)


@fn.register_node
@dataclass(frozen=True)
class ByRank:
    """A label that a file can hold: a value that is called."""

    rank: int

    def __call__(self, path: str, leaf: torch.Tensor) -> str:
        return "matrices" if leaf.ndim >= self.rank else "frozen" if path[0] == "0" else "others"


PARTS = {"matrices": fn.AdamW(RATES[2]), "others": fn.SGD(0.1, momentum=0.9), "frozen": None}
OPTIMIZERS = [
    fn.SGD(0.1),
    fn.SGD(0.1, momentum=0.9, nesterov=True),
    fn.Adam(),
    fn.Adam(RATES[1], amsgrad=True),
    fn.AdamW(),
    fn.RMSprop(),
    fn.RMSprop(momentum=0.9, centered=True),
    fn.Partition(ByRank(2), PARTS),
    fn.Partition(ByRank(2), {**PARTS, "others": fn.Partition(ByRank(1), PARTS)}),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_training_goes_on_where_it_was(optimizer: Any, tmp_path: Path) -> None:
    """Bit for bit, with the optimiser and its state from the file."""
    net = fn.Sequential(fn.Conv2d(4, 3), fn.ReLU(), fn.Conv2d(1, 3))
    params = net.init(fn.key(0), (1, 8, 8))
    x, target = fn.normal(fn.key(1), (2, 1, 8, 8)), torch.zeros(2, 1, 4, 4)
    gradient = fn.value_and_grad(net, fn.MSE())
    checkpoints, state = fn.Checkpoints(tmp_path), optimizer.init(params)
    for step in range(2):
        params, state = optimizer.step(params, gradient(params, x, target)[1], state)
        checkpoints.save(step, (optimizer, params, state))
    # In another memory format, the same numbers might be rounded otherwise.
    latest = checkpoints.latest(like=(optimizer, params, state))
    assert latest is not None
    assert same(latest[1], (optimizer, params, state))
    assert strides(latest[1]) == strides((optimizer, params, state))
    again, again_params, again_state = latest[1]
    expected = optimizer.step(params, gradient(params, x, target)[1], state)
    grads = gradient(again_params, x, target)[1]
    assert same(again.step(again_params, grads, again_state), expected)


def test_a_label_that_is_a_function_is_refused(tmp_path: Path) -> None:
    """To import it would run code that the file names."""
    partition = fn.Partition(lambda path, leaf: "all", {"all": fn.SGD(0.1)})
    with pytest.raises(TypeError, match=r"^optimizer\.label: .*function"):
        fn.save(tmp_path / "t", {"optimizer": partition})


def test_conjugated_and_negated_views_are_resolved(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    tree = [z.conj(), z.clone().conj().imag]
    fn.save(tmp_path / "t", tree)
    assert [x.tolist() for x in fn.load(tmp_path / "t")] == [[1 - 2j, 3 + 4j], [-2.0, 4.0]]


def test_views_of_one_storage_that_do_not_overlap_are_no_trouble(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    tree = [list(table[:2].unbind(1)), table[2], torch.empty(0), torch.empty(0)]
    fn.save(tmp_path / "t", tree)
    assert same(fn.load(tmp_path / "t"), tree)


def test_interleaved_views_take_calls_in_proportion(tmp_path: Path) -> None:
    def calls(count: int) -> int:
        rows = torch.arange(8.0 * count).reshape(count, 8)
        views = [view for row in rows for view in (row[::2], row[1::2])]
        made = 0

        def note(_: object, event: str, __: object) -> None:
            nonlocal made
            made += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(note)
        try:
            fn.save(tmp_path / "t", views)
        finally:
            sys.setprofile(before)
        return made

    assert calls(400) < 10 * calls(50)  # in proportion 8, quadratic 64


def test_what_is_loaded_is_ones_own(tmp_path: Path) -> None:
    fn.save(tmp_path / "t", [torch.zeros(1000), torch.zeros(1000)])
    before = (tmp_path / "t").read_bytes()
    for mmap in (False, True):
        first, second = fn.load(tmp_path / "t", mmap=mmap)
        first += 1
        assert not second.any()
        fn.save(tmp_path / "u", [first, second])  # they are not tied
    assert (tmp_path / "t").read_bytes() == before


def test_a_small_file_may_be_overwritten_in_place_after_loading(tmp_path: Path) -> None:
    fn.save(tmp_path / "t", torch.ones(100_000))
    tensor = fn.load(tmp_path / "t")
    (tmp_path / "t").write_bytes(b"")
    assert tensor.sum() == 100_000


@pytest.mark.parametrize("mmap", [False, True])
def test_loaded_tensors_are_aligned_like_those_of_torch(mmap: bool, tmp_path: Path) -> None:
    # Matrix products may round differently at another alignment, and resuming must not.
    fn.save(
        tmp_path / "t", {"odd": torch.ones(3), "w": torch.ones(64), "b": torch.ones(5).double()}
    )
    for tensor in fn.load(tmp_path / "t", mmap=mmap).values():
        assert tensor.data_ptr() % 64 == 0


def test_blocks_of_large_tensors(tmp_path: Path) -> None:
    tree = {"large": torch.arange(3 * 2**20 + 1), "small": torch.ones(3)}  # 24 MiB and a bit
    fn.save(tmp_path / "t", tree)
    for mmap in (False, True):
        back = fn.load(tmp_path / "t", mmap=mmap)
        assert torch.equal(back["large"], tree["large"])
    with opened(tmp_path / "t") as (file, header):
        assert matches(file, header)
    data = bytearray((tmp_path / "t").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "t").write_bytes(data)
    with opened(tmp_path / "t") as (file, header):
        assert not matches(file, header)
    with pytest.raises(fn.CheckpointError, match=r"large: .* damaged in 1 of its 7 blocks"):
        fn.load(tmp_path / "t")
    data[-100] ^= 1
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(fn.CheckpointError, match=r"large: .* damaged in 2 of its 7 blocks"):
        fn.load(tmp_path / "t")


def test_saving_and_loading_as_python_ends(tmp_path: Path) -> None:
    """Too late for threads to be started."""
    code = f"""
        import atexit, torch, funcnet as fn
        def at_exit():
            fn.save({str(tmp_path / "t")!r}, tree)
            assert all(map(torch.equal, fn.load({str(tmp_path / "t")!r}), tree))
            print("both")
        tree = [torch.arange(2.0**20), torch.arange(2.0**21)]
        atexit.register(at_exit)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "both\n"


def test_models_come_back(tmp_path: Path) -> None:
    net = fn.Sequential(
        fn.Conv2d(8, 2, stride=2),
        fn.Sequential(),
        fn.UpsampleConv2d(3, method="unfold"),
        fn.Sequential(fn.Upsample2d((1, 2)), fn.Sigmoid()),
    )
    params = net.init(fn.key(1), (3, 8, 8))
    fn.save_model(tmp_path / "m", net, params, metadata={"epoch": 3})
    again, again_params = fn.load_model(tmp_path / "m")
    assert again == net
    assert same(again_params, params)
    assert same(fn.load(tmp_path / "m"), params)
    x = fn.uniform(fn.key(2), (2, 3, 8, 8))
    assert torch.equal(again.apply(again_params, x), net.apply(params, x))


SAME = fn.Conv2d(4, 3, padding=1)
LAID_OUT = [
    fn.Conv2d(5, 3),
    fn.Conv2d(5, 3, method="unfold"),
    fn.ConvTranspose2d(5, 3),
    fn.UpsampleConv2d(5),
    fn.UpsampleConv2d(5, method="unfold"),
    fn.Sequential(SAME, fn.UpsampleConv2d(5)),
    fn.Sequential(first=SAME, last=fn.ConvTranspose2d(5, 3)),
    fn.Residual(fn.Frozen(fn.Recompute(SAME))),
    fn.Cast(fn.Concat(SAME, fn.Identity(), fn.UpsampleConv2d(5, scale=1)), torch.bfloat16),
    fn.Sequential(fn.Repeat(fn.Residual(SAME), 3), fn.Linear(5)),
    fn.Repeat(fn.Repeat(fn.Sequential(conv=SAME, relu=fn.ReLU()), 2), 3),
    fn.Loop(SAME, 2),
    fn.Reversible(fn.Conv2d(2, 3, padding=1), fn.Conv2d(2, 1)),
]


def strides(tree: Any) -> list[Any]:
    return [leaf.stride() for leaf in _leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("net", LAID_OUT, ids=repr)
def test_a_loaded_model_lies_in_memory_as_a_new_one(net: Any, tmp_path: Path) -> None:
    params = net.init(fn.key(0), (4, 8, 8))
    rows = optree.tree_map(torch.Tensor.contiguous, params)
    fn.save_model(tmp_path / "m", net, params)
    first = (tmp_path / "m").read_bytes()
    fn.save_model(tmp_path / "m", net, rows)
    assert (tmp_path / "m").read_bytes() == first
    for dtype in (None, torch.float64):
        new = net.init(fn.key(0), (4, 8, 8), dtype=dtype)
        again = fn.load_model(tmp_path / "m", dtype=dtype)[1]
        assert strides(again) == strides(new)
    assert same(fn.load_model(tmp_path / "m")[1], params)
    assert strides(fn.load(tmp_path / "m", like=params)) == strides(params)
    assert strides(fn.load(tmp_path / "m", like=rows)) == strides(rows)


@pytest.mark.parametrize(
    ("layer", "shape"), [(fn.Conv1d(5, 3), (4, 8)), (fn.Conv3d(5, 3), (4, 5, 5, 5))]
)
def test_signals_and_volumes_lie_in_memory_as_new_ones(
    layer: fn.Layer, shape: tuple[int, ...], tmp_path: Path
) -> None:
    params = layer.init(fn.key(0), shape)
    fn.save_model(tmp_path / "m", layer, params)
    assert strides(fn.load_model(tmp_path / "m")[1]) == strides(params)


def test_parameters_of_torch_stay_parameters_in_their_memory_format(tmp_path: Path) -> None:
    layer = fn.Conv2d(5, 3)
    params = layer.init(fn.key(0), (4, 8, 8))
    params["weight"].view(torch.int32)[0] = 0x7F800001  # a NaN that a copy might quieten
    params = {name: torch.nn.Parameter(leaf) for name, leaf in params.items()}
    fn.save_model(tmp_path / "m", layer, params)
    again = fn.load_model(tmp_path / "m")[1]
    assert strides(again) == strides(params)
    assert same(again, params)


@pytest.mark.parametrize("params", [(), None, 3, {"weight": 1}, {"weight": torch.ones(2)}, [{}]])
def test_a_tree_that_does_not_fit_its_network_comes_back(params: Any, tmp_path: Path) -> None:
    for net in (fn.Conv2d(1, 1), fn.Sequential(fn.Conv2d(1, 1)), fn.Repeat(fn.Conv2d(1, 1), 2)):
        fn.save_model(tmp_path / "m", net, params)
        assert same(fn.load_model(tmp_path / "m")[1], params)


def grown(*fields: Any) -> Any:
    """The class that a file calls Grown, with these fields."""
    return fn.register_node(make_dataclass("Grown", fields, frozen=True))


def test_a_field_that_a_file_lacks_takes_its_default(tmp_path: Path) -> None:
    fn.save(tmp_path / "t", [grown("x")(torch.ones(2))])
    pair = ("pair", Any, Moments((1, "a"), None))
    new = grown(pair, ("made", Any, field(default_factory=list)), ("x", Any, 0))
    expected, like = [new(x=torch.ones(2))], [new(x=torch.zeros(2))]
    assert same(fn.load(tmp_path / "t"), expected)
    assert same(fn.load(tmp_path / "t", like=like), expected)
    with pytest.raises(fn.CheckpointError, match=r"0\.pair\.first\.1: expected int, got str"):
        fn.load(tmp_path / "t", like=[new(Moments((1, 2), None), x=torch.ones(2))])
    grown("x", ("function", Any, len))  # no file can hold this default
    assert fn.load(tmp_path / "t")[0].function is len


def test_a_field_that_a_namedtuple_in_a_file_lacks(tmp_path: Path) -> None:
    fn.save(tmp_path / "t", fn.register_node(namedtuple("Pair", "y"))(2))
    pair = fn.register_node(namedtuple("Pair", "x y", defaults=[0, 0]))
    assert same(fn.load(tmp_path / "t"), pair(x=0, y=2))


def test_a_field_that_the_class_lacks_is_refused(tmp_path: Path) -> None:
    fn.save(tmp_path / "t", [grown("x", "gone")(1, 2)])
    grown("x", ("y", Any, 0))
    message = r"0: expected the fields of .*Grown, \['x', 'y'\], got \['x', 'gone'\]"
    with pytest.raises(fn.CheckpointError, match=message):
        fn.load(tmp_path / "t")
    grown("x", "gone", "needed")
    with pytest.raises(fn.CheckpointError, match=r"'needed'\], got \['x', 'gone'\]"):
        fn.load(tmp_path / "t")


@fn.register_node
@dataclass(frozen=True)
class Watching:
    """Knows whether the garbage collector was on when it was made."""

    collecting: bool = field(init=False, default_factory=gc.isenabled)


@pytest.mark.parametrize("was_on", [False, True])
def test_the_garbage_collector_is_left_as_it_was(was_on: bool, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    fn.save(good, [Watching()])
    bad.write_bytes(good.read_bytes()[:-1])
    if not was_on:
        gc.disable()
    try:
        tree = fn.load(good)
        assert tree[0].collecting is False
        assert gc.isenabled() == was_on
        with pytest.raises(fn.CheckpointError):
            fn.load(bad)
        assert gc.isenabled() == was_on
        with pytest.raises(TypeError):
            fn.save(bad, object())
        assert gc.isenabled() == was_on
    finally:
        gc.enable()


def test_no_tensor_waits_for_the_garbage_collector(tmp_path: Path) -> None:
    def saved(tree: dict[str, torch.Tensor]) -> None:
        fn.save(tmp_path / "tree", tree)

    def compared(tree: dict[str, torch.Tensor]) -> None:
        fn.load(tmp_path / "tree", like=tree)

    gc.disable()
    try:
        for use in (saved, compared):
            tensor = torch.ones(3)
            use({"w": tensor})
            last = weakref.ref(tensor)
            del tensor
            assert last() is None, use
    finally:
        gc.enable()


def test_paths_of_any_kind(tmp_path: Path) -> None:
    for path in (str(tmp_path / "a"), tmp_path / "ü ж.safetensors", tmp_path / ("n" * 255)):
        fn.save(path, (1,))
        assert fn.load(path) == (1,)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2)[::2],
        torch.arange(12.0).reshape(3, 4)[:1, 2],
        torch.ones(4)[::2][:0],
        torch.arange(4.0).as_strided((1, 4, 1), (7, 1, 9)),
        torch.arange(6.0).reshape(2, 3)[:, 1:2],
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.stride()}",
)
def test_strides_of_axes_of_size_1(tensor: torch.Tensor, tmp_path: Path) -> None:
    fn.save(tmp_path / "t", [tensor])
    assert torch.equal(fn.load(tmp_path / "t")[0], tensor)
