"""A model that needs no transformers, and what other processes do with it: `python plain.py WHAT FOLDER [RANK]`."""

import datetime
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F

import msa_compile
from msa_compile import MSAConfig, whole_files
from msa_compile.calibrate import train

CONFIG = MSAConfig(block_size=4, topk_blocks=3, dense_below=0)
LEARNED = MSAConfig(block_size=4, topk_blocks=3, dense_below=0, indexer="learned")
STEPS = 6


class Attention(nn.Module):
    """Four groups of two heads; no width is spelled out, so that a rank may hold a part of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)
        self.o = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(64, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def plain() -> Plain:
    torch.manual_seed(0)
    model = Plain().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model


def batches(rows: slice = slice(None)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 50, (4, 40), generator=generator)[rows] for _ in range(STEPS)]


def start_alike(model: nn.Module) -> None:
    """Branches of two groups a rank start as the halves of one of four."""
    generator = torch.Generator().manual_seed(9)
    for layer in model.layers:
        for projection in (layer.indexer.q_proj, layer.indexer.k_proj):
            rows = projection.weight.shape[0]
            is_half = projection is layer.indexer.q_proj and rows == 16
            full = 0.02 * torch.randn(32 if is_half else rows, 64, generator=generator)
            first = 16 * distributed.get_rank() if is_half else 0
            projection.weight.data.copy_(full[first : first + rows])
        layer.indexer.q_norm.weight.data.fill_(0.1)  # no start of its own


def calibrated(model: nn.Module, data: list[torch.Tensor], checkpoint: Path | None = None, kind: str = "plain") -> dict:
    """What a calibration leaves: its history, its metrics, and every weight of the branches."""
    torch.set_num_threads(1)
    example = {} if kind == "fsdp" else {"example_inputs": (data[0],)}
    msa_compile.sparsify(model, LEARNED if kind == "tp" else CONFIG, inner="eager", **example)
    if kind == "tp":
        start_alike(model)
    result = msa_compile.calibrate(
        model,
        data,
        steps=STEPS,
        learning_rate=1e-2,
        min_mass_ratio=0.0,
        min_found=0.0,
        checkpoint=checkpoint,
        progress=False,
    )
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if ".indexer." in name}
    return {"history": result.history, "mass": result.mass_history, "weights": weights, "steps": result.steps}


def die_while_writing(folder: Path) -> None:
    """Calibrate, and be killed in the middle of the third checkpoint."""
    train.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    written = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        original(descriptor)

    whole_files.os.fsync = fsync
    calibrated(plain(), batches(), folder / "state.pt")


def work(kind: str, folder: Path, rank: int) -> None:
    """One of two ranks: it calibrates on half of the rows, or under tensor parallelism on all and half of the heads.

    With "ddp" it takes one step of a training loop.
    """
    patience = datetime.timedelta(seconds=120)
    address = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=patience)
    model = plain()
    rows = slice(2 * rank, 2 * rank + 2)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    if kind == "tp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        plan = {f"layers.*.{part}": ColwiseParallel() for part in "qkv"} | {"layers.*.o": RowwiseParallel()}
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
        rows = slice(None)
    if kind == "ddp":
        found = loss_gradients(model, batches(rows)[0])
    else:
        found = calibrated(model, batches(rows), folder / f"state{rank}.pt" if kind == "fsdp" else None, kind=kind)
        found["saved"] = attempt(lambda: msa_compile.save(model, folder / f"adapter{rank}"))
    if kind == "tp":
        state = folder / "state.pt"
        found["checkpoint"] = attempt(lambda: msa_compile.calibrate(model, batches(), steps=1, checkpoint=state))
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


def attempt(call: Callable[[], object]) -> str:
    """What a call was refused with."""
    try:
        call()
    except msa_compile.errors.MSAError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def loss_gradients(model: nn.Module, ids: torch.Tensor) -> dict:
    """Gradients of a loss and the index loss, in several processes those that DistributedDataParallel averages."""
    torch.set_num_threads(1)
    msa_compile.sparsify(model, LEARNED, inner="eager", example_inputs=(ids,))
    generator = torch.Generator().manual_seed(9)
    for layer in model.layers:
        for weight in layer.indexer.weights():
            weight.data.normal_(std=0.3, generator=generator)
    trained = nn.parallel.DistributedDataParallel(model.train()) if distributed.is_initialized() else model.train()
    (trained(ids).square().mean() + msa_compile.index_loss(trained)).backward()
    return {"gradients": {name: p.grad for name, p in model.named_parameters()}}


if __name__ == "__main__":
    if sys.argv[1] == "die":
        die_while_writing(Path(sys.argv[2]))
    else:
        work(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
