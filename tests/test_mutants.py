"""The mutation gate: its bugs can be planted, and a slice of it.

All of it: `python -m tests.mutants`.
"""

from __future__ import annotations

import ast
import importlib
import re
import signal
import sys
import tokenize
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import StringIO

import pytest
from mutants import __main__ as command
from mutants import runner
from mutants.collected import Planted, collected
from mutants.equivalent import EQUIVALENT
from mutants.generate import generate, mutants_of, sample
from mutants.mutant import GateError, Written
from mutants.operators import OPERATORS
from mutants.runner import ROOT, Outcome, Verdict, examine, gate, plant, snapshot
from mutants.source import Source
from mutants.swap import swap
from mutants.targets import TARGETS
from mutants.written import WRITTEN

GENERATED = generate(ROOT, TARGETS)
# One quick test that kills every bug below.
LOSSES = ("tests/test_errors.py::test_losses",)
HARMLESS = Written(
    name="harmless",
    file="funcnet/losses/mse.py",
    why="rounding is symmetric, so no test can find it",
    tests=LOSSES,
    old="difference = x - target\n",
    new="difference = -(target - x)\n",
)
BROADCASTS = replace(
    HARMLESS,
    name="broadcasts",
    file="funcnet/losses/loss.py",
    old="if x.shape != target.shape:",
    new="if False:",
)
TINY = '''
"""The mean: a + b."""

from __future__ import annotations
import torch

__all__ = ["A", "f"]
Pair = tuple[int, int]


@register(flag=True)
class A:
    """Holds 1 + 1."""

    flag: bool = True

    def shift(self, x: Array["1 + 2"]) -> Array["1 - 2"]:
        """Return x - 1."""
        if x.ndim > 2:
            raise ValueError(f"expected {x.ndim + 1} - 1 axes" + " > 2")
        return x - self.bound  # not x + self.bound

    @abstractmethod
    def value(self, n: int = 1) -> int:
        """Return n - 1."""


def f(σ, x):
    return σ.sum(dim=0) @ x
'''


def mutants(source, operator=None):
    found = mutants_of("funcnet/layers/tiny.py", source)
    return [mutant for mutant in found if operator in (None, mutant.operator)]


# --- The operators


