"""Hyperparameters: what each type of a field takes and keeps, what it refuses, how it is shown."""

import copy
import inspect
import pickle
import re
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
import torch

import funcnet as fn
from funcnet import fields
from funcnet.fields import (
    BelowOne,
    Hyperparameters,
    InstanceOf,
    IntTuple,
    Number,
    OneOf,
    Size,
    Sizes,
)

WORD = Annotated[str, OneOf(("mean", "sum"))]
ONE_WORD = Annotated[str, OneOf(("auto",))]
NUMBER_OR_NONE = Annotated[float | None, Number(0.0, may_be_none=True)]
INTS = Annotated[tuple[int, ...], IntTuple(0)]
ANY_INTS = Annotated[tuple[int, ...], IntTuple(None)]
TEXT = Annotated[Any, InstanceOf(str, "a str")]
TEXT_OR_NONE = Annotated[Any, InstanceOf(str, "a str or None", may_be_none=True)]


def of(kind, axes="CHW"):
    """A class with one field, `value`."""
    body = {"__annotations__": {"value": kind}, "_axes": axes}
    return dataclass(frozen=True)(type("Some", (Hyperparameters,), body))


@pytest.mark.parametrize(
    ("kind", "given", "kept"),
    [
        (fields.Size, 1, 1),
        (fields.Index, -3, -3),
        (fields.IndexOrNone, -3, -3),
        (fields.IndexOrNone, None, None),
        (fields.Axis, 1, 1),
        (fields.Axis, -1, -1),
        (fields.Sizes, 1, (1, 1)),
        (fields.Sizes, [1, 2], (1, 2)),
        (fields.SizesOrNone, 1, (1, 1)),
        (fields.SizesOrNone, None, None),
        (fields.SizesWithNone, 1, (1, 1)),
        (fields.SizesWithNone, None, (None, None)),
        (fields.SizesWithNone, (None, 1), (None, 1)),
        (fields.Margins, 0, (0, 0)),
        (fields.Padding, 0, (0, 0)),
        (fields.Padding, "same", "same"),
        (fields.Padding, "valid", "valid"),
        (fields.Flag, True, True),
        (fields.Flag, False, False),
        (fields.Finite, -2.5, -2.5),
        (fields.NonZero, -0.5, -0.5),
        (fields.NonNegative, 0, 0),
        (fields.Probability, 0.0, 0.0),
        (fields.Probability, 1, 1),
        (fields.Fractions, [0.0, 0.5], (0.0, 0.5)),
        (WORD, "mean", "mean"),
        (WORD, "sum", "sum"),
        (ONE_WORD, "auto", "auto"),
        (NUMBER_OR_NONE, 0.5, 0.5),
        (NUMBER_OR_NONE, None, None),
        (INTS, [0, 2], (0, 2)),
        (ANY_INTS, (-1,), (-1,)),
        (TEXT, "a", "a"),
        (TEXT_OR_NONE, "a", "a"),
        (TEXT_OR_NONE, None, None),
    ],
)
def test_what_a_field_takes_and_keeps(kind, given, kept):
    value = of(kind)(given).value
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("kind", "given", "error", "message"),
    [
        (fields.Size, 0, ValueError, ">= 1, got 0"),
        (fields.Size, None, TypeError, "to be an int, got None"),
        (fields.Index, 1.5, TypeError, "to be an int, got 1.5"),
        (fields.Index, None, TypeError, "to be an int, got None"),
        (fields.IndexOrNone, 1.5, TypeError, "to be an int, got 1.5"),
        (fields.Axis, 0, ValueError, "not to be 0, the batch, got 0"),
        (fields.Sizes, 0, ValueError, ">= 1, got 0"),
        (fields.Sizes, (1, 0), ValueError, ">= 1, got 0"),
        (fields.Sizes, (1, 2, 3), ValueError, "to be an int or a pair of ints, got (1, 2, 3)"),
        (fields.Sizes, None, TypeError, "to be an int, got None"),
        (fields.Sizes, (1, None), TypeError, "to be an int, got None"),
        (fields.Sizes, "same", TypeError, "to be an int, got 'same'"),
        (fields.SizesOrNone, 0, ValueError, ">= 1, got 0"),
        (fields.SizesOrNone, (1, None), TypeError, "to be an int, got None"),
        (fields.SizesWithNone, 0, ValueError, ">= 1, got 0"),
        (fields.Margins, -1, ValueError, ">= 0, got -1"),
        (fields.Margins, None, TypeError, "to be an int, got None"),
        (fields.Padding, -1, ValueError, ">= 0, got -1"),
        (
            fields.Padding,
            "full",
            ValueError,
            'to be an int, a pair, "same" or "valid", got \'full\'',
        ),
        (fields.Flag, 1, TypeError, "to be True or False, got 1"),
        (
            fields.Bias,
            4,
            TypeError,
            "to be True or False, got 4: sizes of x are read off the shape that init is given",
        ),
        (fields.Finite, float("inf"), ValueError, "to be finite, got inf"),
        (fields.Finite, None, TypeError, "to be a number, got None"),
        (fields.NonZero, 0.0, ValueError, "not to be 0, got 0.0"),
        (fields.NonNegative, -0.5, ValueError, "to be finite and >= 0, got -0.5"),
        (fields.Probability, -0.5, ValueError, "in [0, 1], got -0.5"),
        (fields.Probability, 1.5, ValueError, "in [0, 1], got 1.5"),
        (fields.Fractions, (0.5,), ValueError, "to be a pair of numbers, got (0.5,)"),
        (fields.Fractions, 0.5, ValueError, "to be a pair of numbers, got 0.5"),
        (WORD, "none", ValueError, 'to be "mean" or "sum", got \'none\''),
        (WORD, None, ValueError, 'to be "mean" or "sum", got None'),
        (ONE_WORD, "fold", ValueError, "to be \"auto\", got 'fold'"),
        (NUMBER_OR_NONE, -0.5, ValueError, "to be finite and >= 0, got -0.5"),
        (INTS, 3, TypeError, "to be a tuple, got 3"),
        (TEXT, 3, TypeError, "to be a str, got 3"),
        (TEXT, None, TypeError, "to be a str, got None"),
        (TEXT_OR_NONE, 3, TypeError, "to be a str or None, got 3"),
    ],
)
def test_what_a_field_refuses(kind, given, error, message):
    with pytest.raises(error, match=f"^Some: expected value {re.escape(message)}$"):
        of(kind)(given)


