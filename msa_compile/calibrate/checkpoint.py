"""The state of a calibration in a file, so that a run that was killed goes on exactly where it was."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msa_compile.errors import CheckpointError
from msa_compile.whole_files import write_whole

SCHEMA = 1


@dataclass(frozen=True)
class Checkpoint:
    """A calibration between two steps.

    Attributes:
        task: What is being done, in plain values: another task cannot go on from here.
        step: Steps that are done.
        weights: Of every branch, by the site's name and the parameter's.
        optimizer: Its `state_dict`.
        history: Mean divergence of each site, a row a step.
        measured: Steps at which metrics were taken, and the metrics of each site as plain values.
    """

    task: dict[str, Any]
    step: int
    weights: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    history: list[list[float]]
    measured: list[tuple[int, dict[str, dict[str, float]]]]


def write_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Save a checkpoint; the one before it is there until this one is as a whole."""
    stream = io.BytesIO()
    torch.save({"schema": SCHEMA, **vars(checkpoint)}, stream)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, stream.getvalue())


def read_checkpoint(path: Path, task: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint at `path`, or `None` where there is no file.

    Raises:
        CheckpointError: It is damaged, of another schema, or of another task.
    """
    if not path.exists():
        return None
    try:
        said = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is no checkpoint of a calibration: {error}") from error
    schema = said.pop("schema", None) if isinstance(said, dict) else None
    if schema != SCHEMA:
        raise CheckpointError(f"{path} has schema {schema!r}; this version reads {SCHEMA}")
    found = Checkpoint(**said)
    others = [name for name in task if found.task.get(name) != task[name]]
    if others:
        told = ", ".join(f"{name} {found.task.get(name)!r} there and {task[name]!r} here" for name in others)
        raise CheckpointError(f"{path} is of another run ({told}); remove it, or name another file")
    return found
