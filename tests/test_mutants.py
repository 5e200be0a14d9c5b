"""The mutation gate: its patches apply, and a slice of it. All of it: `python -m tests.mutants`."""

from __future__ import annotations

import ast
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from mutants import runner
from mutants.runner import ROOT, GateError, Verdict, examine, gate, plant, snapshot
from mutants.table import MUTANTS, Mutant

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
SLICE = ["groups-mixed", "off-by-one-padding", "fold-in-collides-with-split"]
HARMLESS = Mutant(
    name="harmless",
    file="funcnet/losses.py",
    old="difference = x - target\n",
    new="difference = -(target - x)\n",
    why="rounding is symmetric, so no test can find it",
    tests=("tests/test_losses.py",),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_patch_applies_and_changes_the_code(mutant):
    changed = ast.parse(plant(mutant, ROOT))
    original = ast.parse((ROOT / mutant.file).read_text("utf-8"))
    assert ast.dump(changed) != ast.dump(original)
    assert mutant.why
    assert mutant.tests


def test_mutants_are_many_and_all_different():
    assert len(MUTANTS) >= 60
    for field in (lambda mutant: mutant.name, lambda mutant: (mutant.file, plant(mutant, ROOT))):
        assert max(Counter(map(field, MUTANTS)).values()) == 1


def test_every_mutant_names_tests_that_are_there():
    for test in {test for mutant in MUTANTS for test in mutant.tests}:
        path, _, function = test.partition("::")
        assert f"def {function.split('[')[0]}" in (ROOT / path).read_text("utf-8"), test


def test_a_slice_is_killed_and_what_is_no_bug_survives(monkeypatch):
    monkeypatch.setattr(runner, "SUITE", HARMLESS.tests)
    reported = []
    outcomes = gate([*(BY_NAME[name] for name in SLICE), HARMLESS], 2, reported.append)
    assert {outcome.mutant.name: outcome.verdict for outcome in outcomes} == {
        **dict.fromkeys(SLICE, Verdict.KILLED),
        "harmless": Verdict.SURVIVED,
    }
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
    with snapshot() as tree:
        outcome = examine(HARMLESS, tree, HARMLESS.tests, limit=0.1)
    assert outcome.verdict is Verdict.TIMED_OUT


@pytest.mark.parametrize("old", ["no such text", "Tensor"])
def test_a_patch_that_does_not_apply_once_is_refused(old):
    with pytest.raises(GateError, match=r"harmless: expected its old text once in funcnet/losses"):
        gate([replace(HARMLESS, old=old)])
