"""Where the calls of a model come from that its index branches learn from: batches, or a loop of the user's own.

The first calls of each pass over the data are held out: metrics are of them alone, and nothing learns from them.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from msa_compile.batches import check_iterable, read_batch
from msa_compile.errors import BatchError, EmptyDataError

_MOST_HELD_OUT = 4
_TRAINED_TO_HELD_OUT = 8  # batches


@dataclass(frozen=True)
class Call:
    """One call of the model.

    Attributes:
        args, kwargs: The call.
        counted: bool `[B, T]`, False where a token is padding, or `None` where nothing says so.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    counted: Tensor | None


class Visitor(Protocol):
    """Somebody who watches calls."""

    def begin(self, call: Call) -> bool:
        """A call is about to be made; says whether it is needed. May raise :class:`Enough`."""

    def end(self) -> None:
        """A call that was needed is over. May raise :class:`Enough`."""


class Enough(BaseException):
    """Ends the calls; no `except Exception` of a user's loop holds it up."""


class Feed(Protocol):
    """Calls of a model."""

    def first(self) -> Call:
        """A call to examine the model with."""

    def held_out(self, visitor: Visitor) -> None:
        """Make the calls that nothing learns from."""

    def training(self, visitor: Visitor) -> None:
        """Make the other calls, again and again."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the result has to know of the data."""


