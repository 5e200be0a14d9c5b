"""The message of a `GradientMismatch`."""

from __future__ import annotations

from collections.abc import Callable

from funcnet.checks import name_of
from funcnet.layer import Layer
from funcnet.testing.check import diagnose
from funcnet.testing.check.case import Case, LossCase, make_case
from funcnet.testing.check.finding import Finding
from funcnet.testing.check.replay import snippet
from funcnet.testing.errors import GradientMismatch
from funcnet.trace import Record, trace


def expect_right(found: Finding | None) -> None:
    """Raise GradientMismatch if a wrong entry was found, with a guess at the cause."""
    if found is None:
        return
    name = found.case.names[found.leaf]
    mismatch = GradientMismatch()
    mismatch.leaf = name + (f"[{', '.join(map(str, found.index))}]" if found.index else "")
    mismatch.analytic, mismatch.numeric = found.analytic, found.numeric
    off, size = abs(found.analytic - found.numeric), max(abs(found.numeric), abs(found.analytic))
    relative = off / size if size else off  # NaN stays NaN
    mismatch.relative_error = relative
    first = f"the gradient for {mismatch.leaf} is wrong"
    if found.beside:
        names = [mismatch.leaf, *(found.case.names[i] for i in found.beside)]
        first = f"the gradients for {' and '.join(names)} are wrong together"
    if found.index is None:
        first += " along a direction that moves equal entries alike"
    lines = [
        first,
        f"  analytic        {found.analytic:.12g}",
        f"  numeric         {found.numeric:.12g}",
        f"  relative error  {relative:.3g}",
    ]
    bad = diagnose.wrong_entries(found)
    is_guessed = bad is None or bool(bad.any())  # the rest looks at entries that are clearly wrong
    if bad is not None and is_guessed:
        mismatch.wrong_fraction = float(bad.double().mean())
        place = diagnose.where(bad)
        place = f", all in {name}{place}" if place else ""
        lines.append(f"  wrong entries   {int(bad.sum())} of {bad.numel()}{place}")
    if found.taylor is not None:
        lines.append(f"  Taylor          the remainder falls as h^{found.taylor:.2f}, not as h^2")
    mismatch.guess = diagnose.guess(found, bad) if is_guessed else None
    if mismatch.guess is not None:
        lines.append(f"  a guess         {mismatch.guess}")
    mismatch.args = ("\n".join(lines),)
    raise mismatch


def name_the_guilty(
    mismatch: GradientMismatch, case: Case, examine: Callable[[Case], None]
) -> None:
    """Add the layer of a network that is wrong when it is examined alone, if there is one.

    `examine` raises the GradientMismatch of another case.
    """
    if not (isinstance(case.layer, Layer) and case.layer._children()):
        return
    try:
        records = trace(case.layer, case.params, case.x, key=case.key)
    except Exception:  # the network may raise in other ways, too
        return
    for record in records:
        found = _wrong_alone(record, examine)
        if found is not None:
            place = f"layer {record.path}" if record.path else "the layer"
            line = f"  alone           {place} is wrong: {name_of(record.layer)}: {found}"
            mismatch.args = (f"{mismatch.args[0]}\n{line}",)
            return


def _wrong_alone(record: Record, examine: Callable[[Case], None]) -> str | None:
    try:
        examine(make_case(record.layer, record.params, record.x, None, None))
    except GradientMismatch as alone:
        return str(alone.args[0]).splitlines()[0]
    except Exception:  # a layer may need a key, or refuse
        return None
    return None


def complete(
    mismatch: GradientMismatch,
    case: Case,
    examine: Callable[[Case], None],
    examine_gradient: Callable[[Case], None],
    limits: str,
) -> None:
    """Add the layer, the sizes and the code that replays the case to an exception.

    `examine` raises the GradientMismatch of another case, `examine_gradient` that of its gradient
    in float64, if autograd shows it; `limits` are arguments of `check_vjp`.
    """

    def fails(drawn: Case, quickly: bool) -> bool:
        if quickly and mismatch.leaf is None:
            return False
        try:
            (examine_gradient if quickly else examine)(drawn)
        except GradientMismatch as other:
            return _fault(other) == _fault(mismatch)
        except Exception:  # it may be undefined there
            return False
        return False

    mismatch.snippet = snippet(case, fails, limits)
    mismatch.layer, mismatch.params, mismatch.x = case.layer, case.params, case.x
    mismatch.grad, mismatch.key = case.grad, case.key
    mismatch.target = case.target if isinstance(case, LossCase) else None
    sizes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in case.inputs.items())
    code = mismatch.snippet.replace("\n", "\n    ")
    mismatch.args = (
        f"{name_of(case.layer)}: {mismatch.args[0]}\n  of              {sizes}; {case.dtype}\n"
        f"To replay it:\n    {code}",
    )


def _fault(mismatch: GradientMismatch) -> str:
    """The kind of mismatch, without the index."""
    return (mismatch.leaf or str(mismatch.args[0])).split(" at [")[0].rsplit("[", 1)[0]
