"""What block-sparse attention runs on a CUDA device: Triton kernels, and the reference where there are none.

There are none for float64, the precision of the specification, and none on a device that `triton_support.py` names.
"""

from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.block_sparse_attention import reference
from msa_compile.kernels.block_sparse_attention.reference import Gradients
from msa_compile.kernels.triton_support import can_run_triton

__all__ = ["block_sparse_attention", "block_sparse_attention_backward"]


def block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, block_ids: Tensor, **options: Any) -> Tensor:
    """Attend to the visible tokens of the selected blocks; as in `op.py`."""
    if query.dtype == torch.float64 or not can_run_triton(query.device):
        return reference.block_sparse_attention(query, key, value, block_ids, **options)
    # Imported by the first call: importing the package loads no optional package.
    from msa_compile.kernels.block_sparse_attention import triton

    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(query):
        return triton.block_sparse_attention(query, key, value, block_ids, **options)


def block_sparse_attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, block_ids: Tensor, **options: Any
) -> Gradients:
    """Differentiate `block_sparse_attention`, recomputing its softmax; `grad_output` is `[B, Hq, Tq, D]`."""
    if query.dtype == torch.float64 or not can_run_triton(query.device):
        return reference.block_sparse_attention_backward(grad_output, query, key, value, block_ids, **options)
    from msa_compile.kernels.block_sparse_attention import triton_backward

    with torch.cuda.device_of(query):
        return triton_backward.block_sparse_attention_backward(grad_output, query, key, value, block_ids, **options)
