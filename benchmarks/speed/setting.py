"""What a measurement is of: heads, dtype, device, budget; and the FLOPs and bytes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """One kind of attention on one device.

    Attributes:
        query_heads, key_value_heads, head_dim: ``Hq``, ``Hkv``, ``D``.
        dtype_name: A key of ``DTYPES``.
        device: Where it runs.
        threads: Threads of torch on a CPU.
        block_size, topk: Keys in a block, blocks a query.
    """

    query_heads: int
    key_value_heads: int
    head_dim: int
    dtype_name: str
    device: torch.device
    threads: int
    block_size: int = 128
    topk: int = 16

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, keys and values."""
        return DTYPES[self.dtype_name]

    @property
    def heads(self) -> str:
        """``"16,2,64"``."""
        return f"{self.query_heads},{self.key_value_heads},{self.head_dim}"


@dataclass(frozen=True)
class Work:
    """Arithmetic and traffic of one call.

    Attributes:
        flops: Of the products, a multiply-add being two.
        bytes: Inputs read once and outputs written once.
    """

    flops: float
    bytes: float


def attended_keys(length: int, block_size: int, topk: int) -> int:
    """Keys that the queries of a causal prefill read together: the local part, and whole blocks before it.

    The paper's formula (spec 9) charges every query the full budget; the first queries have fewer keys before them.
    """
    whole, rest = divmod(length, block_size)
    local = whole * block_size * (block_size + 1) // 2 + rest * (rest + 1) // 2
    blocks = sum(min(topk - 1, n) * block_size for n in range(whole)) + min(topk - 1, whole) * rest
    return local + blocks * block_size


def dense_prefill(setting: Setting, length: int) -> Work:
    """Causal attention of ``length`` tokens: ``2 Hq D N (N + 1)`` FLOPs."""
    flops = 2.0 * setting.query_heads * setting.head_dim * length * (length + 1)
    return Work(flops, _rows(setting, 2 * setting.query_heads + 2 * setting.key_value_heads, length))


def sparse_prefill(setting: Setting, length: int) -> Work:
    """Index scores of the causal half, ``Hkv D N (N + 1)``, and attention to the keys selected."""
    index = index_prefill(setting, length).flops
    keys = attended_keys(length, setting.block_size, setting.topk)
    read = dense_prefill(setting, length).bytes
    return Work(index + 4.0 * setting.query_heads * setting.head_dim * keys, read)


def index_prefill(setting: Setting, length: int) -> Work:
    """Index scores alone; the ids are int32."""
    flops = float(setting.key_value_heads * setting.head_dim * length * (length + 1))
    ids = 4.0 * setting.key_value_heads * length * setting.topk
    return Work(flops, _rows(setting, 2 * setting.key_value_heads, length) + ids)


def dense_decode(setting: Setting, length: int) -> Work:
    """One query against ``length`` keys."""
    flops = 4.0 * setting.query_heads * setting.head_dim * length
    return Work(flops, _rows(setting, 2 * setting.key_value_heads, length))


def sparse_decode(setting: Setting, length: int, index_heads: float) -> Work:
    """One query: every index key is read, and the keys and values of the blocks selected.

    A head of index keys that have half of the bytes counts as half a head.
    """
    keys = min(length, setting.block_size * setting.topk)
    flops = 2.0 * setting.key_value_heads * setting.head_dim * length
    flops += 4.0 * setting.query_heads * setting.head_dim * keys
    read = _rows(setting, index_heads, length) + _rows(setting, 2 * setting.key_value_heads, keys)
    return Work(flops, read)


def _rows(setting: Setting, heads: float, length: int) -> float:
    return float(heads * length * setting.head_dim * setting.dtype.itemsize)
