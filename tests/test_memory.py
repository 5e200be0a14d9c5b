"""The C library's thresholds are set where they can be and the user has not said otherwise."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest

from funcnet import memory


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What mallopt is called with; on Linux, with nothing set by the user."""
    found: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *words: found.append(words))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("os.environ", {})
    return found


def test_sets_both_thresholds(calls: list[tuple[int, int]]) -> None:
    memory.keep_freed_memory()
    trim, mmap = -1, -3  # the numbers of M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
    assert calls == [(trim, 256 * 2**20), (mmap, 32 * 2**20)]


@pytest.mark.parametrize(
    ("platform", "variables"),
    [
        ("darwin", {}),
        ("linux", {"MALLOC_ARENA_MAX": "2"}),
        ("linux", {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}),
        ("linux", {"FUNCNET_KEEP_MEMORY": "0"}),
    ],
)
def test_leaves_the_library_alone(
    platform: str,
    variables: dict[str, str],
    calls: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("os.environ", variables)
    memory.keep_freed_memory()
    assert calls == []


def test_other_c_libraries_have_no_such_function(
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    memory.keep_freed_memory()
    assert calls == []
