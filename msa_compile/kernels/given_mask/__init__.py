"""A mask that has no closed form, made usable by the other ops: checked visibility, and the positions it implies."""

from msa_compile.kernels.given_mask.op import mask_positions, visible

__all__ = ["mask_positions", "visible"]
