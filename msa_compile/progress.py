"""How far a long piece of work is: a bar with rate and time left where tqdm is installed, and nothing otherwise."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What tells somebody how far the work is."""

    def update(self, n: int = 1) -> object:
        """``n`` more pieces are done."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> object:
        """Say something of where it stands."""


class _Silence:
    def update(self, n: int = 1) -> None:
        pass

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        pass


@contextmanager
def progress_bar(what: str, unit: str, *, total: int | None = None, shown: bool = True) -> Iterator[Progress]:
    """A bar on standard error for the duration; it is closed on an error too.

    Args:
        what: The work, in a word or two.
        unit: One piece of it.
        total: Pieces, where they can be counted beforehand.
        shown: Whether there is a bar at all.
    """
    if not shown or not importlib.util.find_spec("tqdm"):
        yield _Silence()
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, desc=what) as bar:
        yield bar
