"""Exact softmax attention over the key blocks selected for each query and group."""

from msa_compile.kernels.block_sparse_attention.op import block_sparse_attention

__all__ = ["block_sparse_attention"]
