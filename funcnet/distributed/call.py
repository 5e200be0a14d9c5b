"""Calls that all ranks of a group make together, and that end on all of them if one fails.

A collective waits for all ranks. If one of them never comes, `torch.distributed` says so after the
group's timeout, half an hour, and does not say which. Three things are done about it:

* A rank that raises writes why into the group's store, where the others look while they wait. The
  first error that is written is the one that all ranks raise.
* Where a connection breaks, a rank tries its connections to all others: one that is closed tells
  which rank is lost.
* Where time runs out, the ranks that have not noted in the store that they wait are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary
from zlib import crc32

import optree
import torch
import torch.distributed as dist
from torch import Tensor

from funcnet.tree import leaf_names

_GLANCE = timedelta(seconds=0.5)
"""The time after which a waiting rank looks into the store: a hundred times longer than an exchange
of a few numbers, so that a healthy group hardly ever looks."""

_calls: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""The number of calls so far by group. It tells errors of this call from older ones, as the numbers
of collectives do in `torch.distributed`."""


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def between_graphs(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Keep a function out of the graphs of torch.compile: no graph holds the group's store."""

    @wraps(function)
    def called(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            from funcnet.compiling import as_it_is

            found: _Result = as_it_is(function, *arguments, **named)
            return found
        return function(*arguments, **named)

    return called


@contextmanager
def together(who: str, group: Any) -> Iterator[Call]:
    """A call by all ranks of the group. An error in it is told to the others."""
    call = Call(who, group)
    try:
        yield call
    except BaseException as error:
        call.tell(f"{who}: rank {call.name} raised {type(error).__name__}: {error}")
        raise


class Call:
    """One rank's part in a call by all ranks of a group.

    Raises RuntimeError if there is no default group, ValueError if this process is not in `group`.
    """

    def __init__(self, who: str, group: Any) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{who}: expected torch.distributed.init_process_group to have been called"
            )
        self.who = who
        self.group: Any = dist.group.WORLD if group is None else group
        self.rank = dist.get_rank(self.group)
        if self.rank < 0:
            raise ValueError(f"{who}: expected a group that rank {dist.get_rank()} belongs to")
        self._names = dist.get_process_group_ranks(self.group)
        self._backends = dict(
            part.split(":") for part in dist.get_backend_config(self.group).split(",")
        )
        self._has_store = hasattr(self.group, "get_group_store")
        self._number = _calls[self.group] = _calls.get(self.group, 0) + 1

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self._names)

    @property
    def name(self) -> int:
        """This rank as torchrun counts it, in the default group."""
        return self._names[self.rank]

    # --- Collectives, which run in the background. Each returns a function that waits for it

    def all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """Add up a tensor over all ranks, in place."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        return lambda: self._wait(work, tensor)

    def broadcast(self, tensor: Tensor, rank: int) -> Callable[[], None]:
        """Give all ranks the tensor of one, in place."""
        work = dist.broadcast(tensor, self._names[rank], group=self.group, async_op=True)
        return lambda: self._wait(work, tensor)

    def all_gather(self, tensor: Tensor) -> Callable[[], Tensor]:
        """The tensors of all ranks, stacked along a new first axis."""
        found = tensor.new_empty((self.size, *tensor.shape))
        work = dist.all_gather([*found.unbind()], tensor, group=self.group, async_op=True)

        def wait() -> Tensor:
            self._wait(work, tensor)
            return found

        return wait

    def agree(self, what: object, number: Tensor | float = 0.0) -> Callable[[], list[float]]:
        """The numbers of all ranks, if all make the same call.

        The function that waits raises ValueError unless `what` has the same repr on all ranks, and
        all have called the same functions in the same order.
        """
        device = "cpu" if "cpu" in self._backends else torch.device("cuda")
        signature = crc32(repr((self.who, self._number, what)).encode())
        mine = torch.tensor([signature, 0.0], dtype=torch.float64, device=device)
        mine[1] = number
        gathered = self.all_gather(mine)

        def wait() -> list[float]:
            signatures, numbers = gathered().T.tolist()
            others = [
                self._names[r] for r, found in enumerate(signatures) if found != signatures[0]
            ]
            if others:
                raise ValueError(
                    f"{self.who}: expected calls of the same functions in the same order, with "
                    f"trees of the same structure, shapes and dtypes, on all ranks; "
                    f"{_listed(others)} and rank {self._names[0]} differ"
                )
            return list(numbers)

        return wait

    # --- When something goes wrong

    def tell(self, message: str) -> str:
        """Write an error into the store, unless one is there. Returns the one that is there."""
        key = self._key("error")
        found = self._ask(lambda store: store.compare_set(key, "", message).decode())
        return message if found is None else str(found)

    def _wait(self, work: Any, tensor: Tensor) -> None:
        """Wait for a collective. Raises RuntimeError if another rank has raised or is lost."""
        if self._backends.get(tensor.device.type) != "gloo":
            work.wait()  # of NCCL: the stream waits, not this process
            return
        while True:
            is_over = work.is_completed()
            try:
                work.wait(_GLANCE)
                return
            except RuntimeError as error:
                if is_over:  # then the error is not the timeout after _GLANCE
                    raise RuntimeError(self._reason(error)) from None
            if (told := self._told()) is not None:
                raise RuntimeError(told)
            self._ask(lambda store: store.set(self._key(f"waits/{self.rank}"), ""))

    def _reason(self, error: Exception) -> str:
        """The reason why a collective has failed, the same on all ranks."""
        if (told := self._told()) is not None:
            return told
        closed = [rank for rank in range(self.size) if self._is_closed(rank)]
        missing = [rank for rank in closed if not self._is_there(f"waits/{rank}")] or closed
        lost = _listed([self._names[rank] for rank in missing]) if missing else "a rank"
        return self.tell(f"{self.who}: lost {lost}: {error}")

    def _is_closed(self, rank: int) -> bool:
        """Send a number to a rank, and return whether this fails: its connection is closed."""
        if rank == self.rank:
            return False
        try:
            dist.isend(torch.zeros(1), self._names[rank], group=self.group)
        except RuntimeError:
            return True
        return False

    def _told(self) -> str | None:
        """The error that a rank has told, if any."""
        if not self._is_there("error"):
            return None
        told = self._ask(lambda store: store.get(self._key("error")).decode())
        return None if told is None else str(told)

    def _is_there(self, name: str) -> bool:
        return bool(self._ask(lambda store: store.check([self._key(name)])))

    def _key(self, name: str) -> str:
        return f"funcnet/{self._number}/{name}"

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """The answer of the group's store; None once the process that holds the store is lost."""
        if not self._has_store:
            return None
        try:
            return question(self.group.get_group_store())
        except Exception:
            self._has_store = False
            return None


def signature(structure: optree.PyTreeSpec, leaves: list[Tensor]) -> list[tuple[Any, ...]]:
    """The paths, shapes and dtypes of a tree's leaves, on which all ranks have to agree."""
    named = zip(leaf_names(structure), leaves, strict=True)
    return [(path, tuple(x.shape), x.dtype) for path, x in named]


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
