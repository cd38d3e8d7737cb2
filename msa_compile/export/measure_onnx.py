"""The size of every tensor of an ONNX model at given sizes of its inputs, without running it.

Shapes go through node by node with ONNX's own inference; the few numbers that shapes are made of are computed on the
way. A number that depends on data counts at the most that it can be, where a `Min` says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

# Numbers that shapes are made of come in vectors no longer than this.
_LONGEST_VECTOR = 16
# They make another view of the same memory.
_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"}


class UnknownSizeError(Exception):
    """A shape does not follow from the shapes of the inputs."""


@dataclass(frozen=True)
class Tensor:
    """What is known of a value: its shape, its element type, and its numbers where it is a small vector."""

    shape: tuple[int, ...]
    kind: int
    numbers: Any = None

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * helper.tensor_dtype_to_np_dtype(self.kind).itemsize


@dataclass(frozen=True)
class Intermediate:
    """One tensor that a node makes.

    Attributes:
        name: Of the tensor.
        operator: Of the node.
        shape: Sizes.
        elements: How many numbers.
        size: Bytes.
        live: Bytes of all intermediates that are needed at once when it has just been made, itself included.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    elements: int
    size: int
    live: int


def measure_onnx(model: Any, inputs: Mapping[str, tuple[int, ...]]) -> list[Intermediate]:
    """Every intermediate of `model`, in the order in which they are made; those of a loop once.

    Args:
        model: An `onnx.ModelProto`; weights may be missing.
        inputs: The shape of each input.

    Raises:
        UnknownSizeError: Naming the node.
    """
    flat = onnx.inliner.inline_local_functions(model)
    opsets = {entry.domain: entry.version for entry in flat.opset_import}
    known = {}
    for value in flat.graph.input:
        if value.name in inputs:
            known[value.name] = Tensor(tuple(inputs[value.name]), value.type.tensor_type.elem_type)
    outputs = {value.name for value in flat.graph.output}
    return [made for made in _run(flat.graph, known, opsets, 0, outputs) if made.name not in outputs]


def _run(
    graph: Any, known: dict[str, Tensor], opsets: Mapping[str, int], held: int, returned: Collection[str] = ()
) -> Iterator[Intermediate]:
    """Go through a graph; `known` is completed in place.

    Args:
        graph: A graph, or the body of a node.
        known: Values of this graph and of those around it.
        opsets: Of the model.
        held: Bytes that the graphs around it hold.
        returned: What it makes in memory of the caller.
    """
    for weight in graph.initializer:
        is_small = math.prod(weight.dims) <= _LONGEST_VECTOR and weight.data_location != TensorProto.EXTERNAL
        numbers = numpy_helper.to_array(weight) if is_small else None
        known[weight.name] = Tensor(tuple(weight.dims), weight.data_type, numbers)
    last = _last_uses(graph)
    roots: dict[str, str] = {}
    alive: dict[str, int] = {}
    for place, node in enumerate(graph.node):
        now = held + sum(alive.values())
        if node.op_type == "Loop":
            made = _loop(node, known, opsets, now)
        elif node.op_type == "If":
            made = _if(node, known, opsets, now)
        else:
            made = _one(node, known, opsets, now)
        yield from made
        for name in node.output:
            if node.op_type in _VIEWS:
                roots[name] = roots.get(node.input[0], node.input[0])
                # The tensor is needed for as long as its views are.
                last[roots[name]] = max(last.get(roots[name], place), last.get(name, place))
            elif name and node.op_type != "Constant" and name not in returned:
                alive[name] = known[name].size
        alive = {name: size for name, size in alive.items() if last.get(name, place) > place}


def _last_uses(graph: Any) -> dict[str, int]:
    """The place of the last node that reads each value, itself or in a body; behind all nodes for a result."""
    last = {name: place for place, node in enumerate(graph.node) for name in _read(node)}
    return last | {value.name: len(graph.node) for value in graph.output}


def _read(node: Any) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield from (value.name for value in attribute.g.output)
            for inner in attribute.g.node:
                yield from _read(inner)


def _one(node: Any, known: dict[str, Tensor], opsets: Mapping[str, int], held: int) -> Iterator[Intermediate]:
    for name, tensor in zip(node.output, _infer(node, known, opsets), strict=True):
        known[name] = tensor
        if name and node.op_type not in _VIEWS | {"Constant"}:
            held += tensor.size
            yield Intermediate(name, node.op_type, tensor.shape, tensor.elements, tensor.size, held)
    if node.op_type == "Attention":
        yield _scores(node, known, held)


