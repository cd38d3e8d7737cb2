"""What the two ops mean, as plain Python loops over float64 numbers; written from DESIGN.md 3, sharing no code."""

import math

import torch


def _where(bounds, row, query, *, query_length, key_length):
    """Return the slot of a query, its anchor, and one past the last slot that its bounds allow."""
    start = bounds.get("query_start")
    slot = (key_length - query_length if start is None else int(start[row])) + query
    anchor = 0
    if bounds.get("key_start") is not None:
        anchor = max(anchor, int(bounds["key_start"][row]))
    if bounds.get("document_start") is not None:
        anchor = max(anchor, int(bounds["document_start"][row, query]))
    end = key_length if bounds.get("key_end") is None else min(key_length, int(bounds["key_end"][row]))
    return slot, anchor, min(end, slot + 1) if bounds.get("is_causal", True) else end


def _mask_allows(mask, row, group, query, key):
    if mask is None:
        return True
    index = [0 if size == 1 else at for size, at in zip(mask.shape, (row, group, query, key), strict=True)]
    return bool(mask[tuple(index)])


def _visible_slots(bounds, row, group, query, *, query_length, key_length, window=None):
    slot, anchor, end = _where(bounds, row, query, query_length=query_length, key_length=key_length)
    first = anchor if window is None else max(anchor, slot - window + 1)
    return [key for key in range(first, end) if _mask_allows(bounds.get("mask"), row, group, query, key)]


def _dot(left, right):
    return sum(a * b for a, b in zip(left, right, strict=True))


def _to_e4m3(row):
    """Round a row to e4m3 (4 bits of exponent, 3 of mantissa), scaled by the power of two that `op.py` names."""
    if not all(map(math.isfinite, row)):
        return [math.nan] * len(row)
    largest = max(map(abs, row))
    scale = 2.0 ** (math.floor(math.log2(largest)) - 7) if largest else 1.0
    rounded = []
    for number in row:
        size = abs(number / scale)
        step = 2.0 ** (max(math.floor(math.log2(size)), -6) - 3) if size else 1.0
        rounded.append(round(number / scale / step) * step * scale)
    return rounded


def _raise(best, block, score):
    best[block] = max(best.get(block, -math.inf), -math.inf if math.isnan(score) else score)


def select_blocks(index_query, index_key, *, block_size, topk, local_blocks=1, sink_blocks=0, candidates=0, **bounds):
    """Return `[B, Hkv, Tq, topk]` int32."""
    batch, groups, query_length, _ = index_query.shape
    key_length = index_key.shape[2]
    queries, keys = index_query.double().tolist(), index_key.double().tolist()
    result = torch.full((batch, groups, query_length, topk), -1, dtype=torch.int32)
    for row in range(batch):
        for group in range(groups):
            key_head = keys[row][group if index_key.shape[1] > 1 else 0]
            for query in range(query_length):
                slot, anchor, _ = _where(bounds, row, query, query_length=query_length, key_length=key_length)
                best, rounded = {}, {}
                own = queries[row][group][query]
                for key in _visible_slots(bounds, row, group, query, query_length=query_length, key_length=key_length):
                    block = (key - anchor) // block_size
                    _raise(best, block, _dot(own, key_head[key]))
                    if candidates:
                        _raise(rounded, block, _dot(_to_e4m3(own), _to_e4m3(key_head[key])))
                local = (slot - anchor) // block_size
                forced = {local - back for back in range(local_blocks)} | set(range(sink_blocks))
                forced &= best.keys()
                if candidates:
                    first = sorted((math.inf if block in forced else rounded[block] for block in best), reverse=True)
                    least = first[:candidates][-1] if first else 0
                    best = {block: score for block, score in best.items() if block in forced or rounded[block] >= least}
                others = sorted(best.keys() - forced, key=lambda block: (-best[block], block))
                chosen = sorted(forced | set(others[: topk - len(forced)]))
                result[row, group, query, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return result


def block_sparse_attention(
    query, key, value, block_ids, *, block_size, scale=None, softcap=None, sinks=None, window=None, grad=None, **bounds
):
    """Return the output in float64 and, given `grad` of the output, the gradients of query, key, value and sinks."""
    batch, heads, query_length, head_dim = query.shape
    groups, key_length = key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    q, k, v = query.double().tolist(), key.double().tolist(), value.double().tolist()
    output = torch.zeros(query.shape, dtype=torch.float64)
    grads = [torch.zeros(tensor.shape, dtype=torch.float64) for tensor in (query, key, value)]
    grad_sinks = None if sinks is None else torch.zeros(heads, dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            group = head // (heads // groups)
            for i in range(query_length):
                _, anchor, _ = _where(bounds, row, i, query_length=query_length, key_length=key_length)
                chosen = {int(block) for block in block_ids[row, group, i] if block >= 0}
                slots = [
                    j
                    for j in _visible_slots(
                        bounds, row, group, i, query_length=query_length, key_length=key_length, window=window
                    )
                    if (j - anchor) // block_size in chosen
                ]
                if not slots:
                    continue
                raw = [scale * _dot(q[row][head][i], k[row][group][j]) for j in slots]
                logits = raw if softcap is None else [softcap * math.tanh(x / softcap) for x in raw]
                sink = -math.inf if sinks is None else float(sinks[head])
                top = max(*logits, sink) if len(logits) > 1 else max(logits[0], sink)
                total = sum(math.exp(x - top) for x in logits) + math.exp(sink - top)
                weights = [math.exp(x - top) / total for x in logits]
                result = [
                    sum(w * v[row][group][j][d] for w, j in zip(weights, slots, strict=True)) for d in range(head_dim)
                ]
                output[row, head, i] = torch.tensor(result, dtype=torch.float64)
                if grad is None:
                    continue
                outer = grad[row, head, i].double().tolist()
                mean = _dot(outer, result)
                for x, w, j in zip(raw, weights, slots, strict=True):
                    slope = w * (_dot(outer, v[row][group][j]) - mean)
                    if softcap is not None:
                        slope /= math.cosh(x / softcap) ** 2
                    grads[0][row, head, i] += slope * scale * key[row, group, j].double()
                    grads[1][row, group, j] += slope * scale * query[row, head, i].double()
                    grads[2][row, group, j] += w * grad[row, head, i].double()
                if grad_sinks is not None:
                    grad_sinks[head] -= math.exp(sink - top) / total * mean
    return output if grad is None else (output, *grads, grad_sinks)
