"""Export a sparsified model to a file: capture, rewrite, write, lint, check, and only then put it in its place."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

from msa_compile.config import MSAConfig
from msa_compile.errors import ExportFormatError, ExportIndexerError, MissingPackageError
from msa_compile.export.capture import capture, check_examples
from msa_compile.export.engine.require import require_tensorrt
from msa_compile.export.engine.write_engine import write_engine
from msa_compile.export.plan_call import Request, plan_call
from msa_compile.export.records import ExportResult, SparseProgram
from msa_compile.export.write import written_whole
from msa_compile.export.write_aoti import write_aoti
from msa_compile.export.write_onnx import Written, write_onnx

SUFFIXES = {".onnx": "onnx", ".pt2": "aoti", ".engine": "tensorrt"}
CACHES = ("none", "static", "explicit")
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "aoti": ()}
_WRITERS: dict[str, Callable[[SparseProgram, Path, MSAConfig], Written]] = {
    "onnx": write_onnx,
    "aoti": write_aoti,
    "tensorrt": functools.partial(write_engine, is_python_free=False),
    "tensorrt_aot": functools.partial(write_engine, is_python_free=True),
}


def export_model(request: Request, path: Path, format: str | None) -> ExportResult:
    """Write what is requested to ``path``; raises as `msa_compile.export` does.

    Args:
        request: The model, which is dense while this runs, and how it is called.
        path: Where the artifact goes.
        format: Default by the suffix.
    """
    format = _format_of(path, format)
    if request.cache not in CACHES:
        raise ExportFormatError(f"cache={request.cache!r}; choose one of {', '.join(map(repr, CACHES))}")
    _check_packages(format)
    _check_indexers(request)
    call = plan_call(request)
    check_examples(call)
    expected = {site.name for site in request.sites if site.decision == "sparse"}
    sparse = capture(call, request.config, request.windows, expected)
    with written_whole(path) as temporary:
        written = _WRITERS[format](sparse, temporary, request.config)
        files = sorted(temporary.parent.iterdir())
        size = sum(file.stat().st_size for file in files)
    return ExportResult(
        path=path,
        format=format,
        inputs=written.inputs or sparse.inputs,
        outputs=written.outputs or sparse.outputs,
        sites=sparse.sites,
        cache=request.cache,
        opset=written.opset,
        size=size,
        files=tuple(path.parent / file.name for file in files),
        largest=written.largest,
        checks=written.checks,
        not_checked=written.not_checked,
    )


def _check_indexers(request: Request) -> None:
    own = sorted({site.name for site in request.sites if site.indexer == "own"})
    if own:
        raise ExportIndexerError(
            f"{len(own)} sites select by the model's own indexer, which no artifact can hold yet:\n"
            + "\n".join(f"  {name or '<root>'}" for name in own)
            + "\nNothing was written. What export makes of other sites goes through where these are left out with "
            "MSAConfig(exclude=...), and are as the model has them."
        )


def _format_of(path: Path, format: str | None) -> str:
    found = SUFFIXES.get(path.suffix) if format is None else format
    if found is None or found not in _WRITERS:
        known = ", ".join(f"{suffix} ({name})" for suffix, name in SUFFIXES.items())
        raise ExportFormatError(f"{path.name} with format={format!r}: end the path in one of {known}")
    return found


def _check_packages(format: str) -> None:
    if format not in _PACKAGES:
        require_tensorrt()
        return
    missing = [name for name in _PACKAGES[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"export to {format} needs {', '.join(missing)}: pip install 'msa_compile[{format}]'. Nothing was written."
        )
