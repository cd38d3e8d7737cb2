"""Compile the launch of a plugin to PTX, for a chip that need not be there, with the parameters that plugins pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from msa_compile.export.engine.entries import Entry
from msa_compile.kernels.chip import Chip

# How Triton writes the dtypes of TensorRT.
TYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int64": "i64",
    "bool": "u8",
}


@dataclass(frozen=True)
class Compiled:
    """What a plugin launches.

    Attributes:
        name: Of the entry in the PTX.
        ptx: The program.
        threads: Of a block.
        shared: Bytes of dynamic shared memory.
        parameters: Their PTX types in order: inputs, outputs.
    """

    name: str
    ptx: str
    threads: int
    shared: int
    parameters: tuple[str, ...]


def compile_entry(entry: Entry, inputs: Sequence[str], outputs: Sequence[str], chip: Chip) -> Compiled:
    """Compile an entry; no GPU and no driver is needed.

    Args:
        entry: The launch.
        inputs: The dtypes of its tensors, as torch writes them.
        outputs: The same of what it writes.
        chip: What for.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from msa_compile.export.engine import triton_entries

    kernel = getattr(triton_entries, entry.kernel)
    constants = {**entry.constants, **entry.tile.sizes}
    pointers = [f"*{TYPES[dtype]}" for dtype in inputs]
    passed = iter([*pointers, *(f"*{TYPES[dtype]}" for dtype in outputs)])
    signature = {name: "constexpr" if name in constants else next(passed) for name in kernel.arg_names}
    assert next(passed, None) is None, f"{entry.kernel} has fewer parameters than its plugin"
    # Every tensor of TensorRT starts at a multiple of 256 bytes.
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind[0] == "*"}
    made = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", chip.capability, 32),
        options={"num_warps": entry.tile.warps, "num_stages": entry.tile.stages},
    )
    count = sum(kind != "constexpr" for kind in signature.values())
    ptx = drop_scratch(made.asm["ptx"], made.metadata.name, count)
    parameters = tuple(re.findall(r"\.param \.(\w+)", header_of(ptx, made.metadata.name)))
    return Compiled(made.metadata.name, ptx, made.metadata.num_warps * 32, made.metadata.shared, parameters)


def header_of(ptx: str, name: str) -> str:
    """The list of parameters of an entry."""
    found = re.search(rf"\.entry {re.escape(name)}\((.*?)\)", ptx, re.DOTALL)
    assert found is not None, f"the PTX has no entry {name}"
    return found[1]


def drop_scratch(ptx: str, name: str, count: int) -> str:
    """Cut the parameters of an entry to the first `count`.

    Triton 3.7 appends two pointers to scratch memory to every entry, used or not, and its own launcher passes them. A
    plugin passes its tensors and numbers alone, and a driver that looks for more reads behind them.
    """
    header = header_of(ptx, name)
    parameters = header.strip().split(",\n")
    assert len(parameters) >= count, f"{name} has {len(parameters)} parameters, fewer than the {count} of its plugin"
    for parameter in parameters[count:]:
        own = parameter.split()[-1]
        assert len(re.findall(rf"\b{own}\b", ptx)) == 1, (
            f"{name} uses {own}, scratch memory that a plugin does not have"
        )
    kept = "\n" + ",\n".join(parameter.rstrip() for parameter in ["\t" + p.strip() for p in parameters[:count]]) + "\n"
    return ptx.replace(header, kept, 1)