class Batches:
    """Calls with batches, as :func:`msa_compile.batches.read_batch` understands them.

    Args:
        model: The model.
        data: Batches; a generator can be gone through once.
        max_length: Tokens of a row at most, the others are cut off; default all.

    Raises:
        EmptyDataError: There is no batch.
    """

    def __init__(self, model: nn.Module, data: Iterable[Any], max_length: int | None) -> None:
        self._model, self._data, self._max_length = model, check_iterable(data), max_length
        known = len(data) if hasattr(data, "__len__") else None
        wanted = 2 if known is None else min(_MOST_HELD_OUT, max(1, known // _TRAINED_TO_HELD_OUT))
        self._rest = iter(self._data)
        self._head = list(itertools.islice(self._rest, wanted + 1))
        if not self._head:
            raise EmptyDataError("data holds no batch (a used-up generator gives none); give batches [B, T] of text")
        self._held_out = min(wanted, max(1, len(self._head) - 1))
        self._learned_from = self._held_out if len(self._head) > 1 else 0

    @property
    def held_out_batches(self) -> list[Any]:
        """The calls that nothing learns from, as a tuple of arguments each."""
        return [self._read(place, given).kwargs or self._read(place, given).args for place, given in self._held()]

    @property
    def notes(self) -> tuple[str, ...]:
        """See :class:`Feed`."""
        only = "there is one batch only: metrics are of what was learned from. Give more to hold some out"
        return () if self._learned_from else (only,)

    def first(self) -> Call:
        """See :class:`Feed`."""
        return self._read(0, self._head[0])

    def held_out(self, visitor: Visitor) -> None:
        """See :class:`Feed`."""
        for place, given in self._held():
            self._make(visitor, self._read(place, given))

    def training(self, visitor: Visitor) -> None:
        """See :class:`Feed`.

        Raises:
            EmptyDataError: The data ended and cannot be gone through again, or a batch has nothing that counts.
        """
        passes: Iterator[Iterable[Any]] = itertools.chain(
            [itertools.chain(self._head, self._rest)], (iter(self._data) for _ in itertools.count())
        )
        made = 0
        for batches in passes:
            before = made
            for place, given in enumerate(batches):
                if place >= self._learned_from:
                    made += 1
                    self._make(visitor, self._read(place, given))
            if made == before:
                raise EmptyDataError(
                    f"data ended after {made} batches and holds none the second time, as a generator does, with steps "
                    "left to do: give a list, a DataLoader or another iterable that starts again, or fewer steps"
                )

    def _held(self) -> Iterable[tuple[int, Any]]:
        return enumerate(self._head[: self._held_out])

    def _make(self, visitor: Visitor, call: Call) -> None:
        if visitor.begin(call):
            self._model(*call.args, **call.kwargs)
            visitor.end()

    def _read(self, place: int, given: Any) -> Call:
        batch = read_batch(self._model, given)
        length = batch.ids.shape[1]
        if self._max_length is not None and length > self._max_length:
            batch = read_batch(self._model, _cut(given, length, self._max_length))
        if batch.real.sum() < 2:
            raise EmptyDataError(
                f"batch {place} of the data is {list(batch.ids.shape)} token ids, of which {int(batch.real.sum())} are "
                "no padding: there is nothing to learn from; leave such batches out"
            )
        return Call(batch.args, dict(batch.kwargs), batch.real)


class ForwardLoop:
    """Calls that a function of the user's makes: whatever `loop(model)` calls the model with, in its order.

    Args:
        model: The model.
        loop: Called again when it returns and more calls are needed.
    """

    def __init__(self, model: nn.Module, loop: Callable[[nn.Module], Any]) -> None:
        self._model, self._loop = model, loop
        self._is_single = False
        self._depth = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """See :class:`Feed`."""
        only = "the loop calls the model once: metrics are of what was learned from"
        return (only,) if self._is_single else ()

    def first(self) -> Call:
        """See :class:`Feed`."""
        taken: list[Call] = []

        def take(place: int, call: Call) -> bool:
            taken.append(call)
            raise Enough

        self._run(take, lambda: None)
        if not taken:
            raise EmptyDataError("the forward_loop returned without a call of the model")
        return taken[0]

    def held_out(self, visitor: Visitor) -> None:
        """See :class:`Feed`."""

        def begin(place: int, call: Call) -> bool:
            if place:
                raise Enough
            return visitor.begin(call)

        self._is_single = self._run(begin, visitor.end) == 1

    def training(self, visitor: Visitor) -> None:
        """See :class:`Feed`."""

        def begin(place: int, call: Call) -> bool:
            return (place > 0 or self._is_single) and visitor.begin(call)

        ended: list[Enough] = []

        def end() -> None:
            try:
                visitor.end()
            except Enough as enough:
                ended.append(enough)
                raise

        while not ended:
            if self._run(begin, end) == 0:
                raise EmptyDataError("the forward_loop returned without a call of the model")

    def _run(self, begin: Callable[[int, Call], bool], end: Callable[[], None]) -> int:
        """Run the loop once, or until somebody has enough; returns how many calls it began."""
        places = itertools.count()
        begun = 0
        needed = False
        # Metrics are taken in the middle of a loop by another one: its calls are none of the outer's.
        depth = self._depth = self._depth + 1

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal begun, needed
            if self._depth != depth:
                return
            begun += 1
            needed = begin(next(places), Call(args, kwargs, _counted(module, args, kwargs)))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._depth == depth and needed:
                end()

        hooks = [
            self._model.register_forward_pre_hook(before, with_kwargs=True),
            self._model.register_forward_hook(after),
        ]
        try:
            self._loop(self._model)
        except Enough:
            pass
        finally:
            self._depth -= 1
            for hook in hooks:
                hook.remove()
        return begun


def make_feed(model: nn.Module, data: Any, max_length: int | None) -> Feed:
    """The calls that `data` stands for.

    Raises:
        BatchError, EmptyDataError: It stands for none.
    """
    if callable(data) and not hasattr(data, "__iter__"):
        if max_length is not None:
            raise BatchError("max_length cuts batches, and a forward_loop makes its own: cut them there")
        return ForwardLoop(model, data)
    return Batches(model, data, max_length)


def _counted(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What an `attention_mask [B, T]` among the arguments says is no padding."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError:
        return None
    mask = bound.get("attention_mask", kwargs.get("attention_mask"))
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _cut(given: Any, length: int, most: int) -> Any:
    """The first `most` tokens of a batch whose rows have `length`: of tensors `[B, T, ...]` and masks `[.., T, T]`."""

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() >= 2 and tensor.shape[1] == length:
            return tensor[:, :most].contiguous()
        if tensor.dim() == 4 and tensor.shape[2] == tensor.shape[3] == length:
            return tensor[:, :, :most, :most].contiguous()
        return tensor

    return pytree.tree_map_only(torch.Tensor, cut, given)
