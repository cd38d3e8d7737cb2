"""What an export hands on, and what it returns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sympy
from torch.export import ExportedProgram

from msa_compile.records import Site

Cache = Literal["none", "static", "explicit"]


@dataclass(frozen=True)
class Port:
    """One input or output of an artifact.

    Attributes:
        name: Its name.
        dtype: As torch writes it, ``"float32"``.
        shape: Sizes; an open one is named, as ``"batch"``.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


def name_size(size: str, symbols: Mapping[str, str]) -> str:
    """An expression of symbols with the names that they go by: ``past + length``."""
    return re.sub(r"\w+", lambda found: symbols.get(found[0], found[0]), size)


def evaluate_size(size: int | str, sizes: Mapping[str, int]) -> int:
    """The number that an expression of names such as ``past + length`` comes to."""
    return int(sympy.sympify(size, locals=dict(sizes)))


@dataclass(frozen=True)
class Range:
    """The sizes that one open dimension may have, both ends included."""

    least: int
    most: int


@dataclass(frozen=True)
class SparseProgram:
    """An exported program whose attention is sparse.

    Attributes:
        program: In the training dialect, with the msa ops.
        sites: Its attention.
        inputs, outputs: In order.
        ranges: Of every open dimension, by name.
        symbols: The name of each symbol of the program.
        example: One call, the flat inputs in order.
    """

    program: ExportedProgram
    sites: tuple[Site, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    ranges: dict[str, Range]
    symbols: dict[str, str]
    example: tuple[Any, ...]


@dataclass(frozen=True)
class ExportResult:
    """What was written; ``print`` it.

    Attributes:
        path: The artifact.
        format: ``"onnx"``, ``"aoti"``, ``"tensorrt"`` or ``"tensorrt_aot"``.
        inputs, outputs: In order.
        sites: The attention in it, as ``explain`` has it.
        cache: ``"none"``, ``"static"`` or ``"explicit"``.
        opset: ONNX opset, ``None`` for another format.
        size: Bytes of all files.
        files: The files.
        largest: Bytes of the largest intermediate at the longest call of the profile.
        checks: What was checked, a sentence each.
        not_checked: What was not.
    """

    path: Path
    format: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sites: tuple[Site, ...]
    cache: Cache
    opset: int | None
    size: int
    files: tuple[Path, ...]
    largest: int
    checks: tuple[str, ...]
    not_checked: tuple[str, ...]

    def __str__(self) -> str:
        sparse = sum(site.decision == "sparse" for site in self.sites)
        opset = f", opset {self.opset}" if self.opset else ""
        lines = [
            f"{self.path} ({self.format}{opset}, {self.size / 2**20:.1f} MiB in {len(self.files)} file(s)): "
            f"{sparse} sparse and {len(self.sites) - sparse} dense sites, cache {self.cache}",
            *(f"  in   {port}" for port in self.inputs),
            *(f"  out  {port}" for port in self.outputs),
            *(f"  checked: {check}" for check in self.checks),
            *(f"  NOT checked: {check}" for check in self.not_checked),
        ]
        return "\n".join(lines)
