"""How the ops behave under `torch.autocast`.

`torch.library.register_autocast` casts every floating-point argument to one dtype that is fixed at registration. Ours
cast only the leading q, k and v, to the dtype that the `with` statement of the user asks for.
"""

from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.register import LIBRARY


def register_autocast(name: str, *, cast_first: int) -> None:
    """Run `msa::<name>` with autocast off, its first `cast_first` arguments cast to the autocast dtype.

    As everywhere in torch, float64 tensors and tensors on other devices are left as they are.
    """
    for device_type, dispatch_key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        kernel = _make_kernel(name, device_type, cast_first)
        LIBRARY.impl(name, kernel, dispatch_key)  # type: ignore[no-untyped-call]


def _make_kernel(name: str, device_type: str, cast_first: int) -> Any:
    op = getattr(torch.ops.msa, name).default

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [_cast(arg, device_type, dtype) for arg in args[:cast_first]]
        # Off, because the implementation computes in the precision that it says, also where it calls torch.matmul.
        with torch.autocast(device_type, enabled=False):
            return op(*cast, *args[cast_first:])

    return kernel


def _cast(tensor: Tensor, device_type: str, dtype: torch.dtype) -> Tensor:
    is_eligible = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == device_type
    return tensor.to(dtype) if is_eligible else tensor
