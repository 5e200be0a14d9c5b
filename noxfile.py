"""`nox` runs the tests with the oldest and the newest supported versions of what funcnet stands on.

The oldest are the floors in pyproject.toml. `nox -s "tests(versions='oldest')"` runs one of them;
`nox -s lint` what needs no tests.
"""

import re
from pathlib import Path

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def floors() -> list[str]:
    """Every dependency of the package, at the lowest version that it allows."""
    listed = re.search(
        r"^dependencies = \[(.*?)\]", Path("pyproject.toml").read_text(), re.M | re.S
    )
    assert listed is not None
    return [name.replace(">=", "==", 1) for name in re.findall(r'"([^"]+)"', listed[1])]


@nox.session(python=PYTHONS)
@nox.parametrize("versions", ["oldest", "newest"])
def tests(session: nox.Session, versions: str) -> None:
    """Run the suite."""
    pinned = floors() if versions == "oldest" else []
    if pinned:
        session.install(*pinned)
    session.install("-e", ".[test]", *pinned)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types."""
    session.install("-e", ".[test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "--strict", "funcnet")
