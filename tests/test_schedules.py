"""Schedules: their formulas, torch's OneCycleLR, and one answer for ints and tensors."""

import math
import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_transforms import compile_whole

import funcnet as fn
from funcnet import schedules

RATES = st.floats(0, 10) | st.sampled_from([0, 1])
STEPS = st.integers(1, 50)


@st.composite
def cosines(draw):
    steps = draw(STEPS)
    return schedules.cosine(draw(RATES), steps, draw(st.integers(0, steps)), draw(RATES))


SCHEDULES = st.one_of(
    st.builds(schedules.constant, RATES),
    st.builds(schedules.linear, RATES, RATES, STEPS),
    cosines(),
    st.builds(schedules.exponential, RATES, st.floats(0, 1.1)),
    st.dictionaries(st.integers(0, 60), RATES).map(
        lambda rates: schedules.piecewise({0: 0.5, **rates})
    ),
    st.builds(schedules.one_cycle, RATES, STEPS),
)
EXAMPLES = [
    schedules.constant(0.1),
    schedules.linear(0.1, 0.01, 7),
    schedules.cosine(0.1, 10, warmup=3, last=0.01),
    schedules.exponential(0.1, 0.9),
    schedules.piecewise({0: 0.1, 3: 0.01}),
    schedules.one_cycle(0.1, 10),
]


@given(SCHEDULES, st.integers(0, 80))
def test_a_number_that_an_optimiser_takes(schedule, step):
    lr = schedule(step)
    assert type(lr) is float
    assert lr >= 0


@given(SCHEDULES, st.lists(st.integers(0, 80), max_size=5))
def test_tensors_give_the_same(schedule, counts):
    found = schedule(torch.tensor(counts, dtype=torch.int64))
    assert found.dtype == torch.float64
    expected = torch.tensor([schedule(step) for step in counts], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
    for step in counts[:1]:
        assert schedule(torch.tensor(step)).shape == ()
        assert math.isclose(schedule(torch.tensor(step)), schedule(step), abs_tol=1e-15)


@given(SCHEDULES)
def test_they_are_values(schedule):
    for again in (eval(repr(schedule), vars(fn)), pickle.loads(pickle.dumps(schedule))):
        assert again == schedule
        assert hash(again) == hash(schedule)
    assert fn.SGD(schedule) == fn.SGD(schedule)


def test_the_code_of_a_schedule():
    assert (
        repr(schedules.cosine(0.1, 100, warmup=5)) == "schedules.cosine(0.1, steps=100, warmup=5)"
    )
    assert repr(schedules.piecewise({5: 0.01, 0: 0.1})) == "schedules.piecewise({0: 0.1, 5: 0.01})"
    assert repr(fn.SGD(schedules.constant(0.1))) == "SGD(schedules.constant(0.1))"
    assert schedules.piecewise({5: 0.01, 0: 0.1}) == schedules.piecewise({0: 0.1, 5: 0.01})


# --- Formulas


@given(RATES, RATES, STEPS, st.integers(0, 80))
def test_linear(first, last, steps, step):
    expected = first + (last - first) * min(step, steps) / steps
    assert schedules.linear(first, last, steps)(step) == max(expected, 0.0)


@pytest.mark.parametrize("steps", [3, 6, 12, 24, 41])
def test_linear_ends_at_0_not_below(steps):
    """0.1 − 0.1·3/3 is −1.4e−17, which an optimiser refuses."""
    schedule = schedules.linear(0.1, 0.0, steps)
    assert schedule(steps) == schedule(10**9) == 0
    assert schedule(torch.tensor(steps)) >= 0


@given(cosines(), st.integers(0, 80))
def test_cosine(schedule, step):
    peak, steps, warmup, last = schedule.peak, schedule.steps, schedule.warmup, schedule.last
    if step < warmup:
        expected = peak * (step + 1) / warmup
    elif step < steps:
        angle = math.pi * (step - warmup) / (steps - warmup)
        expected = last + (peak - last) * (1 + math.cos(angle)) / 2
    else:
        expected = last
    assert schedule(step) == expected


def test_a_cosine_without_a_rise_falls_to_0():
    schedule = schedules.cosine(0.5, 2)
    assert schedule == schedules.cosine(0.5, 2, warmup=0, last=0.0)
    assert [schedule(step) for step in range(3)] == pytest.approx([0.5, 0.25, 0.0])


@given(RATES, st.floats(0, 1.1), st.integers(0, 80))
def test_exponential(first, rate, step):
    assert schedules.exponential(first, rate)(step) == first * rate**step


def test_exponential_beyond_all_numbers():
    assert schedules.exponential(1.0, 2.0)(5000) == math.inf
    assert schedules.exponential(1, 2)(5000) == math.inf
    assert schedules.exponential(1.0, 2.0)(torch.tensor(5000)) == math.inf
    assert schedules.exponential(1.0, 0.5)(10**309) == 0
    assert schedules.exponential(0.5, 1.0)(10**309) == 0.5
    assert schedules.exponential(0.0, 2.0)(5000) == 0
    assert schedules.exponential(0.0, 2.0)(torch.tensor(5000)) == 0
    state = fn.SGD(0.1).init(())._replace(step=torch.tensor(5000))
    with pytest.raises(ValueError, match=r"SGD: expected lr\(step\) to be finite"):
        fn.SGD(schedules.exponential(1.0, 2.0)).step((), (), state)


@given(st.dictionaries(st.integers(0, 20), RATES), RATES)
def test_piecewise(rates, first):
    rates = {0: first, **rates}
    schedule = schedules.piecewise(rates)
    for step in range(22):
        assert schedule(step) == rates[max(start for start in rates if start <= step)]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@given(st.floats(1e-6, 10), st.integers(1, 60))
@example(1.0, 1)
@example(0.1, 10)
def test_one_cycle_is_torchs(peak, steps):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps)
    ours = schedules.one_cycle(peak, steps)
    for step in range(steps):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=0)
        theirs.step()
    assert ours(steps) == ours(10**9) == ours(steps - 1) == pytest.approx(peak / 25e4)


