"""Compile a launch for a chip that is not there, and count what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.chip import Chip
from msa_compile.kernels.launch import Launch

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel.

    Attributes:
        registers: Of a thread; 255 is the most there are.
        spilled: Bytes of a thread that found no register.
        shared: Bytes of shared memory of a program.
        products: Matrix instructions by kind: ``wgmma``, ``mma.sync``, ``tcgen05``; and those of them that are of e4m3.
        copies: Asynchronous copies from global to shared memory.
        flushes: Instructions that take denormal numbers for 0.
    """

    registers: int
    spilled: int
    shared: int
    products: dict[str, int]
    copies: int
    flushes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def specialize(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Return signature, constants and attributes of a launch, as the launcher of Triton would choose them.

    Pointers and most numbers that are multiples of 16 are known to be so, which loads of 16 bytes need.
    """
    values = {**launch.arguments, **launch.tile.sizes}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        signature[parameter.name], is_divisible = _type_of(value, not parameter.do_not_specialize)
        if parameter.is_constexpr:
            signature[parameter.name], is_divisible = "constexpr", False
        if signature[parameter.name] == "constexpr":
            constants[parameter.name] = value
        if is_divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    assert len(values) == len(signature), f"arguments that {launch.kernel.__name__} does not have: {values.keys()}"
    return signature, constants, attributes


def _type_of(value: Any, is_specialized: bool) -> tuple[str, bool]:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}", True
    if value is None or (value == 1 and isinstance(value, int) and is_specialized):
        return "constexpr", False
    if isinstance(value, float):
        return "fp32", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", is_specialized and value % 16 == 0


def compile_launch(launch: Launch, chip: Chip) -> Compiled:
    """Compile to machine code with the assembler that Triton brings; no GPU and no driver is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialize(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", chip.capability, 32)
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages}
    made = triton.compile(source, target=target, options=options)
    ptx = made.asm["ptx"]
    registers, spilled = _resources(made.asm["cubin"])
    return Compiled(
        registers=registers,
        spilled=spilled,
        shared=int(made.metadata.shared),
        products={
            "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
            "mma.sync": len(re.findall(r"\bmma\.sync", ptx)),
            "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
            "of e4m3": len(re.findall(r"\.e4m3\.e4m3|kind::f8f6f4", ptx)),
        },
        copies=len(re.findall(r"cp\.async\.c[ag]", ptx)) + len(re.findall(r"cp\.async\.bulk", ptx)),
        flushes=len(re.findall(r"\.ftz\b", ptx)),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of the one kernel in a cubin; a spilled register lives on the stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, f"cuobjdump said no registers: {said}"
    return int(found[1]), int(found[2])
