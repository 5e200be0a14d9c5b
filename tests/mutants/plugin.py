"""What pytest loads in a copy of the source tree, so that exit code 1 means: a test has failed.

The copy's funcnet must be the one that is imported, and everything must be collected. Otherwise
pytest ends with another code. Hypothesis takes the quick profile, but draws the same examples each
time and shrinks none, since nobody reads them.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from hypothesis import Phase, settings


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Vary the quick profile, after conftest.py has made it."""
    _check_is_the_copy(config.rootpath)
    settings.register_profile(
        "gate",
        settings.get_profile("quick"),
        phases=(Phase.explicit, Phase.generate),
        derandomize=True,
        database=None,
    )
    settings.load_profile("gate")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        pytest.exit(f"not collected: {report.longreprtext}", returncode=pytest.ExitCode.USAGE_ERROR)


def _check_is_the_copy(root: Path) -> None:
    try:
        found = Path(str(importlib.import_module("funcnet").__file__))
    except Exception as error:
        raise pytest.UsageError(f"funcnet cannot be imported: {error!r}") from error
    if not found.resolve().is_relative_to(root.resolve()):
        raise pytest.UsageError(f"expected the funcnet of {root}, got {found}")
