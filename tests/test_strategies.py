"""The strategies: what they draw fits, awkward cases are in reach, and they shrink to the least."""

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile

import hypothesis
import optree
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from registry import LAYERS, cases_of, key_for
from users_layers import Dense

import funcnet as fn
from funcnet.testing import GradientMismatch, check_vjp, strategies
from funcnet.testing import __main__ as command
from funcnet.testing.check import Errors, inspect_vjp
from funcnet.testing.registry import LOSSES, REGISTRY, Row

SEARCH = settings(max_examples=20_000, database=None)
REACH = settings(SEARCH, phases=[Phase.generate])


@pytest.mark.parametrize("cls", LAYERS)
@given(data=st.data())
def test_cases_fit(cls, data):
    layer, params, x = data.draw(cases_of(cls))
    assert isinstance(layer, fn.Layer)
    expected = layer.init(fn.key(0), x.shape[1:])
    assert optree.tree_structure(params) == optree.tree_structure(expected)
    y = layer.apply(params, x, key=key_for(layer))
    assert y.shape[1:] == layer.out_shape(x.shape[1:])


@pytest.mark.parametrize("layers", [strategies.layers(), strategies.networks()])
def test_few_cases_check_nothing(layers):
    drawn = []

    @settings(max_examples=300, database=None, suppress_health_check=list(HealthCheck))
    @given(strategies.cases(layers))
    def collect(case):
        drawn.append(bool(len(case.x)) and case.layer != fn.Sequential())

    collect()
    assert len(drawn) >= 200
    assert drawn.count(False) < 0.05 * len(drawn)


def test_few_loss_cases_check_nothing():
    sizes = []

    @settings(max_examples=300, derandomize=True, database=None, phases=[Phase.generate])
    @given(strategies.loss_cases())
    def collect(case):
        sizes.append(case.x.numel())

    collect()
    assert 0 < sizes.count(0) < 0.2 * len(sizes)


@given(strategies.cases(integers=True))
def test_integers_are_small_integers(case):
    for leaf in (*optree.tree_leaves(case.params), case.x):
        assert torch.equal(leaf, leaf.round())
        assert not leaf.numel() or leaf.abs().max() <= 3


@given(st.lists(st.integers(0, 3), max_size=4), st.sampled_from(strategies.LAYOUTS), st.data())
def test_layouts_keep_numbers(shape, layout, data):
    x = data.draw(strategies.tensors(shape, layouts=["contiguous"]))
    if layout == "channels_last" and x.ndim != 4:
        return
    laid = strategies.laid_out(x, layout)
    assert laid.shape == x.shape
    expected = x[..., :1].expand(x.shape) if layout == "expanded" and x.ndim else x
    assert torch.equal(laid, expected)


@given(st.sampled_from(sorted(strategies.VALUES)), st.data())
def test_kinds_of_numbers(kind, data):
    x = data.draw(
        strategies.tensors((4, 30), torch.float64, values=(kind,), layouts=["contiguous"])
    )
    facts = {
        "normal": x.isfinite().all(),
        "integers": torch.equal(x, x.round()),
        "tied": len(x.unique()) < 30,
        "constant": (x == x[0, 0]).all(),
        "saturated": (x.sigmoid() == 1).any() or x.abs().max() > 20,
        "infinite": x.isinf().any() and not x.isnan().any(),
    }
    assert facts[kind]


@given(strategies.keys(), strategies.integers((3, 4), 5))
def test_keys_and_bounded_integers(key, x):
    assert isinstance(key, fn.Key)
    assert x.dtype in (torch.int32, torch.int64)
    assert 0 <= int(x.min()) <= int(x.max()) < 5


@given(strategies.trees())
def test_trees_are_trees_of_tensors(tree):
    leaves = optree.tree_leaves(tree)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert len(leaves) <= 24


@given(strategies.trees())
def test_files_hold_trees(tree):
    with tempfile.TemporaryDirectory() as folder:
        fn.save(f"{folder}/tree", tree)
        assert optree.tree_structure(fn.load(f"{folder}/tree")) == optree.tree_structure(tree)


