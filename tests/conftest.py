"""Hypothesis profiles, and the devices that are there.

pytest -n 2                                in two processes
pytest                                     the quick profile: the same examples every time, so that
                                           a failure is the change's
pytest --hypothesis-profile=thorough       thousands of examples a property, new ones every time
                                           (or by the environment variable HYPOTHESIS_PROFILE)
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from funcnet.testing.registry import REGISTRY

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("quick", max_examples=30, derandomize=True, **_COMMON)
settings.register_profile("thorough", max_examples=3000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # pytest-xdist: the workers are the parallelism
        torch.set_num_threads(1)


@pytest.fixture
def rows_are_restored() -> Iterator[None]:
    """The registry as it was, behind a test that adds rows."""
    rows = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(rows)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device that is there."""
    return request.param