# --- Counts that are tensors


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_under_vmap_and_compile(schedule):
    counts = torch.arange(12)
    expected = torch.tensor([schedule(step) for step in range(12)], dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(schedule)(counts), expected)
    torch.testing.assert_close(compile_whole(lambda t: schedule(t))(counts), expected)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_optimisers_of_many_states(schedule):
    sgd, params = fn.SGD(schedule), torch.ones(3, 2, dtype=torch.float64)
    states = sgd.init(params)._replace(step=torch.tensor([0, 5, 11]))
    stepped, _ = torch.func.vmap(lambda p, step: sgd.step(p, p, sgd.init(p)._replace(step=step)))(
        params, states.step
    )
    expected = torch.tensor([1 - schedule(step) for step in (0, 5, 11)], dtype=torch.float64)
    torch.testing.assert_close(stepped[:, 0], expected)


def test_no_global_state():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        for schedule in EXAMPLES:
            with torch.device("meta"):
                found = schedule(torch.tensor([4], device="cpu"))
            assert found.dtype == torch.float64
            assert found.item() == pytest.approx(schedule(4))
    finally:
        torch.set_default_dtype(before)


# --- Refusals


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: schedules.constant(-0.1), ValueError, "constant: expected lr to be finite"),
        (lambda: schedules.constant(math.nan), ValueError, "constant: expected lr to be finite"),
        (lambda: schedules.linear(0.1, 0.0, 0), ValueError, "linear: expected steps >= 1, got 0"),
        (lambda: schedules.linear(0.1, math.inf, 5), ValueError, "expected last to be finite"),
        (lambda: schedules.cosine(0.1, 5.0), TypeError, "cosine: expected steps to be an int"),
        (lambda: schedules.cosine(0.1, 5, warmup=-1), ValueError, "expected warmup >= 0, got -1"),
        (
            lambda: schedules.cosine(0.1, 5, warmup=6),
            ValueError,
            "cosine: expected warmup <= steps, got warmup=6, steps=5",
        ),
        (lambda: schedules.exponential(0.1, -0.5), ValueError, "expected rate to be finite and"),
        (lambda: schedules.one_cycle("1", 5), TypeError, "one_cycle: expected peak to be a number"),
        (lambda: schedules.piecewise((1, 2)), TypeError, "piecewise: expected a dict"),
        (lambda: schedules.piecewise({}), ValueError, "piecewise: expected the lr of step 0"),
        (
            lambda: schedules.piecewise({1: 0.1}),
            ValueError,
            r"piecewise: expected the lr of step 0, got steps \[1\]",
        ),
        (lambda: schedules.piecewise({0: 0.1, -1: 0.1}), ValueError, "every step >= 0, got -1"),
        (lambda: schedules.piecewise({0: -0.1}), ValueError, "expected every lr to be finite"),
        (lambda: schedules.piecewise({0.5: 0.1}), TypeError, "expected every step to be an int"),
        (lambda: schedules.piecewise(0.1), TypeError, "piecewise: expected a dict {step: lr}"),
        (lambda: schedules.constant(0.1)(-1), ValueError, "constant: expected step >= 0, got -1"),
        (lambda: schedules.constant(0.1)(0.5), TypeError, "constant: expected step to be an int"),
    ],
)
def test_bad_values(make, error, message):
    with pytest.raises(error, match=message):
        make()
