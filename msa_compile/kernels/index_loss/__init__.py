"""The loss that teaches index scores what attention looks at."""

from msa_compile.kernels.index_loss.op import index_loss

__all__ = ["index_loss"]
