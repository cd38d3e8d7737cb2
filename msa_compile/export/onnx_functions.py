"""The bodies of `msa::SelectBlocks` and `msa::BlockSparseAttention` in standard ONNX operators.

A runtime that knows neither operator inlines these; one that has a plugin of the name runs the plugin. Both go through
the queries in chunks, so that no tensor grows with `Tq * Tk`. Attention gathers, for a chunk and a group, the union of
the blocks that its queries chose, and masks what a query did not choose; a decode step reads no other key.

    SelectBlocks(index_query [B, Hkv, Tq, D], index_key [B, Hkv or 1, Tk, D], query_start [B], key_start [B],
                 key_visible [B, Tk]) -> block_ids [B, Hkv, Tq, topk] int32
    BlockSparseAttention(query [B, Hq, Tq, D], key, value [B, Hkv, Tk, D], block_ids, query_start [B], key_start [B],
                         key_visible [B, Tk], sinks [Hq] in the variants that have them) -> [B, Hq, Tq, D]

Meaning and arguments are those of the ops in `msa_compile.kernels`; `key_visible` is a mask `[B, 1, 1, Tk]`. Scores are
float32 and taken to be finite.
"""

from __future__ import annotations

from typing import Any

DOMAIN = "msa"
SELECT_BLOCKS = "SelectBlocks"
BLOCK_SPARSE_ATTENTION = "BlockSparseAttention"

# Elements of the largest tensor of a chunk of queries.
WORKSPACE = 1 << 25

# Vectors of one number are what Concat and Reshape take, and they broadcast like numbers.
_NUMBERS = """
    zero = Constant <value_ints: ints = [0]> ()
    one = Constant <value_ints: ints = [1]> ()
    rest = Constant <value_ints: ints = [-1]> ()
    two = Constant <value_ints: ints = [2]> ()
    number = Constant <value_int: int = 0> ()
    step = Constant <value_int: int = 1> ()
    workspace = Constant <value_ints: ints = [WORKSPACE]> ()
    always = Constant <value = bool {1}> ()
    block_number = Constant <value_int: int = @block_size> ()
    block = Reshape (block_number, one)
    within = Range (number, block_number, step)
"""

# Where queries stand, and the runs of them that are done together: `width` tokens for each of `rows_a_query` rows.
_CHUNKS = """
    queries_number = Squeeze (queries)
    steps = Range (number, queries_number, step)
    start = Unsqueeze (query_start, one)
    slot_of_query = Add (start, steps)
    cost = Mul (rows_a_query, width)
    affordable = Div (workspace, cost)
    at_most = Min (affordable, queries)
    chunk = Max (at_most, one)
    chunk_1 = Sub (chunk, one)
    queries_1 = Sub (queries, one)
    queries_up = Add (queries, chunk_1)
    trips = Div (queries_up, chunk)
    trips_number = Squeeze (trips)
    chunk_number = Squeeze (chunk)
    in_chunk = Range (number, chunk_number, step)
"""

