"""From a sparse program to an ONNX model: each attention is two nodes that have a body of standard operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from msa_compile.errors import CaptureError, ExportNotSparseError
from msa_compile.export import onnx_functions as bodies
from msa_compile.export.positions import ATTEND, SELECT
from msa_compile.export.records import SparseProgram, name_size

# 23 is the first with Attention, RMSNormalization and RotaryEmbedding; TensorScatter came with 24.
OPSET, OPSET_WITH_SCATTER = 23, 24
# TensorRT's parser prefers a plugin to the local function of the same name where a node says its namespace.
PLUGIN_NAMESPACE = "msa"
_WRITE = torch.ops.msa.write_cache.default


def to_onnx(sparse: SparseProgram) -> tuple[Any, int]:
    """An `onnx_ir.Model` and its opset.

    Args:
        sparse: The program; its msa ops have no argument that the operators lack, see `check_arguments`.
    """
    check_arguments(sparse)
    targets = {node.target for node in sparse.program.graph.nodes}
    opset = OPSET_WITH_SCATTER if _WRITE in targets else OPSET
    with warnings.catch_warnings():
        # What torch and onnxscript say to each other about their own versions.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            made = torch.onnx.export(
                sparse.program,
                dynamo=True,
                opset_version=opset,
                input_names=[port.name for port in sparse.inputs],
                output_names=[port.name for port in sparse.outputs],
                custom_translation_table=_translations(opset),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise CaptureError(
                f"the ONNX exporter of torch cannot write an operation of the model, outside of its attention: {cause}"
            ) from error
    assert made is not None, "the dynamo exporter returns a program"
    model = made.model
    _add_bodies(model, sparse, opset)
    _match_rotary_batch(model)
    _name_sizes(model, sparse.symbols)
    return model, opset


def check_arguments(sparse: SparseProgram) -> None:
    """Refuse attention whose mask is more than what the operators take.

    Raises:
        ExportNotSparseError: Naming the first such site.
    """
    known = {"block_size", "topk", "local_blocks", "sink_blocks", "candidates", "dense_below"}
    known |= {"scale", "softcap", "sinks"}
    for node in sparse.program.graph.nodes:
        if node.target is torch.ops.msa.exact_where_biased.default:
            raise ExportNotSparseError(
                "a float mask that is handed in may be a bias, and an artifact cannot tell at run time. Give the "
                "model a boolean mask, or none."
            )
        if node.target not in (SELECT, ATTEND):
            continue
        mask = node.kwargs.get("mask")
        is_row = mask is None or (mask.meta["val"].shape[1] == 1 and mask.meta["val"].shape[2] == 1)
        other = {name for name, value in node.kwargs.items() if value is not None} - known
        if not is_row or not other <= {"query_start", "key_start", "mask"}:
            where = node.meta.get("nn_module_stack") or {}
            path = list(where.values())[-1][0] if where else ""
            raise ExportNotSparseError(
                f"{path or '<root>'} has a mask that is known at run time only: an exported attention is causal, with "
                "padded keys at most. Let the model make its own causal mask (give no mask), or exclude the site."
            )


def _translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """How the exporter writes each msa op."""
    import onnx
    from onnxscript import values

    # Not onnxscript's own module of the opset: it has none of the newest.
    op: Any = values.Opset("", opset)
    domain = values.Opset(bodies.DOMAIN, 1)
    true = onnx.helper.make_tensor("true", onnx.TensorProto.BOOL, [], [1])

    def positions(query: Any, key: Any, query_start: Any, key_start: Any, mask: Any) -> tuple[Any, Any, Any]:
        batch = op.Shape(query, start=0, end=1)
        keys = op.Shape(key, start=2, end=3)
        if query_start is None:
            query_start = op.Expand(op.Sub(keys, op.Shape(query, start=2, end=3)), batch)
        if key_start is None:
            key_start = op.Expand(op.Constant(value_int=0), batch)
        every = op.Concat(batch, keys, axis=0)
        visible = op.Constant(value=true) if mask is None else op.Squeeze(mask, op.Constant(value_ints=[1, 2]))
        return query_start, key_start, op.Expand(visible, every)

    def select_blocks(
        index_query: Any,
        index_key: Any,
        block_size: int,
        topk: int,
        local_blocks: int = 1,
        sink_blocks: int = 0,
        query_start: Any = None,
        key_start: Any = None,
        key_end: Any = None,
        document_start: Any = None,
        mask: Any = None,
        dense_below: int = 0,
        is_causal: bool = True,
        candidates: int = 0,
    ) -> Any:
        node = values.Op(domain, bodies.SELECT_BLOCKS, _schema(bodies.select_blocks_function(opset)))
        return node(
            index_query,
            index_key,
            *positions(index_query, index_key, query_start, key_start, mask),
            block_size=block_size,
            topk=topk,
            local_blocks=local_blocks,
            sink_blocks=sink_blocks,
            plugin_namespace=PLUGIN_NAMESPACE,
        )

    def attention(
        query: Any,
        key: Any,
        value: Any,
        block_ids: Any,
        block_size: int,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Any = None,
        window: int | None = None,
        query_start: Any = None,
        key_start: Any = None,
        key_end: Any = None,
        document_start: Any = None,
        mask: Any = None,
        dense_below: int = 0,
        is_causal: bool = True,
    ) -> Any:
        assert scale is not None, "the rewrite always says the scale"
        variant = {"softcap": softcap is not None, "sinks": sinks is not None}
        node = values.Op(domain, bodies.attention_name(**variant), _schema(bodies.attention_function(opset, **variant)))
        return node(
            query,
            key,
            value,
            block_ids,
            *positions(query, key, query_start, key_start, mask),
            *([] if sinks is None else [sinks]),
            block_size=block_size,
            scale=scale,
            plugin_namespace=PLUGIN_NAMESPACE,
            **({} if softcap is None else {"softcap": softcap}),
        )

    def write_cache(cache: Any, update: Any, position: Any) -> Any:
        return op.TensorScatter(cache, update, position, axis=-2, mode="linear")

    return {SELECT: select_blocks, ATTEND: attention, _WRITE: write_cache}


_DTYPES = {
    "query_start": "tensor(int64)",
    "key_start": "tensor(int64)",
    "key_visible": "tensor(bool)",
    "block_ids": "tensor(int32)",
}


def _schema(function: Any) -> Any:
    """The schema of an operator by its body, so that the exporter can place a node of it; registered nowhere."""
    from onnx.defs import OpSchema

    def places(names: Any) -> list[Any]:
        return [OpSchema.FormalParameter(name, _DTYPES.get(name, "T")) for name in names]

    kinds = {name: OpSchema.AttrType.FLOAT if name in ("scale", "softcap") else OpSchema.AttrType.INT
             for name in function.attribute}  # fmt: skip
    return OpSchema(
        function.name,
        bodies.DOMAIN,
        1,
        inputs=places(function.input),
        outputs=places(function.output),
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "what the model runs in")],
        attributes=[
            *(OpSchema.Attribute(name, kind, required=True) for name, kind in kinds.items()),
            OpSchema.Attribute("plugin_namespace", OpSchema.AttrType.STRING, required=False),
        ],
    )


def _add_bodies(model: Any, sparse: SparseProgram, opset: int) -> None:
    import onnx_ir

    functions = [bodies.select_blocks_function(opset)]
    attentions = [node.kwargs for node in sparse.program.graph.nodes if node.target is ATTEND]
    variants = {(given.get("softcap") is not None, given.get("sinks") is not None) for given in attentions}
    functions += [bodies.attention_function(opset, softcap=softcap, sinks=sinks) for softcap, sinks in sorted(variants)]
    for proto in functions:
        function = onnx_ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
    model.opset_imports[bodies.DOMAIN] = 1


def _match_rotary_batch(model: Any) -> None:
    """Give the angles of each `RotaryEmbedding` the batch of what they rotate.

    The exporter fuses a rotation whose angles have one row for the whole batch, and the operator asks for a row each.
    """
    import onnx_ir as ir

    for node in [node for node in model.graph if node.op_type == "RotaryEmbedding" and node.domain == ""]:
        rotated, *angles = node.inputs[:3]
        batch = ir.node("Shape", [rotated], attributes={"start": 0, "end": 1})
        ones = ir.node("Constant", [], attributes={"value_ints": [1, 1]})
        shape = ir.node("Concat", [batch.outputs[0], ones.outputs[0]], attributes={"axis": 0})
        model.graph.insert_before(node, [batch, ones, shape])
        for place, angle in enumerate(angles, start=1):
            expanded = ir.node("Expand", [angle, shape.outputs[0]])
            model.graph.insert_before(node, [expanded])
            node.replace_input_with(place, expanded.outputs[0])


def _name_sizes(model: Any, symbols: Mapping[str, str]) -> None:
    """Call the open sizes by the names of their ranges."""
    import onnx_ir as ir

    values = [*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_named(dim, symbols) for dim in value.shape])


def _named(dim: Any, symbols: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return None if dim.value is None else name_size(dim.value, symbols)
