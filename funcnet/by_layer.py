"""The gradients of a network's layers, one after another, while the backward pass runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from funcnet.compat import dispatch_modes
from funcnet.gradients import check_net_and_loss
from funcnet.keys import Key
from funcnet.layer import Layer, Tree, zeros_like
from funcnet.leaves import Watched, declares_none, joins, mapped, nothing_like, places
from funcnet.losses.loss import Loss
from funcnet.ops.inplace import is_eager
from funcnet.ops.need import Need
from funcnet.running import run_bwd

Put: TypeAlias = Callable[[Any], None]


def gradients_by_layer(net: Layer, loss: Loss) -> GradientsByLayer:
    """The function (params, x, target, key=None) ↦ an iterator of (path, dparams), layer by layer.

    It goes through the layers with parameters that hold no others, from the last to the first. Each
    gradient comes as soon as it is computed, and is what `value_and_grad` gives. The path is the
    layer's place in params, `stem.0`. By then all that depends on the layer's parameters has been
    computed, dx too, so that they may be written in place: an update needs memory for the gradient
    of one layer, not of all. The network's forward pass has run when the function returns. The
    backward pass stops after each layer until the next is asked for, and ends with the iterator.

    The gradients in a `Loop` or `Repeat` are sums or stacks over its turns: its backward pass runs
    as a whole, and then its layers' gradients follow one another. A combinator of your own counts
    as one layer. `Frozen` layers give zeros.

    Raises TypeError unless net is a Layer and loss a loss; otherwise what `value_and_grad` raises.
    Lv et al., "Full parameter fine-tuning for large language models with limited resources", 2024.

    >>> import funcnet as fn
    >>> net, loss = fn.Sequential(fn.Linear(8), fn.Tanh(), fn.Linear(3)), fn.MSE()
    >>> params, x = net.init(fn.key(0), (4,)), fn.normal(fn.key(1), (5, 4))
    >>> for path, dparams in fn.gradients_by_layer(net, loss)(params, x, torch.zeros(5, 3)):
    ...     print(path, tuple(dparams["weight"].shape))
    ...     for name, gradient in dparams.items():
    ...         _ = params[int(path)][name].sub_(gradient, alpha=0.1)
    2 (3, 8)
    0 (8, 4)
    """
    return GradientsByLayer(net, loss)


@dataclass(frozen=True)
class GradientsByLayer:
    """A value that `gradients_by_layer` makes."""

    net: Layer
    loss: Any

    def __post_init__(self) -> None:
        check_net_and_loss("gradients_by_layer", self.net, self.loss)

    def __repr__(self) -> str:
        return f"gradients_by_layer({self.net!r}, {self.loss!r})"

    def __call__(
        self, params: Tree, x: Tensor, target: Any, key: Key | None = None
    ) -> Iterator[tuple[str, Tree]]:
        """An iterator of (path, dparams), from the last layer to the first."""
        passes = Passes(self.net)
        y, residuals = passes.fwd(params, x, key)
        dy = self.loss.bwd(self.loss.fwd(y, target)[1])
        return _as_iterator(lambda put: passes.bwd(params, residuals, dy, put), dy)


def _enters(layer: Layer) -> bool:
    return joins(layer) == "apart"


class Passes:
    """The two passes of a network; the second hands over each layer's gradient once it is there."""

    def __init__(self, net: Layer) -> None:
        self._net = net
        self._gradients = _Gradients()
        self._watched = mapped(
            net,
            lambda path, layer, _: (
                layer if declares_none(layer) else _Handing(layer, path, self._gradients)
            ),
            _enters,
        )

    def fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        """(y, residuals)."""
        return self._watched.fwd(params, x, key=key)

    def bwd(self, params: Tree, residuals: Any, dy: Tensor, put: Put) -> None:
        """`put((path, dparams))` for each layer with parameters, from the last to the first."""
        self._gradients.expect(places(self._net, params, _enters), put)
        need = Need(params=True, input=False, consume=True)
        self._watched._checked_bwd(params, residuals, dy, need)
        self._gradients.hand_over_zeros()


