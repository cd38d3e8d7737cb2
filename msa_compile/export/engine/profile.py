"""The optimization profile of an engine: the least, the usual and the largest shape of each input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from msa_compile.export.records import SparseProgram, evaluate_size


@dataclass(frozen=True)
class InputProfile:
    """The shapes that one input may have.

    Attributes:
        name: Of the input of the program.
        dtype: As torch writes it.
        least, usual, most: Shapes; TensorRT tunes for the usual one.
    """

    name: str
    dtype: str
    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]

    @property
    def is_open(self) -> bool:
        """Whether any size is open."""
        return self.least != self.most


def profile_of(sparse: SparseProgram, program: ExportedProgram) -> tuple[InputProfile, ...]:
    """One profile for every input: ranges are those of `dynamic_shapes` and `max_length`, usual is the example.

    A size that others say, such as ``past + length``, goes from the least to the most that they come to.

    Args:
        sparse: Says sizes.
        program: What becomes an engine, whose inputs have the names that it gives them.
    """
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names = [name for name in names if isinstance(values.get(name), Tensor)]
    least = {name: allowed.least for name, allowed in sparse.ranges.items()}
    most = {name: allowed.most for name, allowed in sparse.ranges.items()}

    def shape(port_shape: tuple[int | str, ...], sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else evaluate_size(size, sizes) for size in port_shape)

    return tuple(
        InputProfile(name, port.dtype, shape(port.shape, least), tuple(tensor.shape), shape(port.shape, most))
        for name, port, tensor in zip(names, sparse.inputs, sparse.example, strict=True)
    )
