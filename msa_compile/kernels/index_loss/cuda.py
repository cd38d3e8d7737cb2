"""Where the index loss has Triton kernels: on CUDA devices, and not for float64, the precision of the specification."""

import torch
from torch import Tensor

from msa_compile.kernels.triton_support import can_run_triton


def has_kernels(*tensors: Tensor) -> bool:
    """Whether the kernels run for these operands; on a device that could have them and does not, warn once."""
    device = tensors[0].device
    if device.type != "cuda" or any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    return can_run_triton(device)
