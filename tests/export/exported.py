"""Tiny sparsified models and their artifacts, loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from models.learned import sharpen
from models.zoo import VOCAB, ZOO, Entry

import msa_compile
from msa_compile import ExportResult, MSAConfig

BLOCK_SIZE, TOPK = 4, 5
BUDGET = BLOCK_SIZE * TOPK
MAX_LENGTH = 128
EXACT = 1e-4  # float32, logits of a size of about 10


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def sparse(model: torch.nn.Module, inputs: Any = None, **fields: Any) -> torch.nn.Module:
    config = MSAConfig(**{"block_size": BLOCK_SIZE, "topk_blocks": TOPK, "dense_below": 0} | fields)
    return msa_compile.sparsify(model, config, example_inputs=inputs, inner="eager")


def difference(ours: torch.Tensor, theirs: Any) -> float:
    assert tuple(ours.shape) == tuple(theirs.shape)
    return float((ours - torch.as_tensor(theirs)).abs().max())


@dataclass(frozen=True)
class Artifact:
    """A sparsified model, how it is called, and its export, loaded."""

    model: torch.nn.Module
    entry: Entry
    result: ExportResult
    session: onnxruntime.InferenceSession

    def __call__(self, **feeds: torch.Tensor) -> dict[str, torch.Tensor]:
        names = [output.name for output in self.session.get_outputs()]
        values = self.session.run(names, {name: value.numpy() for name, value in feeds.items()})
        return dict(zip(names, map(torch.from_numpy, values), strict=True))

    def state(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The cache that a step gave, as the next step takes it."""
        return {
            name.replace("present", "past_key_values"): value
            for name, value in outputs.items()
            if name.startswith("present")
        }

    def empty(self, batch: int, length: int) -> dict[str, torch.Tensor]:
        """Caches of a length."""
        ports = [port for port in self.result.inputs if port.name.startswith("past")]
        return {port.name: torch.zeros(batch, port.shape[1], length, port.shape[3]) for port in ports}


def load(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def export_one(folder: Path, name: str, cache: str, *, padded: bool, indexer: str) -> Artifact:
    entry = ZOO[name]
    ids = tokens(2, 23)
    is_hand_written = not hasattr(entry.build(), "config")
    given: Any = (ids,) if is_hand_written else {"input_ids": ids}
    if padded:
        given["attention_mask"] = torch.ones_like(ids)
    model = sparse(entry.build(), given, indexer=indexer)
    sharpen(model)
    path = folder / f"{name}_{cache}.onnx"
    result = msa_compile.export(
        model, path, example_inputs=given, cache=cache, max_length=64 if is_hand_written else MAX_LENGTH
    )
    return Artifact(model, entry, result, load(path))
