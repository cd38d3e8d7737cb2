"""Choose the key blocks that each query and group attends to."""

from msa_compile.kernels.select_blocks import at_positions  # noqa: F401  (registers its op)
from msa_compile.kernels.select_blocks.e4m3 import nan_in
from msa_compile.kernels.select_blocks.fresh import missed_selections
from msa_compile.kernels.select_blocks.op import select_blocks

__all__ = ["missed_selections", "nan_in", "select_blocks"]
