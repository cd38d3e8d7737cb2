"""What the Triton kernels of attention say in the same words: a logit, and a step of the online softmax."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def capped_logits(dot, scale, softcap):
    """Return the logits in units of log 2, capped where `softcap` is not None."""
    logits = dot * scale
    if softcap is not None:
        # tanh by the exponential of a negative number, which cannot overflow.
        size = tl.abs(logits / softcap)
        power = tl.exp(-2.0 * size)
        bound = softcap * (1.0 - power) / (1.0 + power)
        # NaN stays NaN: it fails the comparison, and the bound is NaN as well.
        logits = tl.where(logits < 0, -bound, bound)
    return logits * LOG2_E


@triton.jit
def through_cap(slope, logits, softcap):
    """Return the derivative by the logit before the cap, given that by the capped one, `logits` in units of log 2."""
    if softcap is not None:
        share = logits / (LOG2_E * softcap)
        slope = slope * (1.0 - share * share)
    return slope


@triton.jit
def weigh(logits, visible, total, highest):
    """Take logits in units of log 2 into the online softmax of each row; return `weights, shrink, total, highest`.

    What a row has accumulated before has to be multiplied by its `shrink`.
    """
    logits = tl.where(visible, logits, float("-inf"))
    higher = tl.maximum(highest, tl.max(logits, 1))
    # A row that has seen nothing has -inf here, and -inf minus -inf is NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(highest - base)
    return weights, shrink, total * shrink + tl.sum(weights, 1), higher


@triton.jit
def add_sink(sink, total, highest):
    """Take one more logit a row, that has no value, into the softmax; return `shrink, total, highest`."""
    sink = sink.to(tl.float32) * LOG2_E
    higher = tl.maximum(highest, sink)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(highest - base)
    return shrink, total * shrink + tl.exp2(sink - base), higher