@given(strategies.loss_cases())
def test_targets_fit(case):
    loss, x, target = case
    assert loss.apply(x, target).shape == ()
    assert target.shape == x.shape or isinstance(loss, fn.CrossEntropy)


@given(strategies.invalid_layers())
def test_invalid_settings_are_refused(invalid):
    with pytest.raises(invalid.error) as caught:
        invalid.make()
    assert invalid.message in str(caught.value)


# --- What is in reach


def reach(layer, axis):
    return layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1


def remainder(case):
    layer, _, x = case
    pad = 0 if isinstance(layer.padding, str) else layer.padding[0]
    return (x.shape[2] + 2 * pad - reach(layer, 0)) % layer.stride[0] > 0


AWKWARD = {
    "a stride's remainder": remainder,
    "padding beyond reach": lambda c: (
        not isinstance(c.layer.padding, str) and c.layer.padding[0] >= reach(c.layer, 0)
    ),
    "dilation with stride": lambda c: (
        c.layer.dilation[0] > 1 < c.layer.stride[0] and reach(c.layer, 0) > 1
    ),
    "groups": lambda c: c.layer.groups > 1 and c.x.shape[1] > c.layer.groups,
    "depthwise": lambda c: c.layer.groups > 1 and c.x.shape[1] == c.layer.groups,
    "rectangular": lambda c: len({c.layer.kernel_size, c.layer.kernel_size[::-1]}) == 2,
    "an even kernel, same": lambda c: c.layer.padding == "same" and c.layer.kernel_size[0] % 2 == 0,
    "patches": lambda c: c.layer.kernel_size == c.layer.stride != (1, 1),
    "size 1": lambda c: c.x.shape[2:] == (1, 1),
    "a batch of 0": lambda c: len(c.x) == 0,
    "a batch of 1": lambda c: len(c.x) == 1,
    "a batch of 3": lambda c: len(c.x) == 3,
    "expanded": lambda c: c.x.numel() and c.x.shape[3] > 1 and c.x.stride(3) == 0,
    "channels_last": lambda c: (
        c.x.numel() > c.x.shape[1] > 1 and c.x.stride(1) == 1 and not c.x.is_contiguous()
    ),
    "float32": lambda c: c.x.dtype == torch.float32,
    "zeros": lambda c: c.x.numel() > 2 and (c.x == 0).any(),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_convolutions_are_in_reach(name):
    find(strategies.cases(strategies.layers(fn.Conv2d)), AWKWARD[name], settings=REACH)


OF_ANY_RANK = [
    cls
    for cls, row in REGISTRY.items()
    if len({len(shape) for _, shape in row.examples}) > 1
    and not any(layer._children() for layer, _ in row.examples)
]


@pytest.mark.parametrize("cls", OF_ANY_RANK, ids=lambda cls: cls.__name__)
def test_every_rank_is_in_reach(cls):
    """Those of a row's examples, among others.

    In several runs, since Hypothesis varies what it has drawn before.
    """
    drawn = set()
    for number in range(4):

        @hypothesis.seed(number)
        @settings(max_examples=50, database=None, phases=[Phase.generate])
        @given(strategies.cases(strategies.layers(cls)))
        def note(case):
            drawn.add(case.x.ndim - 1)

        note()
    assert drawn >= {len(shape) for _, shape in REGISTRY[cls].examples}


def test_a_batch_of_one_is_in_reach_where_it_has_a_variance():
    cases = strategies.cases(strategies.layers(fn.BatchNorm))
    case = find(cases, lambda case: len(case.x) == 1, settings=REACH)
    assert case.x[0, 0].numel() > 1


NETWORKS = {
    "empty": lambda net: len(net) == 0,
    "nested": lambda net: any(isinstance(layer, fn.Sequential) and len(layer) for layer in net),
    "nested twice": lambda net: any(
        isinstance(inner, fn.Sequential)
        for layer in net
        if isinstance(layer, fn.Sequential)
        for inner in layer
    ),
    "groups after a layer": lambda net: any(getattr(layer, "groups", 1) > 1 for layer in net[1:]),
    "four layers": lambda net: len(net) == 4,
    "every kind": lambda net: len({type(layer) for layer in net}) == 4,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_reach(name):
    find(strategies.networks(), NETWORKS[name], settings=REACH)


@given(strategies.cases(strategies.networks(first=strategies.layers(fn.Embedding))))
def test_networks_of_integers_fit(case):
    net, params, x = case
    assert isinstance(net[0], fn.Embedding)
    assert not x.is_floating_point()
    assert net.apply(params, x).shape == (len(x), *net.out_shape(x.shape[1:]))


# --- Shrinking


def test_cases_shrink_to_the_least():
    cases = strategies.cases(strategies.layers(fn.Conv2d))
    least = find(cases, lambda case: case.x.numel() > 0, settings=SEARCH)
    assert repr(least.layer) == "Conv2d(1, kernel_size=1, bias=False)"
    assert least.x.shape == (1, 1, 1, 1)
    net = find(strategies.networks(), lambda net: len(net) > 1, settings=SEARCH)
    assert repr(net) == "Sequential(ReLU(), ReLU())"


def test_shrinking_keeps_what_matters():
    found = find(
        strategies.cases(strategies.layers(fn.Conv2d)),
        lambda case: case.layer.stride[0] > 1 and case.x.shape[2] > 4,
        settings=SEARCH,
    )
    assert found.layer.stride == (2, 2)
    assert found.layer.out_channels == 1
    assert found.x.shape[:2] == (1, 1)
    assert found.x.shape[2] == 5


# --- Layers of one's own


@given(strategies.cases(st.builds(Dense, st.integers(1, 3)), shapes=st.tuples(st.integers(1, 3))))
def test_a_layer_of_ones_own_with_shapes_of_ones_own(case):
    check_vjp(*case)


@given(strategies.cases(st.just(fn.Sequential(fn.Conv2d(2, 3), fn.Conv2d(4, 2, groups=2)))))
def test_shapes_are_found_by_asking(case):
    assert min(case.x.shape[2:]) >= 4


def test_a_layer_that_takes_no_picture():
    class Never(fn.ReLU):
        def out_shape(self, shape):
            raise ValueError

    with pytest.raises(ValueError, match="expected a layer that takes"):
        find(strategies.shapes(Never()), lambda shape: True, settings=SEARCH)


# --- The command


def test_the_table(capsys):
    assert command.main(["--examples", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(command._HEADER)
    names = {line.split()[0] for line in lines[1:]}
    assert names == {cls.__name__ for cls in (*REGISTRY, *LOSSES)}
    assert [line.split()[1] for line in lines[1:3]] == ["float64", "float32"]


def test_a_failure_is_in_the_table(capsys, monkeypatch):
    from test_check_vjp import SPOILS, Spoilt

    spoilt = fn.Sequential(Spoilt(4, SPOILS["sign"][0]))
    params = spoilt.init(fn.key(0), (3,), dtype=torch.float64)
    case = spoilt, params, fn.normal(fn.key(1), (2, 3), dtype=torch.float64)
    # One case, of which nothing shrinks.
    monkeypatch.setattr(strategies, "cases", lambda *args, **kwargs: st.just(case))
    assert command.main(["--examples", "5", "--layer", "ReLU", "--dtype", "float64"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "the sign is wrong" in out
    repeated = re.search(r"python -m funcnet.testing (--layer ReLU --dtype float64 --seed .*)", out)
    assert command.main(shlex.split(repeated[1])) == 1
    assert repeated[0] in capsys.readouterr().out


def test_an_exception_of_a_layer_is_in_the_table_with_its_case(capsys, monkeypatch):
    class Second(fn.ReLU):
        def fwd(self, params, x, *, key=None):
            return super().fwd(params, [x][1])

    case = Second(), (), torch.ones(2, 3)
    monkeypatch.setattr(strategies, "cases", lambda *args, **kwargs: st.just(case))
    assert command.main(["--examples", "5", "--layer", "ReLU", "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert "IndexError: list index out of range" in out
    assert re.search(r"in .*test_strategies\.py, line \d+, of Second\(\), \(2, 3\)", out)


def test_the_command_draws_networks_with_keys_and_of_integers(monkeypatch):
    found = set()

    def note(layer, params, x, key):
        inner = {type(each) for each in layer}
        assert (fn.BatchNorm not in inner) or key is not None
        found.update(inner)
        return Errors()

    monkeypatch.setattr(command, "inspect_vjp", note)
    options = ["--dtype", "float32", "--examples", "200", "--seed", "1"]
    assert command.main(["--layer", "Sequential", *options]) == 0
    assert found >= {fn.Embedding, fn.BatchNorm, fn.Dropout}


@pytest.mark.parametrize("name", ["ReLU", "MSE"])
def test_the_command_draws_every_kind_of_finite_numbers(name, monkeypatch):
    drawn = []

    def note(layer, params, x, key):
        drawn.extend(leaf for leaf in (x, *optree.tree_leaves(params)) if leaf.numel() > 4)
        return Errors()

    monkeypatch.setattr(command, "inspect_vjp", note)
    options = ["--dtype", "float32", "--examples", "200", "--seed", "1"]
    assert command.main(["--layer", name, *options]) == 0
    assert any((x == x.flatten()[0]).all() for x in drawn)
    assert any(x.abs().max() > 30 for x in drawn)
    assert any(torch.equal(2 * x, (2 * x).round()) and not torch.equal(x, x.round()) for x in drawn)
    assert all(x.isfinite().all() for x in drawn)


def test_rounding_of_a_gradient_of_zero_is_no_error():
    """A softmax ignores what is added to all of x: the bias before it has a gradient of 0."""
    net = fn.Sequential(fn.Conv1d(2, 1), fn.LogSoftmax(-1))
    params = net.init(fn.key(0), (3, 5), dtype=torch.float64)
    errors = inspect_vjp(net, params, fn.normal(fn.key(9), (2, 3, 5), dtype=torch.float64))
    assert errors.autograd < 1e-12


def test_a_seed_repeats_the_cases(monkeypatch):
    drawn = []

    def note(layer, params, x, key):
        drawn[-1].append((repr(layer), x.shape, x.dtype, x.double().sum().item()))
        return Errors()

    monkeypatch.setattr(command, "inspect_vjp", note)
    for seed in ("5", "6", "5"):
        drawn.append([])
        options = ["--layer", "Conv2d", "MSE", "--examples", "20", "--seed", seed]
        assert command.main(options) == 0
    first, other, again = drawn
    assert first == again
    assert len(set(first) & set(other)) < len(first) / 2


def test_a_reader_that_wants_only_the_beginning():
    """As `head` does. Python would flush what is left as it exits, and say that this fails."""
    reading, writing = os.pipe()
    os.close(reading)
    arguments = ["--examples", "1", "--layer", "ReLU"]
    done = subprocess.run(
        [sys.executable, "-m", "funcnet.testing", *arguments],
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


MY_ROWS = """
from dataclasses import dataclass

import torch

import funcnet as fn
from funcnet.testing.registry import REGISTRY, Row


@dataclass(frozen=True)
class Power(fn.Layer):
    exponent: int

    def _fwd(self, params, x, key):
        if key is None:
            raise ValueError("Power: expected a key")
        return x**self.exponent, x

    def _bwd(self, params, x, dy, need):
        return (), dy * self.exponent * x ** (self.exponent - 1)


@dataclass(frozen=True)
class Unsettled(Power):
    pass


REGISTRY[Power] = Row(Power, ((Power(2), (3,)),), {"exponent": [1, 2, 3]}, needs_key=True)
REGISTRY[Unsettled] = Row(Unsettled, ((Unsettled(2), (3,)),))
"""


@pytest.fixture
def my_rows(tmp_path, monkeypatch, rows_are_restored):
    """The name of a module that adds rows to the registry."""
    (tmp_path / "my_rows.py").write_text(MY_ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_rows"
    sys.modules.pop("my_rows", None)


def test_rows_of_ones_own(my_rows, capsys):
    options = ["--import", my_rows, "--examples", "5", "--dtype", "float64"]
    assert command.main([*options, "--layer", "Power"]) == 0
    assert command.main([*options, "--layer", "Unsettled"]) == 1
    out = capsys.readouterr().out
    assert "expected settings for exponent of Unsettled in its row" in out
    assert "--import my_rows" in out


def test_a_failure_is_told_where_the_output_lacks_its_letters(monkeypatch):
    """As on Windows, where what a program writes to a file is cp1252."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    failure = GradientMismatch("√8 is missing")
    monkeypatch.setattr(command, "run", lambda *_: command.Score(failure=failure))
    monkeypatch.setattr(sys, "stdout", out)
    assert command.main(["--layer", "ReLU", "--dtype", "float64"]) == 1
    out.seek(0)
    assert "\\u221a8 is missing" in out.read()


@pytest.mark.usefixtures("rows_are_restored")
def test_layers_of_ones_own_are_drawn_in_networks():
    class Mine(fn.ReLU):
        pass

    REGISTRY[Mine] = Row(Mine, ((Mine(), (3,)),))
    find(strategies.networks(), lambda net: any(type(layer) is Mine for layer in net))


def test_a_module_that_lacks_another_is_not_missing(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text("import nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        command.main(["--import", "my_rows"])


def test_what_is_not_there_is_refused_by_name():
    class Mine(fn.ReLU):
        pass

    for strategy in (strategies.layers(Mine), strategies.losses(Mine)):
        with pytest.raises(TypeError, match=r"expected a class in the registry, got Mine; st\.b"):
            find(strategy, lambda _: True)
    for strategy, message in (
        (strategies.cases(Mine), "cases: expected a strategy of layers, got Mine; st.builds(Mine"),
        (strategies.cases(Mine()), "cases: expected a strategy of layers, got Mine(); st.just("),
        (strategies.cases([Mine()]), "cases: expected a strategy of layers, got [Mine()]"),
        (strategies.loss_cases(fn.MSE()), "loss_cases: expected a strategy of losses, got MSE(); "),
        (strategies.networks(parts=Mine), "networks: expected a strategy of layers, got Mine; "),
        (strategies.networks(first=Mine), "networks: expected a strategy of layers, got Mine; "),
        (strategies.layers(Mine()), "expected a class in the registry, got Mine(); st.just("),
        (strategies.layers("Mine"), "expected a class in the registry, got 'Mine'"),
    ):
        with pytest.raises(TypeError, match=f"{re.escape(message)}"):
            find(strategy, lambda _: True)
    with pytest.raises(ValueError, match=r"expected one of contiguous, .*, got 'row_major'"):
        find(strategies.tensors((2, 3), layouts=["row_major"]), lambda _: True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--examples", "0"],
        ["--examples", "many"],
        ["--device", "gpu"],
        ["--layer", "Nonsense"],
        ["--dtype", "int8"],
        ["--import", "nowhere"],
        ["--import", "os.nowhere"],
        ["--device", "nonsense"],
        ["--device", "meta"],
        ["--device", "cuda:99"],
    ],
)
def test_bad_arguments_of_the_command(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Conv2", "got 'Conv2'; did you mean Conv2d or "),
        ("relu", "got 'relu'; did you mean ReLU or "),
        ("Nonsense", "got 'Nonsense'; help('funcnet') lists all"),
    ],
)
def test_a_misspelt_layer_gets_a_hint(name, hint, capsys):
    with pytest.raises(SystemExit):
        command.main(["--layer", "ReLU", name])
    message = capsys.readouterr().err.splitlines()[-1]
    assert hint in message
    assert len(message) < 150


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "inspect_vjp", interrupt)
    assert command.main(["--layer", "ReLU"]) == 130
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_neither_funcnet_nor_check_vjp_needs_hypothesis():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import funcnet.testing\n"
        "funcnet.testing.check_vjp\n"
        "try: funcnet.testing.strategies\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'funcnet[test]'" in done.stdout
