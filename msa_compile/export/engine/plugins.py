"""The plugins of an engine as one table: what goes in, which numbers, what comes out; each is also an op of torch.

Two sets do the same. `SelectBlocks` and `BlockSparseAttention` are named, ordered and meant like the nodes of an ONNX
export, and run the ops of this package from Python while the engine runs. The others run without Python: each is one
launch of a Triton kernel, because that is all an ahead-of-time plugin may be. Selection and attention have two launches
each on a GPU, so there are two such plugins for each, and what lies between the launches is a tensor of the engine.

TensorRT's quick plugins take tensors first and numbers after them, every one of them always, and nothing is optional.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msa_compile.export.onnx_functions import SELECT_BLOCKS, attention_name
from msa_compile.kernels.register import LIBRARY

NAMESPACE = "msa"
# An int, a `SymInt` of torch, or a `ShapeExpr` of TensorRT; the last knows +, * and // with itself on the left.
Size = Any
Shapes = Mapping[str, Sequence[Size]]
Numbers = Mapping[str, int | float]


@dataclass(frozen=True)
class Output:
    """One result of a plugin.

    Attributes:
        shape: Its sizes.
        dtype: ``"int32"``, ``"float32"``, or the name of the input that has its dtype.
    """

    shape: tuple[Size, ...]
    dtype: str


@dataclass(frozen=True)
class Plugin:
    """One plugin.

    Attributes:
        name: In TensorRT and as an op of torch, without the namespace.
        tensors: Inputs in order.
        numbers: Attributes in order, each ``int`` or ``float``.
        outputs: Results from the shapes of the inputs, by name, and the numbers.
        run: What it computes, for one that runs from Python; ``None`` for one that is a launch.
        results: How many outputs.
    """

    name: str
    tensors: tuple[str, ...]
    numbers: Mapping[str, type]
    outputs: Callable[[Shapes, Numbers], tuple[Output, ...]]
    run: Callable[..., Tensor] | None = field(default=None, compare=False)
    results: int = 1

    @property
    def id(self) -> str:
        """The name with its namespace."""
        return f"{NAMESPACE}::{self.name}"

    @property
    def op(self) -> Any:
        """The op of torch."""
        return getattr(torch.ops.msa, self.name).default

    @property
    def is_python(self) -> bool:
        """Whether the engine needs Python to run it."""
        return self.run is not None


def blocks_of(keys: Size, block_size: int) -> Size:
    """How many blocks `keys` keys are; `//` alone, which every kind of size has."""
    return (keys + (block_size - 1)) // block_size


def mask_of(key_visible: Tensor, keys: int) -> Tensor | None:
    """The mask of the ops. One column for more keys than one says that there is no padding."""
    if key_visible.shape[1] == 1 and keys != 1:
        return None
    return key_visible[:, None, None, :]


def _select(
    index_query: Tensor,
    index_key: Tensor,
    query_start: Tensor,
    key_start: Tensor,
    key_visible: Tensor,
    block_size: int,
    topk: int,
    local_blocks: int,
    sink_blocks: int,
) -> Tensor:
    return torch.ops.msa.select_blocks(
        index_query,
        index_key,
        block_size,
        topk,
        local_blocks,
        sink_blocks,
        query_start,
        key_start,
        mask=mask_of(key_visible, index_key.shape[2]),
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    query_start: Tensor,
    key_start: Tensor,
    key_visible: Tensor,
    *rest: Any,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    block_size, scale = rest
    return torch.ops.msa.block_sparse_attention(
        query,
        key,
        value,
        block_ids,
        block_size,
        scale,
        softcap,
        sinks,
        None,
        query_start,
        key_start,
        mask=mask_of(key_visible, key.shape[2]),
    )


def _attend_with(*, softcap: bool, sinks: bool) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        given = list(args)
        options: dict[str, Any] = {"softcap": given.pop()} if softcap else {}
        if sinks:
            options["sinks"] = given.pop(7)
        return _attend(*given, **options)

    return run


_WHERE = ("query_start", "key_start", "key_visible")
# Two numbers, `Tq` and `Tk`, which a launch reads on the device.
_LENGTHS = "lengths"
_VARIANTS = [(softcap, sinks) for softcap in (False, True) for sinks in (False, True)]


def _block_ids(shapes: Shapes, numbers: Numbers) -> tuple[Output, ...]:
    return (Output((*shapes["index_query"][:3], numbers["topk"]), "int32"),)


def _like_query(shapes: Shapes, numbers: Numbers) -> tuple[Output, ...]:
    return (Output(tuple(shapes["query"]), "query"),)


def _scores(shapes: Shapes, numbers: Numbers) -> tuple[Output, ...]:
    batch, groups, queries, _ = shapes["index_query"]
    blocks = blocks_of(shapes["index_key"][2], int(numbers["block_size"]))
    return (Output((batch, groups, blocks, queries), "float32"),)


def _chosen(shapes: Shapes, numbers: Numbers) -> tuple[Output, ...]:
    batch, groups, _, queries = shapes["scores"]
    return (Output((batch, groups, queries, numbers["topk"]), "int32"),)


def _lists(shapes: Shapes, numbers: Numbers) -> tuple[Output, ...]:
    batch, groups, queries, _ = shapes["block_ids"]
    tiles = blocks_of(queries, int(numbers["queries_a_tile"]))
    listed = Output((batch, groups, tiles, numbers["list_size"]), "int32")
    return (listed, listed, Output((batch, groups, tiles), "int32"))


# What a launch cannot see: whether keys are padded, and whether queries stand elsewhere than at the end of the keys.
_FLAGS = {"is_padded": int, "is_positioned": int}
_LAUNCHES = [
    Plugin(
        "ScoreBlocks",
        ("index_query", "index_key", *_WHERE, _LENGTHS),
        {"block_size": int, "groups": int, "key_heads": int, "head_dim": int, **_FLAGS},
        _scores,
    ),
    Plugin(
        "ChooseBlocks",
        ("scores", "query_start", "key_start", _LENGTHS),
        {
            "block_size": int,
            "topk": int,
            "local_blocks": int,
            "sink_blocks": int,
            "groups": int,
            "most_blocks": int,
            **_FLAGS,
        },
        _chosen,
    ),
    Plugin(
        "ListBlocks",
        ("block_ids", "query_start", "key_start", _LENGTHS),
        {"block_size": int, "topk": int, "groups": int, "queries_a_tile": int, "list_size": int, **_FLAGS},
        _lists,
        results=3,
    ),
    *(
        Plugin(
            "AttendBlocks" + ("Softcapped" if softcap else "") + ("WithSinks" if sinks else ""),
            ("query", "key", "value", "starts", "members", "counts", *_WHERE, _LENGTHS, *["sinks"] * sinks),
            {
                "block_size": int,
                "scale": float,
                **({"softcap": float} if softcap else {}),
                "heads": int,
                "groups": int,
                "head_dim": int,
                "list_size": int,
                **_FLAGS,
            },
            _like_query,
        )
        for softcap, sinks in _VARIANTS
    ),
]
_PYTHON = [
    Plugin(
        SELECT_BLOCKS,
        ("index_query", "index_key", *_WHERE),
        {"block_size": int, "topk": int, "local_blocks": int, "sink_blocks": int},
        _block_ids,
        _select,
    ),
    *(
        Plugin(
            attention_name(softcap=softcap, sinks=sinks),
            ("query", "key", "value", "block_ids", *_WHERE, *["sinks"] * sinks),
            {"block_size": int, "scale": float, **({"softcap": float} if softcap else {})},
            _like_query,
            _attend_with(softcap=softcap, sinks=sinks),
        )
        for softcap, sinks in _VARIANTS
    ),
]
PLUGINS = {plugin.name: plugin for plugin in (*_PYTHON, *_LAUNCHES)}


def _define(plugin: Plugin) -> None:
    """Make the op of torch: what a graph holds until TensorRT takes it."""
    arguments = [f"Tensor {name}" for name in plugin.tensors]
    arguments += [f"{kind.__name__} {name}" for name, kind in plugin.numbers.items()]

    def fake(*args: Any) -> Any:
        tensors = dict(zip(plugin.tensors, args, strict=False))
        numbers = dict(zip(plugin.numbers, args[len(plugin.tensors) :], strict=True))
        outputs = plugin.outputs({name: tensor.shape for name, tensor in tensors.items()}, numbers)
        first = args[0]
        made = [
            first.new_empty(out.shape, dtype=tensors[out.dtype].dtype if out.dtype in tensors else _DTYPES[out.dtype])
            for out in outputs
        ]
        return made[0] if len(made) == 1 else tuple(made)

    returned = "Tensor" if plugin.results == 1 else f"({', '.join(['Tensor'] * plugin.results)})"
    schema = f"{plugin.name}({', '.join(arguments)}) -> {returned}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    if plugin.run is not None:
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(plugin.name, plugin.run, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(plugin.id, fake, lib=LIBRARY)


_DTYPES = {"int32": torch.int32, "float32": torch.float32}
for _plugin in PLUGINS.values():
    _define(_plugin)