BUGS = {
    "swap-operands": {
        "y = a - b": ["y = b - a"],
        "y = a @ (b + c)": ["y = (b + c) @ a"],
        "y = a - b - c": ["y = c - (a - b)", "y = b - a - c"],
        "y = a + b": [],
        'y = "%s" % b': [],
    },
    "drop-term": {
        "y = a + b": ["y = a", "y = b"],
        "y = a - b * c": ["y = a", "y = (-(b * c))", "y = a - b", "y = a - c"],
        "y = (a + b) * c": ["y = (a + b)", "y = c", "y = (a) * c", "y = (b) * c"],
        "y = a and b and c": ["y = b and c", "y = a and c", "y = a and b"],
        "y = 2 / max(n, 1)": ["y = 2", "y = 2 / 1", "y = 2 / n"],
        'y = "a" + b': [],
    },
    "flip-sign": {
        "y = a + b": ["y = a - b"],
        "y = -a": ["y = a"],
        "y = a * b * c": ["y = (-(a * b * c))"],
        "y += a": ["y -= a"],
        "y = -1": [],
        "def f(x) -> Tensor:\n    return F.tanh(x)": ["def f(x) -> Tensor:\n    return -F.tanh(x)"],
        "def f(x) -> bool:\n    return torch.equal(x, x)": [],
    },
    "sum-or-mean": {
        "y = x.sum(0)": ["y = x.mean(0)"],
        "y = torch.mean(x)": ["y = torch.sum(x)"],
        "y = sum(x)": [],
    },
    "shift-axis": {
        "y = x.sum(dim=1)": ["y = x.sum(dim=0)", "y = x.sum(dim=2)"],
        "y = F.softmax(x, -1)": ["y = F.softmax(x, -2)", "y = F.softmax(x, 0)"],
        "y = x.sum((0, 2))": [
            *("y = x.sum((2,))", "y = x.sum((0,))", "y = x.sum((-1, 2))"),
            *("y = x.sum((1, 2))", "y = x.sum((0, 1))", "y = x.sum((0, 3))"),
        ],
        "y = x.narrow(1, 2, 3)": ["y = x.narrow(0, 2, 3)", "y = x.narrow(2, 2, 3)"],
        "y = max(n, 1)": [],
    },
    "off-by-one": {
        "y = x[1:]": ["y = x[2:]", "y = x[0:]"],
        "y = x[0]": ["y = x[1]"],
        "y = x[-1]": ["y = x[0]", "y = x[-2]"],
        "y = 0.5 * x": ["y = 1.0 * x"],
        "y = x.sum(1)": [],
        "y = x.permute(0, 2, 1)": [],
        "y = f(True)": [],
    },
    "compare": {
        "y = a > b": ["y = a >= b"],
        "y = a < b <= c": ["y = a <= b <= c", "y = a < b < c"],
        "y = a is b": ["y = a is not b"],
        "if a == b:\n    f()": [],
        "if a >= b:\n    f()": ["if a > b:\n    f()"],
    },
    "drop-check": {
        "if a:\n    raise E": ["if False:\n    raise E"],
        "if a:\n    f()\nelif b:\n    raise E": ["if a:\n    f()\nelif False:\n    raise E"],
        "check_grad(x)": ["pass"],
        "self._check(x)": ["pass"],
        "if a:\n    f()": [],
    },
    "drop-need": {
        "y = x if need.input else None": [
            "y = x if need.params else None",
            *("y = x if True else None", "y = x if False else None"),
        ],
        "if not input_grad:\n    f()": ["if True:\n    f()", "if False:\n    f()"],
        "y = x if a else None": [],
    },
    "condition": {
        "y = a if b else c": ["y = a if True else c", "y = a if False else c"],
        "y = [a for a in b if a]": ["y = [a for a in b if True]", "y = [a for a in b if False]"],
        "while a:\n    f()": ["while False:\n    f()"],
        "if a:\n    raise E": [],
        "if need.input:\n    f()": [],
    },
    "flip-flag": {"f(keepdim=True)": ["f(keepdim=False)"], "y = False": ["y = True"]},
    "drop-call": {
        "y = x.clone()": ["y = x"],
        "y = list(a + b)": ["y = (a + b)"],
        "y = x.mT": ["y = x"],
        "y = x.contiguous().view(2)": ["y = x.view(2)"],
        "y = f(x.contiguous())": [],
    },
    "drop-argument": {
        "f(x, key=key, **rest)": ["f(x, **rest)"],
        "f(dim=1, key=key)": ["f(key=key)", "f(dim=1)"],
        "zip(a, b, strict=False)": [],
    },
    "swap-arguments": {
        "y = torch.where(a, b, c)": ["y = torch.where(b, a, c)", "y = torch.where(a, c, b)"],
        "y = x.permute(0, 1, 1)": ["y = x.permute(1, 0, 1)"],
        "y = torch.add(a, b)": [],
        "y = f(a, b)": [],
        "y = torch.f(*a, b)": [],
    },
    "swap-elements": {
        "def f():\n    return a, b": ["def f():\n    return (b, a)"],
        "a, b = c": ["(b, a) = c"],
        "y = x[:, 0]": ["y = x[0, :]"],
        "y = isinstance(x, (a, b))": [],
        "y = frozenset((a, b))": [],
        "y = x.sum((0, 1))": [],
        "y = (a, a)": [],
    },
    "sibling": {
        "y = torch.tanh(x)": ["y = torch.sigmoid(x)"],
        "y = min(a, b)": ["y = max(a, b)"],
        "y = self.min": [],
        "y = f.exp": [],
    },
    "drop-statement": {
        "x.add_(y)": ["pass"],
        "x += y": ["pass"],
        "check(x)": [],
        "y = f(x)": [],
    },
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_an_operator_yields(operator):
    for source, bugs in BUGS[operator].items():
        assert [mutant.planted(source) for mutant in mutants(source, operator)] == bugs


def test_operators_are_a_dozen_and_more():
    assert BUGS.keys() == OPERATORS.keys()
    assert len(OPERATORS) >= 12


def test_what_does_not_run_is_never_mutated():
    assert [mutant.why for mutant in mutants(TINY)] == [
        "True → False",
        "x.ndim > 2 → x.ndim >= 2",
        "x.ndim > 2 → False",
        "2 → 3",
        "2 → 1",
        "x - self.bound → self.bound - x",
        "x - self.bound → x",
        "x - self.bound → (-self.bound)",
        "x - self.bound → x + self.bound",
        "σ.sum(dim=0) @ x → x @ σ.sum(dim=0)",
        "σ.sum(dim=0) @ x → (-(σ.sum(dim=0) @ x))",
        "σ.sum(dim=0) → σ.sum()",
        "σ.sum → σ.mean",
        "0 → -1",
        "0 → 1",
    ]


def test_a_generated_mutant_differs_in_its_node_alone():
    for mutant in mutants(TINY):
        planted = mutant.planted(TINY)
        before, after = TINY.encode()[: mutant.start].decode(), TINY.rpartition(mutant.old)[2]
        assert planted.startswith(before + mutant.new)
        assert planted.endswith(after)


def test_names_do_not_depend_on_lines_and_neighbours():
    names = [mutant.name for mutant in mutants(TINY)]
    assert names[0] == "layers.tiny.A:flip-flag:1"
    assert names[6:8] == ["layers.tiny.A.shift:drop-term:1", "layers.tiny.A.shift:drop-term:2"]
    assert names[-1] == "layers.tiny.f:shift-axis:2"
    longer = TINY.replace("\nclass A", "\nclass B:\n    n = a + 2\n\n\nclass A")
    assert set(names) < {mutant.name for mutant in mutants(longer)}


def test_a_mutant_that_a_change_overtakes_is_refused():
    (mutant,) = mutants("y = f(True)")
    with pytest.raises(GateError, match=r"flip-flag:1: funcnet/layers/tiny.py has changed"):
        mutant.planted("y = f( True)")


def test_a_sample_is_spread_over_functions_and_operators_and_the_same_each_time():
    spread = sample(GENERATED, 40)
    assert spread == sample(GENERATED, 40)
    assert len(spread) == 40
    assert {mutant.operator for mutant in spread} == {mutant.operator for mutant in GENERATED}
    assert max(Counter(mutant.scope for mutant in spread).values()) <= 3
    assert sample(GENERATED, 10**6) == GENERATED


def test_a_target_without_files_is_an_error():
    with pytest.raises(GateError, match=r"expected files that match funcnet/nothing\*, got none"):
        generate(ROOT, [("funcnet/nothing*", "test_losses.py")])


# --- The mutants there are


def test_generated_mutants_change_the_code_and_are_all_different():
    assert len(GENERATED) >= 200
    assert max(Counter(mutant.name for mutant in GENERATED).values()) == 1
    sources = {mutant.file: (ROOT / mutant.file).read_text("utf-8") for mutant in GENERATED}
    texts = {hash(text) for text in sources.values()}
    texts |= {hash(mutant.planted(sources[mutant.file])) for mutant in GENERATED}
    assert len(texts) == len(sources) + len(GENERATED)
    # To parse them all takes half a minute.
    seen = {ast.dump(ast.parse(source)) for source in sources.values()}
    for mutant in GENERATED[::20]:
        changed = ast.dump(ast.parse(mutant.planted(sources[mutant.file])))
        assert changed not in seen, mutant
        seen.add(changed)


@pytest.mark.parametrize("mutant", WRITTEN, ids=lambda mutant: mutant.name)
def test_every_row_applies_and_changes_the_code(mutant):
    changed = ast.parse(plant(mutant, ROOT))
    original = ast.parse((ROOT / mutant.file).read_text("utf-8"))
    assert ast.dump(changed) != ast.dump(original)
    assert mutant.why
    assert mutant.tests


def test_rows_are_many_and_all_different():
    assert len(WRITTEN) >= 60
    for field in (lambda mutant: mutant.name, lambda mutant: (mutant.file, plant(mutant, ROOT))):
        assert max(Counter(map(field, WRITTEN)).values()) == 1


def test_no_row_quotes_prose():
    for mutant in WRITTEN:
        strings = []
        try:
            for token in tokenize.generate_tokens(StringIO(mutant.old.strip()).readline):
                name = tokenize.tok_name[token.type]
                strings += [token.string] if name in ("STRING", "FSTRING_MIDDLE") else []
        except (tokenize.TokenError, IndentationError):
            pass  # a row may quote half a statement
        assert not any(re.search(r"\w \w", string) for string in strings), mutant.name


def test_every_mutant_names_tests_that_are_there():
    for test in {test for mutant in [*GENERATED, *WRITTEN] for test in mutant.tests}:
        path, _, function = test.partition("::")
        assert (ROOT / path).exists(), test
        assert f"def {function.split('[')[0]}" in (ROOT / path).read_text("utf-8"), test


def test_equivalent_mutants_are_there_and_have_reasons():
    command.check_equivalent(EQUIVALENT, GENERATED)
    assert all(EQUIVALENT.values())
    with pytest.raises(GateError, match=r"equivalent.py: there is no mutant losses.L1:compare:1"):
        command.check_equivalent(["losses.L1:compare:1"], GENERATED)


# --- The gate


def test_a_slice_is_killed_and_what_is_no_bug_survives(monkeypatch):
    monkeypatch.setattr(runner, "SUITE", LOSSES)
    checks = ("losses.loss.Loss._check:drop-check:", "losses.loss.Loss.fwd:drop-check:1")
    some = [m for m in GENERATED if m.name.startswith(checks)]
    some = [replace(mutant, tests=LOSSES) for mutant in some]
    row = next(mutant for mutant in WRITTEN if mutant.name == "fold-in-collides-with-split")
    row = replace(row, tests=("tests/test_keys.py::test_derived_keys_are_all_different",))
    listed = [replace(HARMLESS, name="listed"), replace(BROADCASTS, name="listed, but wrong")]
    reported = []
    reasons = {mutant.name: "for a reason" for mutant in listed}
    outcomes = gate([*some, row, HARMLESS, *listed], 2, reported.append, reasons)
    assert [outcome.verdict for outcome in outcomes] == [
        *[Verdict.KILLED] * 4,
        Verdict.SURVIVED,
        Verdict.EQUIVALENT,
        Verdict.NOT_EQUIVALENT,
    ]
    assert sorted(map(id, reported)) == sorted(map(id, outcomes))


def test_what_cannot_run_is_an_error_and_no_kill():
    broken = [
        replace(HARMLESS, new="difference = x - target)\n"),
        replace(HARMLESS, old="from torch import Tensor\n", new="from torch import Tensors\n"),
        replace(HARMLESS, tests=("tests/test_losses.py::test_nothing",)),
    ]
    with snapshot() as tree, ThreadPoolExecutor(2) as pool:
        for outcome in pool.map(lambda m: examine(m, tree, m.tests, limit=300), broken):
            assert outcome.verdict is Verdict.ERROR
            assert not outcome.killed


def test_a_bug_that_ends_the_process_is_killed():
    crash = replace(HARMLESS, new="__import__('os').abort()\n")
    with snapshot() as tree:
        outcome = examine(crash, tree, HARMLESS.tests, limit=300)
    assert (outcome.verdict, outcome.detail) == (Verdict.KILLED, "the process ended by SIGABRT")


def test_a_run_out_of_time_is_told_apart():
    forever = replace(HARMLESS, new="while True: pass\n")
    with snapshot() as tree:
        outcome = examine(forever, tree, HARMLESS.tests, limit=3)
    assert (outcome.verdict, outcome.detail) == (Verdict.TIMED_OUT, "after 3 s")


@pytest.mark.parametrize("old", ["no such text", "Tensor"])
def test_a_row_that_does_not_apply_once_is_refused(old):
    with pytest.raises(
        GateError, match=r"harmless: expected its old text once in funcnet/losses/mse"
    ):
        gate([replace(HARMLESS, old=old)])


def test_a_row_without_its_file_is_refused():
    with pytest.raises(GateError, match=r"harmless: there is no file funcnet/nothing.py"):
        gate([replace(HARMLESS, file="funcnet/nothing.py")])


# --- Tests that are collected once


MODULE = """
def once(f):
    def call(self):
        return f(self) + 1
    return call

class A:
    n = 3

    @once
    def method(self):
        return 10

    @property
    def value(self):
        return [i + 20 for i in range(1)][0]

    @staticmethod
    def make():
        return lambda: 30

    def default(self, n=40):
        return n

make = A.make()

def gone():
    return 50

del gone
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    path = tmp_path / "some_module.py"
    path.write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("some_module")
    del sys.modules["some_module"]


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("return 10", "return 11", [12, 20, 30, 30, 40]),
        ("f(self) + 1", "f(self) - 1", [9, 20, 30, 30, 40]),
        ("i + 20", "i + 21", [11, 21, 30, 30, 40]),
        ("lambda: 30", "lambda: 31", [11, 20, 31, 31, 40]),
        ("return n", "\n        return n + 1", [11, 20, 30, 30, 41]),
        # The body of a class has run, a function with other variables around it is another one, and
        # one that is gone cannot change.
        ("n = 3", "n = 4", None),
        ("n=40", "n=41", None),
        ("return f(self) + 1", "return 1", None),
        ("return 50", "return 51", None),
    ],
)
def test_a_bug_in_a_function_is_planted_where_it_lives(module, old, new, changed):
    def values():
        a = module.A()
        return [a.method(), a.value, module.make(), module.A.make()(), a.default()]

    assert values() == [11, 20, 30, 30, 40]
    assert swap(module.__file__, MODULE, MODULE.replace(old, new)) == (changed is not None)
    assert values() == (changed or [11, 20, 30, 30, 40])


def test_tests_that_are_collected_once():
    bugs = {
        HARMLESS.old: 0,
        "difference = 1\n": 1,
        "__import__('os').abort()\n": -signal.SIGABRT,
        "__import__('os')._exit(0)\n": 0,
        "difference = x - target)\n": int(pytest.ExitCode.INTERNAL_ERROR),
    }
    test = "tests/test_losses.py::test_autograd_follows_apply"
    with snapshot() as tree, collected(tree, [*runner.ARGUMENTS, test]) as runs:
        file, source = str(tree / HARMLESS.file), (tree / HARMLESS.file).read_text()
        everything = runs.run(None, limit=300)
        assert everything.code == 0
        assert all(name.startswith(test) for name in everything.seconds)
        for bug, code in bugs.items():
            run = runs.run(Planted(file, source, source.replace(HARMLESS.old, bug)), limit=300)
            assert run.code == code
            assert run.failed.startswith(test if code == 1 else "")
            assert (run.seconds == {}) == (code not in (0, 1) or "exit" in bug)
        forever = source.replace(HARMLESS.old, "while True: pass\n")
        assert runs.run(Planted(file, source, forever), limit=1) is None
        outside = source.replace('"mean"', '"sum"')
        for _ in range(2):  # one answer each
            assert runs.run(Planted(file, source, outside), limit=300).code is None


# --- The command


def test_the_summary_says_killed_k_of_n(capsys):
    verdicts = [Verdict.KILLED, Verdict.TIMED_OUT, Verdict.EQUIVALENT]
    assert command.summarize([Outcome(HARMLESS, verdict, "", 1) for verdict in verdicts], 7) == 0
    assert capsys.readouterr().out == (
        "killed 2 of 2, 1 equivalent, 1 of them by running out of time, in 7 s\n"
    )
    for verdict in (Verdict.SURVIVED, Verdict.NOT_EQUIVALENT, Verdict.ERROR):
        assert command.summarize([Outcome(HARMLESS, verdict, "", 1)], 7) == 1
        assert capsys.readouterr().out == (
            "killed 0 of 1, in 7 s\n"
            f"{verdict.value}: harmless (funcnet/losses/mse.py): {HARMLESS.why}\n"
        )


def listed(capsys, *arguments):
    assert command.main([*arguments, "--list"]) == 0
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()]


def test_the_command_chooses_mutants(monkeypatch, capsys):
    monkeypatch.setattr(command, "generate", lambda *_: GENERATED)
    written = {mutant.name for mutant in WRITTEN}
    generated = {mutant.name for mutant in GENERATED}
    assert set(listed(capsys)) == written | generated
    assert set(listed(capsys, "--written")) == written
    assert set(listed(capsys, "--generated")) == generated
    assert all(":compare:" in name for name in listed(capsys, "--operators", "compare"))
    losses = listed(capsys, "--files", "funcnet/losses/l1*", "--per-file", "5")
    assert len(losses) == 5
    assert all(name.startswith("losses.") for name in losses)
    assert listed(capsys, "groups-mixed", "losses.mse.MSE._fwd:swap-operands:*") == [
        "groups-mixed",
        "losses.mse.MSE._fwd:swap-operands:1",
    ]


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["--jobs", "0"], ["--per-file", "0"], ["--operators", "nothing"]],
    ids=" ".join,
)
def test_the_command_refuses(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "error: " in capsys.readouterr().err


def test_the_command_says_why_it_cannot_judge(monkeypatch, capsys):
    monkeypatch.setattr(command, "EQUIVALENT", {"losses.L1:compare:1": "a reason"})
    assert command.main(["--list"]) == 2
    assert "the gate cannot judge: equivalent.py" in capsys.readouterr().err


def test_positions_are_in_bytes():
    source = Source('y = "é" < σ\n')
    comparison = source.tree.body[0].value
    assert source.text(comparison.comparators[0]) == "σ"