def test_which_entry_is_refused():
    with pytest.raises(ValueError, match=r"^Some: expected every number in value < 1, got 1\.0$"):
        of(fields.Fractions)((0.5, 1.0))
    with pytest.raises(ValueError, match=r"^Some: expected every entry of value >= 0, got -1$"):
        of(INTS)((0, -1))


@pytest.mark.parametrize(
    ("axes", "name"),
    [("CL", "a tuple of one"), ("CHW", "a pair"), ("CDHW", "a triple"), ("CABDE", "a tuple of 4")],
)
def test_how_many_are_expected_is_said_in_words(axes, name):
    with pytest.raises(ValueError, match=f"expected value to be an int or {name} of ints"):
        of(Sizes, axes)((1,) * 5)
    with pytest.raises(ValueError, match=f"expected value to be {name} of numbers"):
        of(Annotated[Any, BelowOne(len(axes) - 1)])(0.5)


# --- Which fields have a kind


class Converter:
    """What looks like a kind, but is what a field holds."""

    def convert(self, owner, name, value):
        raise AssertionError


def test_fields_without_a_kind_are_left_alone():
    @dataclass(frozen=True)
    class Some(Hyperparameters):
        noted: Annotated[float, "in metres"]
        one: Annotated[Converter, "as it is"]
        by_name: dict[str, Converter]

    given = ("3", Converter(), {"a": Converter()})
    some = Some(*given)
    assert (some.noted, some.one, some.by_name) == given


@dataclass(frozen=True)
class Derived(Hyperparameters):
    """A class that keeps what follows from its fields."""

    size: Size
    square: Size = field(init=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "square", self.size**2)


def test_the_module_of_a_class_need_not_be_registered():
    names = {"__name__": "loaded_from_a_file", "Share": fields.Probability, "fn": fn}
    code = """
@dataclass(frozen=True)
class Shrink(fn.Layer):
    p: Share

    def _fwd(self, params, x, key):
        return x * self.p, None
"""
    exec(code, names | {"dataclass": dataclass}, names)
    assert names["Shrink"](0.5).p == 0.5
    with pytest.raises(ValueError, match=r"Shrink: expected p in \[0, 1\], got -1"):
        names["Shrink"](-1)


