"""The verbs that write a sparsified model to files and read it: wiring only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from msa_compile.adapter import check_adapter, insert_adapter, read_adapter, write_adapter
from msa_compile.api import Model, SparseDoor, make_sparse, require_door
from msa_compile.calibrate.result import SiteCalibration
from msa_compile.calibrate.shards import check_mesh
from msa_compile.discover import as_they_select, candidate_inputs
from msa_compile.errors import AdapterError, ExampleInputsError
from msa_compile.export.export_model import export_model
from msa_compile.export.plan_call import Request
from msa_compile.export.records import Cache, ExportResult
from msa_compile.runtime import door_of, paused


def save(model: nn.Module, folder: str | Path) -> None:
    """Save the index branches of a sparsified model, and what they belong to; the base is not saved.

    Args:
        model: Sparsified, with a learned indexer at some site.
        folder: Made if it is not there; an adapter in it is replaced.

    Raises:
        NotSparseError: The model is not sparsified.
        AdapterError: It has no index branch, its heads are split over processes, or safetensors is not installed.
    """
    door = require_door(model)
    if check_mesh(model):
        raise AdapterError(
            "attention heads are split over processes, and each has the index branches of its own groups; an adapter "
            "of all of them cannot be saved yet: calibrate and save without tensor parallelism"
        )
    assert isinstance(door, SparseDoor), "there is one kind of door"
    calibration = {name: site.to_dict() for name, site in door.calibration.items()}
    write_adapter(model, door.config, folder, calibrated=door.calibrated, calibration=calibration)


def load(model: Model, folder: str | Path, *, example_inputs: Any = None) -> Model:
    """Give a model the index branches of a folder that :func:`save` wrote.

    Args:
        model: With the base that the adapter was saved from. A plain model is sparsified with the saved config; one
            that is sparsified keeps its own.
        folder: The adapter.
        example_inputs: As in :func:`sparsify`, for a plain model.

    Returns:
        ``model`` itself.

    Raises:
        AdapterError: The folder is no adapter, is damaged or of an unknown schema, or belongs to another model; the
            model is as it was, unless a branch in it does not fit.
    """
    adapter = read_adapter(folder)
    door = door_of(model)
    check_adapter(adapter, model)
    if door is None:
        make_sparse(model, adapter.config, example_inputs, "inductor")
        door = door_of(model)
    assert isinstance(door, SparseDoor), "there is one kind of door"
    insert_adapter(adapter, model, is_forced=door.config.indexer == "learned")
    door.calibrated = adapter.calibrated
    door.calibration = {name: SiteCalibration.from_dict(said) for name, said in adapter.calibration.items()}
    door.start_over(door.config)
    door.discovery = as_they_select(model, door.discovery)
    return model


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    format: str | None = None,
    dynamic_shapes: Any = None,
    cache: Cache = "none",
    max_length: int | None = None,
) -> ExportResult:
    """Write a sparsified model to a file that runs without this package, its attention sparse.

    The model goes through ``torch.export`` and the same passes as at run time. Every length runs sparse in the
    artifact; up to the budget that is the same attention as dense. Nothing is written unless all checks are passed.

    Args:
        model: A sparsified model; it is not changed.
        path: Where to; the suffix says the format.
        example_inputs: A dict of keyword arguments, a tuple of positional ones, or one tensor; a transformers model
            brings its own.
        format: ``"onnx"`` (``.onnx``), ``"aoti"`` (``.pt2``, compiled for this kind of CPU, and loaded by
            ``torch._inductor.aoti_load_package``), ``"tensorrt"`` (``.engine``) or ``"tensorrt_aot"``, an engine that
            needs no Python; default by the suffix.
        dynamic_shapes: Open sizes as ``torch.export.export`` takes them, each with its range; default batch and length
            of the first input. For a transformers decoder those of ``input_ids`` are enough.
        cache: ``"none"``: what the model takes and returns is what the artifact takes and returns. For a transformers
            decoder also ``"explicit"``: keys and values of each layer go in and come out longer; and ``"static"``: they
            are buffers of ``max_length``, each row written at its ``position``. Both return the logits of the last
            token, and do prefill and decode in one artifact.
        max_length: The longest call, prompt and new tokens together; default ``config.max_position_embeddings``.

    Returns:
        What was written and what was checked; ``print`` it.

    Raises:
        NotSparseError: The model is not sparsified.
        ExportFormatError, MissingPackageError, ExportCacheError: What was asked for is not there.
        ExampleInputsError: Inputs that do not fit, or lie outside the range of an open size.
        CaptureError, ExportNotSparseError: The model cannot be captured, or not all of its sparse sites.
        ExportConverterError: TensorRT has nothing for an operation of the model.
        ExportIndexerError: A site selects by a learned indexer, and could only select by the keys in the artifact, or
            by an indexer of the model's own.
        ExportMemoryError: The longest call would make a tensor of ``Tq x Tk``, or one above the bound.
        ExportMismatchError, ExportWriteError: The artifact is wrong, or cannot be written.
    """
    door = require_door(model)
    assert isinstance(door, SparseDoor), "there is one kind of door"
    candidates = candidate_inputs(model, example_inputs)
    if not candidates:
        raise ExampleInputsError(f"export needs example_inputs for {type(model).__name__}")
    inputs = candidates[-1]
    if not door.discovery.records:
        door.before_call(inputs.args, dict(inputs.kwargs))
    with paused(door):
        request = Request(
            model=model,
            args=inputs.args,
            kwargs=inputs.kwargs,
            config=door.config,
            windows=door.windows,
            sites=tuple(door.discovery.sites),
            dynamic_shapes=dynamic_shapes,
            cache=cache,
            max_length=max_length,
        )
        return export_model(request, Path(path), format)
