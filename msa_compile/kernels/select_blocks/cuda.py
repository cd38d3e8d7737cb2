"""What block selection runs on a CUDA device: Triton kernels, and the reference where there are none.

There are none for float64, the precision of the specification, and none on a device that `triton_support.py` names.
"""

from typing import Any

import torch
from torch import Tensor

from msa_compile.errors import KernelArgumentError
from msa_compile.kernels.select_blocks import reference
from msa_compile.kernels.select_blocks.e4m3 import from_e4m3
from msa_compile.kernels.triton_support import can_run_triton, why_no_e4m3


def select_blocks(index_query: Tensor, index_key: Tensor, **options: Any) -> Tensor:
    """Choose key blocks by the best visible token of each; as in `op.py`."""
    if index_query.dtype == torch.float64 or not can_run_triton(index_query.device):
        if index_key.dtype == torch.uint8:
            index_key = from_e4m3(index_key, index_query.dtype)
        return reference.select_blocks(index_query, index_key, **options)
    refused = why_no_e4m3(index_query.device) if options.get("candidates") else None
    if refused is not None:
        raise KernelArgumentError(f'index_scores: found "fp8"; legal is "exact" here: {refused}')
    # Imported by the first call: importing the package loads no optional package.
    from msa_compile.kernels.select_blocks import triton

    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(index_query):
        return triton.select_blocks(index_query, index_key, **options)
