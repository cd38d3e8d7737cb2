"""Calibration in several processes: what each adds up over its own data is added over all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from msa_compile.errors import CalibrateArgumentError


def is_alone() -> bool:
    """Whether this is the only process."""
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def is_first() -> bool:
    """Whether this process writes files and shows bars."""
    return is_alone() or distributed.get_rank() == 0


def processes() -> int:
    """How many there are."""
    return 1 if is_alone() else distributed.get_world_size()


def add_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in one collective; all of one dtype and device."""
    tensors = list(tensors)
    if is_alone() or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every process the tensors of the first."""
    if is_alone():
        return
    for tensor in tensors:
        distributed.broadcast(tensor, 0)


def check_mesh(model: nn.Module) -> bool:
    """Whether attention heads are split over the processes (tensor parallelism), each with branches of its own groups.

    Raises:
        CalibrateArgumentError: Heads and data are split at once.
    """
    if is_alone():
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    meshes = {parameter.device_mesh.ndim for parameter in model.parameters() if isinstance(parameter, DTensor)}
    if meshes - {1}:
        raise CalibrateArgumentError(
            "the model is sharded over a mesh of several dimensions; calibrate it under one, tensor parallelism or "
            "data parallelism, and save the adapter"
        )
    return bool(meshes) and not any(isinstance(part, FSDPModule) for part in model.modules())