@pytest.mark.skipif(sys.version_info < (3, 14), reason="Python evaluates annotations at once")
def test_annotations_may_name_what_is_not_there():
    """Known to the type checker alone, or defined further down."""
    names = {"__name__": "script", "fields": fields, "fn": fn, "dataclass": dataclass}
    code = """
@dataclass(frozen=True)
class Shrink(fn.Layer):
    p: fields.Probability
    note: Unknown = None
    size: Later = 1

    def _fwd(self, params, x, key):
        return x * self.p, None

class Forgotten(Shrink):
    name: Unknown

class Public(Shrink):
    def fwd(self, params: Unknown, x: Unknown, *, key: Unknown = None):
        return x * self.p, None

    def bwd(self, params: Unknown, residuals: Unknown, grad: Unknown, *, input_grad=True):
        return (), grad * self.p

@fn.register_node
@dataclass(frozen=True)
class Pair:
    left: Unknown
    right: Later = None

Later = fields.Size
"""
    exec(code, names)
    Shrink, Forgotten, Public, Pair = (
        names[name] for name in ("Shrink", "Forgotten", "Public", "Pair")
    )
    assert repr(Shrink(0.5, size=2)) == "Shrink(0.5, size=2)"
    for wrong in ({"p": -1}, {"p": 1, "size": 0}):
        with pytest.raises(ValueError, match=r"Shrink: expected "):
            Shrink(**wrong)
    with pytest.raises(TypeError, match=r"Forgotten: expected @dataclass\(frozen=True\)"):
        Forgotten(name="a", p=1)
    assert Public(0.5).vjp((), torch.ones(1), torch.ones(1), param_grad=False) == (None, 0.5)
    assert fn.tree.build(Pair, {"left": 1}) == Pair(1)


def test_what_is_derived_from_fields_is_no_part_of_the_value():
    value = Derived(3)
    assert repr(value) == "Derived(3)"
    assert pickle.loads(pickle.dumps(value)).square == copy.deepcopy(value).square == 9
    assert value.__getstate__() == {"size": 3}


def test_a_subclass_inherits_the_kinds_of_fields():
    @dataclass(frozen=True)
    class More(of(Sizes)):
        size: Size = 1

    assert More(2) == More((2, 2), 1)
    with pytest.raises(ValueError, match=r"^More: expected value >= 1, got 0$"):
        More(0)


def test_arguments_of_a_class_statement_reach_other_bases():
    class Tagged:
        def __init_subclass__(cls, tag, **kwargs):
            super().__init_subclass__(**kwargs)
            cls.tag = tag

    class Both(of(Size), Tagged, tag="a"):
        pass

    assert Both.tag == "a"
    with pytest.raises(TypeError, match="keyword"):
        type("Some", (Hyperparameters,), {}, tag="a")


# --- The code of a value


@dataclass(frozen=True)
class Three(Hyperparameters):
    first: Sizes
    second: tuple[int, ...]
    third: fields.Fractions = (0.5, 0.5)
    fourth: Size = 3

    _axes = "CHW"


@pytest.mark.parametrize(
    "code",
    [
        "Three(3, second=(1,))",
        "Three((3, 4), second=(2, 2))",
        "Three(3, second=(2, 2), third=(0.25, 0.25))",
        "Three(3, second=(), fourth=4)",
        f"Three(3, second={(12345,) * 20})",
    ],
)
def test_repr_is_the_code(code):
    value = eval(code)
    assert repr(value) == code
    assert eval(repr(value)) == value
    assert repr(pickle.loads(pickle.dumps(value))) == repr(copy.deepcopy(value)) == code


@pytest.mark.parametrize("axes", ["CL", "CHW"])
def test_sizes_that_are_alike_are_shown_as_one(axes):
    assert repr(of(Sizes, axes)(3)) == "Some(3)"


@dataclass(frozen=True, init=False)
class Various(Hyperparameters):
    sizes: tuple[int, ...]
    bias: fields.Flag

    def __init__(self, *sizes, bias=True):
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "bias", bias)
        self.__post_init__()


@pytest.mark.parametrize(
    "code", ["Various(1, 2, bias=True)", "Various(bias=False)", "OneDefault(size=2)"]
)
def test_arguments_are_shown_as_the_constructor_takes_them(code):
    assert repr(eval(code)) == code


@dataclass(frozen=True)
class OneDefault(Hyperparameters):
    size: Size = 1


