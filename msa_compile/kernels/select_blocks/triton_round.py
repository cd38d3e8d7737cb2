"""The Triton kernel that rounds index keys to e4m3, each by a scale of its own, and the rounding that queries share."""

import triton
import triton.language as tl

# A row is scaled so that its largest number lies between 128 and 256, of the 448 that e4m3 reaches.
_EXPONENT = tl.constexpr(7)
# Exponents of a scale and of its inverse add up to twice the bias of float32; that of a scale is lower by the above.
_SUM = tl.constexpr(2 * 127 + 7)
# Exponents, with their bias, from which on a scale is a normal number.
_LEAST_EXPONENT = tl.constexpr(8)


@triton.jit
def round_rows(rows):
    """Return `rows` divided by their scales, in e4m3, and the scales, powers of two in float32.

    A row that is not finite becomes NaN.
    """
    wide = rows.to(tl.float32)
    size = tl.abs(wide)
    is_broken = tl.max(tl.where(size < float("inf"), 0, 1), 1) != 0
    bits = tl.max(tl.where(size < float("inf"), size, 0.0), 1).to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits >> 23, _LEAST_EXPONENT)
    scale = ((exponent - _EXPONENT) << 23).to(tl.float32, bitcast=True)
    inverse = ((-exponent + _SUM) << 23).to(tl.float32, bitcast=True)
    inverse = tl.where(is_broken, float("nan"), inverse)
    return (wide * inverse[:, None]).to(tl.float8e4nv), scale


@triton.jit(do_not_specialize=["key_length"])
def round_keys(
    index_key,
    rounded,
    scales,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    key_length,
    key_heads,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write index keys in e4m3 and their scales; a program has `ROWS` keys of one head.

    Args:
        index_key: `[B, H, Tk, WIDTH]`, strides given, channels adjacent.
        rounded: `[B, H, Tk, WIDTH]` e4m3, contiguous.
        scales: `[B, H, Tk]` float32, contiguous.
        key_heads: `H`.
    """
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH_TILE)
    is_key = slot < key_length
    is_number = is_key[:, None] & (channel < WIDTH)[None, :]
    place = index_key + head // key_heads * key_stride_b + head % key_heads * key_stride_h + slot * key_stride_t
    keys, scale = round_rows(tl.load(place[:, None] + channel[None, :], mask=is_number, other=0.0))
    stored = head * key_length + slot
    tl.store(rounded + stored[:, None] * WIDTH + channel[None, :], keys, mask=is_number)
    tl.store(scales + stored, scale, mask=is_key)