# Slots are counted from the anchor of the row, so that block n is the slots n * block_size and on.
_SELECT = """
<domain: "msa", opset_import: ["" : OPSET]>
SelectBlocks <block_size, topk, local_blocks, sink_blocks>
    (index_query, index_key, query_start, key_start, key_visible) => (block_ids)
{
    NUMBERS
    topk_number = Constant <value_int: int = @topk> ()
    places = Reshape (topk_number, one)
    local_number = Constant <value_int: int = @local_blocks> ()
    sink_number = Constant <value_int: int = @sink_blocks> ()
    nothing = Constant <value_float: float = -inf> ()
    everything = Constant <value_float: float = inf> ()
    lowest = Constant <value_float: float = -3.4028235e38> ()
    highest = Constant <value_float: float = 3.4028235e38> ()

    batch = Shape <start: int = 0, end: int = 1> (index_query)
    groups = Shape <start: int = 1, end: int = 2> (index_query)
    queries = Shape <start: int = 2, end: int = 3> (index_query)
    dim = Shape <start: int = 3, end: int = 4> (index_query)
    key_heads = Shape <start: int = 1, end: int = 2> (index_key)
    keys = Shape <start: int = 2, end: int = 3> (index_key)
    block_1 = Sub (block, one)
    keys_1 = Sub (keys, one)
    keys_up = Add (keys, block_1)
    full = Div (keys_up, block)
    blocks = Max (full, places)
    width = Mul (blocks, block)
    width_number = Squeeze (width)
    offsets = Range (number, width_number, step)
    blocks_number = Squeeze (blocks)
    ids = Range (number, blocks_number, step)

    anchor_B = Max (key_start, zero)
    anchor = Unsqueeze (anchor_B, one)
    slots = Add (anchor, offsets)
    is_key = Less (slots, keys)
    clipped = Min (slots, keys_1)
    may_see = GatherElements <axis: int = 1> (key_visible, clipped)
    is_seen_BW = And (is_key, may_see)
    is_seen = Unsqueeze (is_seen_BW, one)
    heads = Mul (batch, key_heads)
    heads_number = Squeeze (heads)
    head = Range (number, heads_number, step)
    first_row = Mul (head, keys)
    to_rows = Concat <axis: int = 0> (batch, key_heads, one)
    first_row_BH1 = Reshape (first_row, to_rows)
    clipped_B1W = Unsqueeze (clipped, one)
    key_rows = Add (first_row_BH1, clipped_B1W)
    to_table = Concat <axis: int = 0> (rest, dim)
    table = Reshape (index_key, to_table)
    laid_out = Gather <axis: int = 0> (table, key_rows)
    laid_out_32 = Cast <to: int = 1> (laid_out)
    keys_BHDW = Transpose <perm: ints = [0, 1, 3, 2]> (laid_out_32)

    rows_a_query = Mul (batch, groups)
    CHUNKS
    position = Sub (slot_of_query, anchor)
    to_blocks = Concat <axis: int = 0> (batch, groups, chunk, blocks, block)

    by_chunk = Loop (trips_number, always) <body = select_chunk
        (int64 trip, bool go_on) => (bool again, int64[?, ?, ?, ?] chosen)
    {
        again = Identity (go_on)
        first = Mul (trip, chunk)
        unclipped_rows = Add (first, in_chunk)
        rows = Min (unclipped_rows, queries_1)
        query = Gather <axis: int = 2> (index_query, rows)
        query_32 = Cast <to: int = 1> (query)
        scores = MatMul (query_32, keys_BHDW)
        position_BC = Gather <axis: int = 1> (position, rows)
        position_BC1 = Unsqueeze (position_BC, two)
        is_before = LessOrEqual (offsets, position_BC1)
        is_visible_BCW = And (is_before, is_seen)
        is_visible = Unsqueeze (is_visible_BCW, one)
        visible_scores = Where (is_visible, scores, nothing)
        by_block = Reshape (visible_scores, to_blocks)
        best = ReduceMax <keepdims: int = 0> (by_block, rest)
        is_empty = LessOrEqual (best, nothing)
        finite = Clip (best, lowest, highest)
        local = Div (position_BC1, block)
        is_not_after = LessOrEqual (ids, local)
        oldest = Sub (local, local_number)
        is_near = Greater (ids, oldest)
        is_local = And (is_not_after, is_near)
        is_sink = Less (ids, sink_number)
        is_forced_BCN = Or (is_local, is_sink)
        is_forced = Unsqueeze (is_forced_BCN, one)
        ranked = Where (is_forced, everything, finite)
        rank = Where (is_empty, nothing, ranked)
        values, picked = TopK (rank, places)
        is_left_over = LessOrEqual (values, nothing)
        with_end = Where (is_left_over, blocks, picked)
        ascending, order = TopK <largest: int = 0> (with_end, places)
        is_end = Equal (ascending, blocks)
        chosen = Where (is_end, rest, ascending)
    }>
    together = Transpose <perm: ints = [1, 2, 0, 3, 4]> (by_chunk)
    to_queries = Concat <axis: int = 0> (batch, groups, rest, places)
    with_repeats = Reshape (together, to_queries)
    of_queries = Slice (with_repeats, zero, queries, two)
    block_ids = Cast <to: int = 6> (of_queries)
}
"""