def _loop(node: Any, known: dict[str, Tensor], opsets: Mapping[str, int], held: int) -> Iterator[Intermediate]:
    body = helper.get_node_attr_value(node, "body")
    carried = len(node.input) - 2
    inside = dict(known)
    inside[body.input[0].name] = Tensor((), TensorProto.INT64)
    inside[body.input[1].name] = Tensor((), TensorProto.BOOL)
    for inner, outer in zip(body.input[2:], node.input[2:], strict=True):
        inside[inner.name] = known[outer]
    trips = known[node.input[0]].numbers
    if trips is None:
        raise UnknownSizeError(f"the number of iterations of {node.name or node.output[0]}")
    steps = list(_run(body, inside, opsets, held))
    for place, (outer, inner) in enumerate(zip(node.output, body.output[1:], strict=True)):
        one = inside[inner.name]
        known[outer] = one if place < carried else Tensor((int(trips), *one.shape), one.kind)
    # The results of all iterations are kept, and put together at the end.
    kept = sum(known[outer].size for outer in node.output)
    yield from (replace(step, live=step.live + kept) for step in steps)
    for outer in node.output:
        made = known[outer]
        yield Intermediate(outer, "Loop", made.shape, made.elements, made.size, held + 2 * kept)


def _if(node: Any, known: dict[str, Tensor], opsets: Mapping[str, int], held: int) -> Iterator[Intermediate]:
    """Both branches; the result is the larger one."""
    results = []
    for branch in ("then_branch", "else_branch"):
        body = helper.get_node_attr_value(node, branch)
        inside = dict(known)
        yield from _run(body, inside, opsets, held)
        results.append([inside[output.name] for output in body.output])
    for name, pair in zip(node.output, zip(*results, strict=True), strict=True):
        known[name] = max(pair, key=lambda tensor: tensor.elements)


def _infer(node: Any, known: Mapping[str, Tensor], opsets: Mapping[str, int]) -> list[Tensor]:
    inputs = {name: known[name] for name in node.input if name}
    if node.op_type == "Shape":
        size = np.array(inputs[node.input[0]].shape, dtype=np.int64)
        given = {attribute.name: attribute.i for attribute in node.attribute}
        size = size[given.get("start", 0) : given.get("end", len(size))]
        return [Tensor(size.shape, TensorProto.INT64, size)]
    if node.op_type == "Min" and any(tensor.numbers is not None for tensor in inputs.values()):
        bounds = [tensor.numbers for tensor in inputs.values() if tensor.numbers is not None]
        least = bounds[0]
        for bound in bounds[1:]:
            least = np.minimum(least, bound)
        shape = np.broadcast_shapes(*(tensor.shape for tensor in inputs.values()))
        numbers = np.broadcast_to(least, shape) if math.prod(shape) <= _LONGEST_VECTOR else None
        return [Tensor(shape, inputs[node.input[0]].kind, numbers)]
    shapes = _shapes(node, inputs, opsets)
    is_known = all(tensor.numbers is not None for tensor in inputs.values())
    if is_known and all(math.prod(tensor.shape) <= _LONGEST_VECTOR for tensor in shapes):
        feeds = {name: tensor.numbers for name, tensor in inputs.items()}
        results = ReferenceEvaluator(node, opsets=dict(opsets)).run(None, feeds)
        return [
            Tensor(tensor.shape, tensor.kind, np.asarray(result))
            for tensor, result in zip(shapes, results, strict=True)
        ]
    return shapes


def _shapes(node: Any, inputs: Mapping[str, Tensor], opsets: Mapping[str, int]) -> list[Tensor]:
    """ONNX's own shape inference of one node."""
    schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    types = {name: helper.make_tensor_type_proto(t.kind, t.shape) for name, t in inputs.items()}
    data = {
        name: numpy_helper.from_array(np.asarray(tensor.numbers), name)
        for name, tensor in inputs.items()
        if tensor.numbers is not None
    }
    opset_imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    try:
        inferred = onnx.shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=opset_imports)
    except onnx.shape_inference.InferenceError as error:
        raise UnknownSizeError(f"the result of {node.op_type} {node.name}: {error}") from error
    found = []
    for name in node.output:
        proto = inferred[name].tensor_type if name in inferred else None
        if (
            proto is None
            or not proto.HasField("shape")
            or any(not dim.HasField("dim_value") for dim in proto.shape.dim)
        ):
            raise UnknownSizeError(f"the result {name} of {node.op_type} {node.name}")
        found.append(Tensor(tuple(dim.dim_value for dim in proto.shape.dim), proto.elem_type))
    return found


def _scores(node: Any, known: Mapping[str, Tensor], held: int) -> Intermediate:
    """What dense attention holds inside: a score for each query and key of each head."""
    query, key = known[node.input[0]], known[node.input[1]]
    shape = (*query.shape[:3], key.shape[-2])
    elements = math.prod(shape)
    return Intermediate(
        f"{node.output[0]} (its scores)", "Attention", shape, elements, elements * 4, held + elements * 4
    )