class _Gradients:
    """The gradients of a network's layers, of which each is handed over once.

    This object holds no layer that holds it: a cycle of references would keep the gradients, and
    the process group that `put` sends them to, until the garbage collector runs.
    """

    _put: Put
    left: dict[str, tuple[Layer, Tree]]
    """The layers whose gradients have not been handed over, (layer, params) by path."""

    def expect(self, layers: Iterable[tuple[str, Layer, Tree]], put: Put) -> None:
        """Begin with the layers (path, layer, params) of a network, in order."""
        self._put = put
        self.left = {path: (layer, own) for path, layer, own in layers}

    def hand_over_zeros(self) -> None:
        """Put zeros for the layers that the backward pass has left out."""
        if self.left:
            first = next(iter(self.left))
            self.hand_over(first, zeros_like(self.left[first][1]))

    def hand_over(self, path: str, dparams: Tree) -> None:
        """Put the gradient of a layer, or of each layer in it, in the dtype of its parameters.

        Backward passes go from the last layer to the first: layers left out on the way get
        zeros.
        """
        while (last := next(reversed(self.left))) != path:
            self.hand_over(last, zeros_like(self.left[last][1]))
        layer, params = self.left.pop(path)
        dparams = optree.tree_map(lambda leaf, d: d.to(leaf.dtype), params, dparams)
        found = places(layer, dparams, lambda inner: joins(inner) is not None, path)
        for inner_path, _, own in reversed([*found]):
            self._put((inner_path, own))


@dataclass(frozen=True)
class _Handing(Watched):
    gradients: _Gradients = field(compare=False)

    def _bwd(self, params: Tree, residuals: Any, dy: Tensor, need: Need) -> tuple[Tree, Any]:
        dparams, dx = run_bwd(self.layer, params, residuals, dy, need)
        if not need.params or self.path not in self.gradients.left:
            return dparams, dx
        self.gradients.hand_over(self.path, dparams)
        return nothing_like(params), dx


# --- A function that puts values, as an iterator of them


def _as_iterator(run: Callable[[Put], None], like: Tensor) -> Iterator[Any]:
    """Yield what `run(put)` puts. `run` waits after each value until the next is asked for.

    A backward pass is a recursion through all combinators, the user's too. So that it may wait in
    the middle, it runs in a thread of its own, in turn with the caller's: never both at a time.
    """
    # Another thread knows nothing of torch.func's transformations, nor of dispatch modes.
    if not is_eager() or dispatch_modes():
        found: list[Any] = []
        run(found.append)
        yield from found
        return
    asked: SimpleQueue[bool] = SimpleQueue()
    given: SimpleQueue[list[Any]] = SimpleQueue()  # a value, or nothing at the end
    errors: list[BaseException] = []
    modes = _modes(like)

    def put(value: Any) -> None:
        given.put([value])
        if not asked.get():
            raise _GivenUpError

    def work() -> None:
        try:
            with modes():
                run(put)
        except _GivenUpError:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            given.put([])

    # A daemon, since a program may end in the middle.
    thread = Thread(target=copy_context().run, args=(work,), daemon=True)
    thread.start()
    try:
        while message := given.get():
            yield message.pop()  # held by nobody while the next is computed
            asked.put(True)
    finally:
        asked.put(False)
        thread.join()
    if errors:
        raise errors.pop()  # popped: its traceback holds this frame, which must not hold it


class _GivenUpError(BaseException):
    """Nobody asks for more: raised where `put` was called, past every `except Exception`."""


def _modes(like: Tensor) -> Callable[[], ExitStack]:
    """A context with this thread's grad mode, inference mode, threads of OpenMP and stream."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    threads = torch.get_num_threads()
    stream = torch.cuda.current_stream(like.device) if like.is_cuda else None

    def enter() -> ExitStack:
        torch.set_num_threads(threads)  # for OpenMP, which has a number for each thread
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        return stack

    return enter