_ATTENTION = """
<domain: "msa", opset_import: ["" : OPSET]>
NAME <ATTRIBUTES>
    (INPUTS) => (output)
{
    NUMBERS
    scale_number = Constant <value_float: float = @scale> ()
    hidden = Constant <value_float: float = -3.4028235e38> ()
    nothing = Constant <value_float: float = 0.0> ()
    present = Constant <value_float: float = 1.0> ()
    three = Constant <value_ints: ints = [3]> ()
    to_column = Constant <value_ints: ints = [-1, 1, 1, 1]> ()

    batch = Shape <start: int = 0, end: int = 1> (query)
    heads = Shape <start: int = 1, end: int = 2> (query)
    queries = Shape <start: int = 2, end: int = 3> (query)
    dim = Shape <start: int = 3, end: int = 4> (query)
    groups = Shape <start: int = 1, end: int = 2> (key)
    keys = Shape <start: int = 2, end: int = 3> (key)
    heads_a_group = Div (heads, groups)
    block_1 = Sub (block, one)
    keys_1 = Sub (keys, one)
    keys_up = Add (keys, block_1)
    blocks = Div (keys_up, block)
    blocks_and_end = Add (blocks, one)
    to_table = Concat <axis: int = 0> (rest, dim)
    key_table = Reshape (key, to_table)
    value_table = Reshape (value, to_table)
    may_see = Reshape (key_visible, rest)

    key_heads = Mul (batch, groups)
    key_heads_number = Squeeze (key_heads)
    key_head = Range (number, key_heads_number, step)
    to_heads = Concat <axis: int = 0> (batch, groups, one)
    key_head_BH1 = Reshape (key_head, to_heads)
    first_row = Mul (key_head_BH1, keys)
    row_of_batch = Div (key_head_BH1, groups)
    first_of_batch = Mul (row_of_batch, keys)

    anchor_B = Max (key_start, zero)
    anchor = Reshape (anchor_B, to_column)
    width = Mul (blocks, block)
    rows_a_query = Mul (batch, heads)
    CHUNKS
    rows_a_group = Mul (heads_a_group, chunk)
    to_groups = Concat <axis: int = 0> (batch, groups, rows_a_group, dim)
    to_scores = Concat <axis: int = 0> (batch, groups, heads_a_group, chunk, rest)
    to_products = Concat <axis: int = 0> (batch, groups, rows_a_group, rest)
    to_output = Concat <axis: int = 0> (batch, groups, heads_a_group, chunk, dim)
    to_chunk = Concat <axis: int = 0> (batch, heads, chunk, dim)
    to_members = Concat <axis: int = 0> (batch, groups, chunk, blocks_and_end)
    to_slots = Concat <axis: int = 0> (batch, groups, rest)
    to_visible = Concat <axis: int = 0> (batch, groups, chunk, rest)
    SINKS

    by_chunk = Loop (trips_number, always) <body = attend_chunk
        (int64 trip, bool go_on) => (bool again, float[?, ?, ?, ?] attended)
    {
        again = Identity (go_on)
        first = Mul (trip, chunk)
        unclipped_rows = Add (first, in_chunk)
        rows = Min (unclipped_rows, queries_1)

        ids_32 = Gather <axis: int = 2> (block_ids, rows)
        given_ids = Cast <to: int = 7> (ids_32)
        is_none = Less (given_ids, zero)
        ids = Where (is_none, blocks, given_ids)
        ids_shape = Shape (ids)
        marks = Expand (present, ids_shape)
        unmarked = Expand (nothing, to_members)
        marked = ScatterElements <axis: int = 3> (unmarked, ids, marks)
        members = Slice (marked, zero, blocks, three)
        wanted = ReduceMax <keepdims: int = 0> (members, two)
        counts = ReduceSum <keepdims: int = 0> (wanted, two)
        most = ReduceMax <keepdims: int = 0> (counts)
        most_number = Cast <to: int = 7> (most)
        at_least_one = Max (most_number, one)
        union = Min (at_least_one, blocks)
        flags, listed = TopK (wanted, union)
        listed_BH1U = Unsqueeze (listed, two)
        to_listed = Concat <axis: int = 0> (batch, groups, chunk, union)
        listed_BHCU = Expand (listed_BH1U, to_listed)
        is_member_32 = GatherElements <axis: int = 3> (members, listed_BHCU)
        is_member_BHCU = Greater (is_member_32, nothing)
        is_member_BHCU1 = Unsqueeze (is_member_BHCU, rest)
        to_tokens = Concat <axis: int = 0> (batch, groups, chunk, union, block)
        is_member_tokens = Expand (is_member_BHCU1, to_tokens)
        is_member = Reshape (is_member_tokens, to_visible)

        block_start = Mul (listed, block)
        block_start_BHU1 = Unsqueeze (block_start, rest)
        from_anchor = Add (block_start_BHU1, within)
        slots_BHUW = Add (from_anchor, anchor)
        slots = Reshape (slots_BHUW, to_slots)
        is_key = Less (slots, keys)
        clipped = Min (slots, keys_1)
        in_visible = Add (first_of_batch, clipped)
        may_see_slot = Gather <axis: int = 0> (may_see, in_visible)
        is_seen = And (is_key, may_see_slot)
        is_seen_BH1S = Unsqueeze (is_seen, two)
        slots_BH1S = Unsqueeze (slots, two)
        position_BC = Gather <axis: int = 1> (slot_of_query, rows)
        position_B1C = Unsqueeze (position_BC, one)
        position_B1C1 = Unsqueeze (position_B1C, rest)
        is_before = LessOrEqual (slots_BH1S, position_B1C1)
        is_allowed = And (is_before, is_seen_BH1S)
        is_visible = And (is_member, is_allowed)

        key_rows = Add (first_row, clipped)
        keys_of_union = Gather <axis: int = 0> (key_table, key_rows)
        keys_32 = Cast <to: int = 1> (keys_of_union)
        keys_BHDS = Transpose <perm: ints = [0, 1, 3, 2]> (keys_32)
        values_of_union = Gather <axis: int = 0> (value_table, key_rows)
        values_32 = Cast <to: int = 1> (values_of_union)
        query_of_chunk = Gather <axis: int = 2> (query, rows)
        query_32 = Cast <to: int = 1> (query_of_chunk)
        scaled = Mul (query_32, scale_number)
        query_rows = Reshape (scaled, to_groups)
        products = MatMul (query_rows, keys_BHDS)
        SOFTCAP
        scores = Reshape (LOGITS, to_scores)
        is_visible_BH1CS = Unsqueeze (is_visible, two)
        visible_scores = Where (is_visible_BH1CS, scores, hidden)
        SOFTMAX
        weight_rows = Reshape (weights, to_products)
        mixed = MatMul (weight_rows, values_32)
        mixed_BHGCD = Reshape (mixed, to_output)
        visible_32 = Cast <to: int = 1> (is_visible_BH1CS)
        sees = ReduceMax (visible_32, rest)
        sees_something = Greater (sees, nothing)
        or_zero = Where (sees_something, mixed_BHGCD, nothing)
        attended = Reshape (or_zero, to_chunk)
    }>
    together = Transpose <perm: ints = [1, 2, 0, 3, 4]> (by_chunk)
    to_queries = Concat <axis: int = 0> (batch, heads, rest, dim)
    with_repeats = Reshape (together, to_queries)
    of_queries = Slice (with_repeats, zero, queries, two)
    output = CastLike (of_queries, query)
}
"""

