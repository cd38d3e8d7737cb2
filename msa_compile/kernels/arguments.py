"""Checks of the arguments that both public functions take; the ops themselves trust what they get."""

import torch
from torch import Tensor

from msa_compile.errors import KernelArgumentError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise `KernelArgumentError` unless `tensor` is float16, bfloat16, float32 or float64."""
    if tensor.dtype not in _FLOATS:
        raise KernelArgumentError(
            f"{name}: found dtype {tensor.dtype}; legal are float16, bfloat16, float32 and float64"
        )


def check_dimensions(name: str, tensor: Tensor, layout: str) -> None:
    """Raise `KernelArgumentError` unless `tensor` has the four dimensions that `layout` names."""
    if tensor.dim() != 4:
        raise KernelArgumentError(
            f"{name}: found {tensor.dim()} dimensions, shape {tuple(tensor.shape)}; legal are 4, {layout}"
        )


def check_size(name: str, tensor: Tensor, dim: int, expected: int, meaning: str) -> None:
    """Raise `KernelArgumentError` unless dimension `dim` of `tensor` is `expected`, which `meaning` explains."""
    if tensor.shape[dim] != expected:
        raise KernelArgumentError(
            f"{name}: found size {tensor.shape[dim]} in dimension {dim}, shape {tuple(tensor.shape)}; "
            f"legal is {expected}, {meaning}"
        )


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise `KernelArgumentError` unless `tensor` lies on `device`."""
    if tensor.device != device:
        raise KernelArgumentError(f"{name}: found on device {tensor.device}; legal is {device}, as the queries")


def check_at_least(name: str, value: int, lowest: int) -> None:
    """Raise `KernelArgumentError` unless `value >= lowest`."""
    if value < lowest:
        raise KernelArgumentError(f"{name}: found {value}; legal are integers from {lowest}")


def check_visibility(
    *,
    batch: int,
    groups: int,
    query_length: int,
    key_length: int,
    device: torch.device,
    query_start: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    document_start: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raise `KernelArgumentError` unless what bounds the visible slots has a legal shape, dtype and device.

    Values are not read: that would wait for the device.
    """
    for name, tensor, shape in (
        ("query_start", query_start, (batch,)),
        ("key_start", key_start, (batch,)),
        ("key_end", key_end, (batch,)),
        ("document_start", document_start, (batch, query_length)),
    ):
        if tensor is None:
            continue
        check_device(name, tensor, device)
        if tensor.dtype not in (torch.int32, torch.int64):
            raise KernelArgumentError(f"{name}: found dtype {tensor.dtype}; legal are int32 and int64")
        if tensor.shape != shape:
            raise KernelArgumentError(f"{name}: found shape {tuple(tensor.shape)}; legal is {shape}")
    if mask is None:
        return
    check_device("mask", mask, device)
    check_dimensions("mask", mask, "broadcastable to [B, Hkv, Tq, Tk]")
    if mask.dtype != torch.bool:
        raise KernelArgumentError(f"mask: found dtype {mask.dtype}; legal is bool, True where the key may be seen")
    for found, full in zip(mask.shape, (batch, groups, query_length, key_length), strict=True):
        if found != 1 and found != full:
            raise KernelArgumentError(
                f"mask: found shape {tuple(mask.shape)}; legal is [B, Hkv, Tq, Tk] = "
                f"{(batch, groups, query_length, key_length)} or 1 in any dimension"
            )
