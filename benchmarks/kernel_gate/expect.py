"""What is asked of machine code: the table, and what to say where it is not met."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.kernel_gate.compile import Compiled
from msa_compile.kernels.chip import Chip
from msa_compile.kernels.launch import Launch

# Kernels that multiply matrices, and the sizes whose product is the rows of a tile.
ROWS = {
    "score_blocks": ("PACKED_GROUPS", "QUERIES"),
    "rescore_blocks": ("PACKED_GROUPS", "QUERIES"),
    "score_and_choose": ("PACKED_GROUPS", "QUERIES"),
    "attend_tiles": ("HEADS_TILE", "QUERIES"),
    "attend_slots": ("ROWS",),
    "attend_blocks": ("HEADS_TILE", "QUERIES"),
    "differentiate_tiles": ("HEADS_TILE", "QUERIES"),
    "differentiate_blocks": ("SLOTS",),
    "sum_logits": ("HEADS_TILE", "QUERIES"),
    "sum_teacher": ("SLOTS",),
    "compare_queries": ("SLOTS",),
    "compare_keys": ("SLOTS",),
}
# The matrix instruction of tiles that are large enough for it; smaller ones, and older chips, have mma.sync.
LARGE_PRODUCT = {90: "wgmma", 100: "tcgen05"}
LEAST_ROWS = 64
# Registers of a multiprocessor: a program that asks for more does not start.
REGISTERS = 65_536

# Bytes that may be spilled, by kernel and chip; 0 where nothing stands. What they cost, only a run can say.
SPILLS = {
    ("score_blocks", 80): 8,
    ("score_blocks", 90): 8,
    ("score_blocks", 100): 200,
    ("attend_tiles", 80): 8,
    ("attend_tiles", 86): 72,
    ("attend_tiles", 89): 72,
    ("attend_tiles", 90): 16,
    ("attend_tiles", 100): 24,
    ("attend_blocks", 80): 8,
    ("attend_blocks", 100): 152,
    ("differentiate_tiles", 80): 48,
    ("differentiate_tiles", 86): 80,
    ("differentiate_tiles", 89): 80,
    ("differentiate_tiles", 90): 304,
    ("differentiate_tiles", 100): 144,
    # With sinks, a softcap, documents and a mask at once; nothing spills without them.
    ("differentiate_blocks", 80): 1416,
    ("differentiate_blocks", 86): 728,
    ("differentiate_blocks", 89): 728,
    ("attend_slots", 86): 8,
    ("attend_slots", 89): 8,
    ("sum_logits", 80): 8,
    ("compare_queries", 80): 24,
    ("compare_queries", 86): 32,
    ("compare_queries", 89): 32,
    ("compare_queries", 90): 48,
    # At 256 channels; 40 below.
    ("compare_queries", 100): 272,
    ("compare_keys", 80): 32,
    ("compare_keys", 86): 24,
    ("compare_keys", 89): 24,
    # At 256 channels; nothing below, but for 16 in float32.
    ("compare_keys", 90): 184,
    ("compare_keys", 100): 64,
    ("add_key_parts", 86): 16,
    ("add_key_parts", 89): 16,
}
# The same in float32, whose operands are split in three.
SINGLE_SPILLS = {
    # Of a raised teacher; as it is, 600 to 672.
    ("compare_queries", 80): 720,
    ("compare_queries", 86): 656,
    ("compare_queries", 89): 656,
    ("compare_queries", 90): 720,
    ("compare_queries", 100): 720,
    ("compare_keys", 86): 32,
    ("compare_keys", 89): 32,
    ("sum_teacher", 86): 24,
    ("sum_teacher", 89): 24,
    ("sum_teacher", 90): 32,
    ("sum_teacher", 100): 56,
}


def judge(launch: Launch, compiled: Compiled, chip: Chip) -> list[str]:
    """Return complaints, none if the kernel is as expected on this chip."""
    name = launch.kernel.__name__
    said = []
    if compiled.shared > chip.shared_memory:
        said.append(f"{compiled.shared} bytes of shared memory, there are {chip.shared_memory}")
    is_single = name in ROWS and _dtype_of(launch) == torch.float32
    allowed = SPILLS.get((name, chip.capability), 0)
    if is_single:
        allowed = max(allowed, SINGLE_SPILLS.get((name, chip.capability), 0))
    if compiled.spilled > allowed:
        said.append(f"{compiled.spilled} bytes spilled, {allowed} allowed")
    if launch.tile.warps * 32 * compiled.registers > REGISTERS:
        said.append(f"{compiled.registers} registers in {launch.tile.warps} warps, a processor has {REGISTERS}")
    if name not in ROWS or is_single:
        return said
    rows = math.prod(launch.tile.sizes[size] for size in ROWS[name])
    wanted = LARGE_PRODUCT.get(chip.capability, "mma.sync") if rows >= LEAST_ROWS else "mma.sync"
    if compiled.products[wanted] == 0:
        said.append(f"no {wanted} at {rows} rows: {compiled.products}")
    if _dtype_of(launch) == torch.float8_e4m3fn and compiled.products["of e4m3"] == 0:
        said.append("e4m3 is not multiplied as such")
    if _dtype_of(launch) == torch.uint8 and compiled.flushes > 0:
        said.append("denormal numbers are lost, which bytes of e4m3 pass through")
    if compiled.copies == 0:
        said.append("no asynchronous copy: keys are not loaded ahead")
    return said


def _dtype_of(launch: Launch) -> torch.dtype:
    keys: Tensor = launch.arguments["index_key" if "index_key" in launch.arguments else "key"]
    return keys.dtype
