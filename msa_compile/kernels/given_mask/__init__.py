"""A mask that has no closed form: the visibility in it, the positions it implies, and attention if it is a bias."""

from msa_compile.kernels.given_mask.bias import biased_calls, exact_where_biased
from msa_compile.kernels.given_mask.op import mask_positions, visible
from msa_compile.kernels.given_mask.sees_nothing import mean_if_any, sees_nothing

__all__ = ["biased_calls", "exact_where_biased", "mask_positions", "mean_if_any", "sees_nothing", "visible"]