@dataclass(frozen=True, kw_only=True)
class ByName(Hyperparameters):
    size: Size


def test_what_is_given_by_name_alone_is_shown_so():
    assert repr(ByName(size=2)) == "ByName(size=2)"


def test_sizes_by_axis_want_to_know_the_axes():
    @dataclass(frozen=True)
    class Lost(fn.Layer):
        kernel_size: Sizes

        def _fwd(self, params, x, key):
            return x.clone(), None

    message = "Lost: expected the class to declare _axes, for kernel_size by axis"
    with pytest.raises(TypeError, match=message):
        Lost(3)


def test_a_long_tuple_has_lines_only_where_it_is_asked_for():
    value = Three(3, (12345,) * 20)
    lines = "\n".join("        12345," for _ in range(20))
    assert fields.source(value, in_lines=True) == (
        f"Three(\n    3,\n    second=(\n{lines}\n    ),\n)"
    )
    assert "\n" not in fields.source(value)


def test_a_repr_that_is_written_is_kept():
    class Written(Three):
        def __repr__(self):
            return "written"

    assert repr(dataclass(frozen=True)(Written)(3, ())) == "written"


def test_what_is_too_long_for_a_line_has_a_line_an_argument():
    """A line has 100 characters at most."""
    name = "f" * 92
    assert len(code := fields.call(name, ["ab", "cd"])) == 100
    assert code == f"{name}(ab, cd)"
    assert fields.call(name, ["ab", "cde"]) == f"{name}(\n    ab,\n    cde,\n)"
    assert fields.call(name, ["ab", "cde"], in_lines=False) == f"{name}(ab, cde)"
    assert fields.call("f", ["g(\n    a,\n)"]) == "f(\n    g(\n        a,\n    ),\n)"


def test_only_a_tuple_of_one_ends_with_a_comma():
    assert fields.call("", ["a"]) == "(a,)"
    assert fields.call("", ["a", "b"]) == "(a, b)"
    assert fields.call("", []) == "()"
    assert fields.call("f", ["a"]) == "f(a)"
    assert fields.call("**", ["'a': b"], brackets="{}") == "**{'a': b}"
    assert fields.call("", ["a"], brackets="[]") == "[a]"


def test_a_layer_of_ones_own_may_have_torchs_names():
    @dataclass(frozen=True)
    class Dense(fn.Layer):
        in_features: Size

        def _fwd(self, params, x, key):
            return x, ()

    assert repr(Dense(in_features=3)) == "Dense(3)"
    assert len(fn.Sequential(num_features=fn.ReLU())) == 1
    with pytest.raises(TypeError, match="Dense: expected no num_features: sizes of x are"):
        Dense(3, num_features=3)


def test_signatures_of_layers_are_their_fields():
    class Same(fn.Layer):
        def _fwd(self, params, x, key):
            return x, ()

    assert not inspect.signature(fn.Layer).parameters
    assert not inspect.signature(Same).parameters
    assert list(inspect.signature(fn.Linear).parameters)[:2] == ["out_features", "bias"]

    class New(fn.Linear):
        def __new__(cls, *arguments, **named):
            return super().__new__(cls, *arguments, **named)

    # Python 3.10 asks `__new__` first, wherever it is.
    assert inspect.signature(New) == inspect.signature(fn.Linear)
    with pytest.raises(TypeError, match="callable"):
        inspect.signature(New(3))
    assert next(iter(inspect.signature(fn.initializers.Zeros()).parameters)) == "key"


def test_a_dataclass_that_is_forgotten():
    class Scale(fn.Layer):
        factor: float

        def _fwd(self, params, x, key):
            return x, ()

    class Convolution(fn.Conv2d):
        note: str = ""

    message = r"^Scale: expected @dataclass\(frozen=True\).* of factor$"
    for make in (lambda: Scale(2.0), lambda: Scale(factor=2.0)):
        with pytest.raises(TypeError, match=message):
            make()
    assert Convolution(8, 3).kernel_size == (3, 3)
    with pytest.raises(TypeError, match="missing 2 required"):
        Convolution()
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        type("Undeclared", (fn.ReLU,), {})(1)


def test_names_of_torch_among_others():
    with pytest.raises(TypeError, match="Linear: expected no device"):
        fn.Linear(4, other=1, device="cpu")
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        fn.Cast(fn.ReLU(), dtype=torch.bfloat16, other=1)
