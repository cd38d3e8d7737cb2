"""Whether an artifact fits the longest call of its profile: no tensor of `Tq x Tk`, and none above a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from msa_compile.errors import ExportMemoryError
from msa_compile.export.records import SparseProgram

# Bytes of the largest intermediate of one call, and of all that are needed at once.
LARGEST = 2 << 30
AT_ONCE = 4 << 30


def profiles_of(sparse: SparseProgram) -> dict[str, dict[str, int]]:
    """The longest calls: all tokens at once, and one token after all others."""
    most = {name: allowed.most for name, allowed in sparse.ranges.items()} | {"batch": 1}
    longest = most | ({"past": 0} if "past" in most else {})
    if {"total", "past"} <= set(most):
        longest["total"] = most["length"]
    made = {"the longest prompt": longest}
    if "past" in most:
        made["a step after the longest prompt"] = (
            most | {"length": 1} | ({"total": most["past"] + 1} if "total" in most else {})
        )
    return made


def halved(sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of a call half as long."""
    halved = {name: size if name == "batch" else max(size // 2, min(size, 1)) for name, size in sizes.items()}
    if {"total", "past"} <= set(halved):
        halved["total"] = halved["length"] + halved["past"]
    return halved


class Sized(Protocol):
    """One tensor that an artifact makes."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def operator(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def elements(self) -> int: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102


def lint_memory(
    profile: str, whole: Sequence[Sized], half: Sequence[Sized], *, workspace: int, bound: int = LARGEST
) -> int:
    """Bytes of the largest tensor.

    Args:
        profile: Name of the call, for the error.
        whole: Every intermediate of the longest call.
        half: The same of a call with half as many queries and keys; both in one order.
        workspace: Elements that a chunk of queries may take; less is never too much.
        bound: Bytes that one tensor may have.

    Raises:
        ExportMemoryError: Naming the largest offender and its shape.
    """
    largest = max(whole, key=lambda tensor: tensor.size)
    # A length doubled makes four times as much of Tq x Tk, and twice as much of everything else.
    squares = [big for big, small in zip(whole, half, strict=True) if big.elements > 3 * small.elements]
    grown = [tensor for tensor in squares if tensor.elements > workspace]
    if grown:
        worst = max(grown, key=lambda tensor: tensor.size)
        raise ExportMemoryError(
            f"{worst.name} ({worst.operator}) is {list(worst.shape)} in a call of {profile}: it grows with the "
            "square of the length. An attention that stays dense does that, and a mask that the model makes of all its "
            "queries and keys; msa_compile.explain(model) names the dense ones. Make them sparse, or lower max_length."
        )
    if largest.size > bound:
        raise ExportMemoryError(
            f"{largest.name} ({largest.operator}) is {list(largest.shape)}, {largest.size / 2**30:.1f} GiB, in a call "
            f"of {profile}; the bound is {bound / 2**30:.1f} GiB. Lower max_length."
        )
    return largest.size


class Live(Protocol):
    """One tensor, and what is held when it is made."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def operator(self) -> str: ...  # noqa: D102
    @property
    def live(self) -> int: ...  # noqa: D102


def lint_live(profile: str, made: Sequence[Live], *, bound: int = AT_ONCE) -> int:
    """Bytes of the intermediates that are needed at once, where they are most.

    Args:
        profile: Name of the call, for the error.
        made: Every intermediate of the longest call.
        bound: Bytes that they may have.

    Raises:
        ExportMemoryError: Naming the tensor at which they have more.
    """
    worst = max(made, key=lambda tensor: tensor.live)
    if worst.live > bound:
        raise ExportMemoryError(
            f"at {worst.name} ({worst.operator}) the tensors that are needed at once have {worst.live / 2**30:.1f} GiB "
            f"in a call of {profile}; the bound is {bound / 2**30:.1f} GiB. Lower max_length."
        )
    return worst.live
