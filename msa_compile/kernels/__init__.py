"""The two operations of MiniMax Sparse Attention: choose key blocks, then attend to them.

Importing this package registers the ops `msa::select_blocks`, `msa::block_sparse_attention` and
`msa::block_sparse_attention_backward` with torch, and does nothing else.
"""

from msa_compile.kernels.block_sparse_attention import block_sparse_attention
from msa_compile.kernels.select_blocks import select_blocks

__all__ = ["block_sparse_attention", "select_blocks"]
