"""Write an artifact whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from msa_compile.errors import ExportWriteError


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path in a folder of its own beside ``path``; what lies there at the end takes the place of the old files.

    Whatever goes wrong inside, the folder is removed, and an older artifact at ``path`` is as it was. The file at
    ``path`` is moved last, so that it never stands there without the weights beside it.

    Raises:
        ExportWriteError: The folder cannot be written, or the disk is full.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ExportWriteError(
            f"cannot write to {path.parent}: {error}. Give the path of a folder that exists."
        ) from error
    try:
        yield folder / path.name
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.parent / file.name)
    except OSError as error:
        raise ExportWriteError(
            f"{path} was not written: {error}. Nothing is left of it; free space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
