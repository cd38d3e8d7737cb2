"""Pictures without a window: one row of panels in a file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from msa_compile.errors import MissingPackageError


def new_figure(panels: int) -> tuple[Any, Any]:
    """A figure with a row of panels, and the panels.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    if not importlib.util.find_spec("matplotlib"):
        raise MissingPackageError('a picture needs matplotlib, which is not installed: pip install "msa_compile[viz]"')
    # Not pyplot: it would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * panels, 4.4))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(axis="y", color="#e3e6ea")
        axis.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Any, title: str, path: str | Path) -> None:
    """Write a figure; folders on the way are made."""
    figure.suptitle(title, fontsize=13)
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