_SOFTCAP = """
        cap = Constant <value_float: float = @softcap> ()
"""
_CAPPED = """
        in_caps = Div (products, cap)
        bounded = Tanh (in_caps)
        logits = Mul (bounded, cap)
"""
_SINKS = """
    sinks_32 = Cast <to: int = 1> (sinks)
    to_sinks = Concat <axis: int = 0> (one, groups, heads_a_group, one, one)
    sink = Reshape (sinks_32, to_sinks)
"""
_SINK_SOFTMAX = """
        best = ReduceMax (visible_scores, rest)
        shift = Max (best, sink)
        from_shift = Sub (visible_scores, shift)
        powers = Exp (from_shift)
        of_keys = ReduceSum (powers, rest)
        sink_from_shift = Sub (sink, shift)
        of_sink = Exp (sink_from_shift)
        mass = Add (of_keys, of_sink)
        weights = Div (powers, mass)
"""


def attention_name(*, softcap: bool, sinks: bool) -> str:
    """The operator's name; one with a softcap or with sinks has a name of its own, because its body is another."""
    return BLOCK_SPARSE_ATTENTION + ("Softcapped" if softcap else "") + ("WithSinks" if sinks else "")


def select_blocks_function(opset: int, *, workspace: int = WORKSPACE) -> Any:
    """`msa::SelectBlocks` as an `onnx.FunctionProto` over ONNX `opset`; `workspace` in elements."""
    return _parse(_SELECT, opset, workspace)


def attention_function(opset: int, *, softcap: bool, sinks: bool, workspace: int = WORKSPACE) -> Any:
    """`msa::BlockSparseAttention`, or the variant of it, as an `onnx.FunctionProto` over ONNX `opset`."""
    inputs = ["query", "key", "value", "block_ids", "query_start", "key_start", "key_visible", *["sinks"] * sinks]
    parts = {
        "NAME": attention_name(softcap=softcap, sinks=sinks),
        "ATTRIBUTES": ", ".join(["block_size", "scale", *["softcap"] * softcap]),
        "INPUTS": ", ".join(inputs),
        "SINKS": (_SINKS if sinks else "") + (_SOFTCAP if softcap else ""),
        "SOFTCAP": _CAPPED if softcap else "",
        "LOGITS": "logits" if softcap else "products",
        "SOFTMAX": _SINK_SOFTMAX if sinks else "weights = Softmax <axis: int = -1> (visible_scores)",
    }
    text = _ATTENTION
    for name, part in parts.items():
        text = text.replace(name, part)
    return _parse(text, opset, workspace)


def _parse(text: str, opset: int, workspace: int) -> Any:
    import onnx.parser

    parts = {"NUMBERS": _NUMBERS, "CHUNKS": _CHUNKS, "WORKSPACE": str(workspace), "OPSET": str(opset)}
    for name, part in parts.items():
        text = text.replace(name, part)
    return onnx.parser.parse_function(text)
