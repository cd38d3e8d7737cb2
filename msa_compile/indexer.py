"""The paper's Index Branch as a module: one index query head a group, one index key head shared by all groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Name of the branch in the module that owns the attention, as in transformers' MiniMax-M3.
INDEXER = "indexer"


@dataclass(frozen=True)
class IndexHeads:
    """Index queries and keys of some tokens, normalised, without positions.

    Attributes:
        query: ``[B, Hkv, T, D]``.
        key: ``[B, 1, T, D]``.
    """

    query: Tensor
    key: Tensor


class IndexNorm(nn.Module):
    """Root-mean-square norm over one head, with a gain of ``1 + weight``; computed in float32.

        y = x * rsqrt(mean(x^2) + eps) * (1 + weight)

    Args:
        width: ``D``.
        eps: Keeps a row of zeros finite.
    """

    def __init__(
        self, width: int, *, eps: float = 1e-6, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


class IndexBranch(nn.Module):
    """Scores key blocks: ``s[j] = <rope(q_norm(W_q x_i))[r], rope(k_norm(W_k x_j))>`` for group ``r``.

    A submodule of the module that owns an attention site, so that ``state_dict``, ``parameters`` and ``to`` see it. Its
    weights are read by the compiled graph, which also has the layer's own RoPE.

    Args:
        hidden_size: Width of the hidden state that the layer's own query and key projections read.
        groups: ``Hkv``, key/value heads.
        head_dim: ``D``, that of the layer.
        is_forced: Whether it is used before it is calibrated, as the user asked with ``indexer="learned"``.

    Attributes:
        is_calibrated: Whether it was trained and passed its gate.

    Source: MiniMax Sparse Attention (arXiv 2606.13392), equation 5; norms and names as in the MiniMax-M3 release.
    """

    def __init__(
        self,
        hidden_size: int,
        groups: int,
        head_dim: int,
        *,
        is_forced: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.head_dim = head_dim
        self.is_forced = is_forced
        self.is_calibrated = False
        self.q_proj = nn.Linear(hidden_size, groups * head_dim, bias=False, dtype=dtype, device=device)
        self.k_proj = nn.Linear(hidden_size, head_dim, bias=False, dtype=dtype, device=device)
        self.q_norm = IndexNorm(head_dim, dtype=dtype, device=device)
        self.k_norm = IndexNorm(head_dim, dtype=dtype, device=device)
        for projection in (self.q_proj, self.k_proj):
            nn.init.normal_(projection.weight, std=0.02)

    @property
    def is_used(self) -> bool:
        """Whether the site selects its blocks by this branch."""
        return self.is_forced or self.is_calibrated

    def weights(self) -> list[Tensor]:
        """What the compiled graph reads: both projections, then both norms."""
        return [self.q_proj.weight, self.k_proj.weight, self.q_norm.weight, self.k_norm.weight]

    def forward(self, x: Tensor) -> IndexHeads:
        """Index heads of hidden states ``[B, T, C]``, before RoPE."""
        query = self.q_norm(self.q_proj(x).unflatten(-1, (self.groups, self.head_dim)))
        key = self.k_norm(self.k_proj(x)).unsqueeze(2)
        return IndexHeads(query.transpose(1, 2), key.transpose(1, 2))


def weights_in_use(module: nn.Module) -> list[Tensor]:
    """Weights of the index branch that ``module`` selects by; none when it has none, or scores with ``"keys"``."""
    branch = module._modules.get(INDEXER)
    return branch.weights() if isinstance(branch, IndexBranch) and branch.is_used else []


def insert_index_branch(owner: nn.Module, hidden_size: int, groups: int, head_dim: int, *, is_forced: bool) -> bool:
    """Give a module that owns an attention site an index branch, in the dtype and on the device of its own weights.

    Returns:
        Whether it has one now; not when the name is taken by something of the model's own.
    """
    if hasattr(owner, INDEXER):
        return isinstance(owner._modules.get(INDEXER), IndexBranch)
    weights = [parameter for parameter in owner.parameters() if parameter.is_floating_point()]
    if not weights:
        return False
    like = max(weights, key=lambda weight: weight.numel())
    branch = IndexBranch(hidden_size, groups, head_dim, is_forced=is_forced, dtype=like.dtype, device=like.device)
    owner.register_module(INDEXER, branch.train(owner.training))
    return True


def remove_index_branches(model: nn.Module) -> list[tuple[nn.Module, IndexBranch]]:
    """Take every index branch of ours out of ``model``; returns their owners and them."""
    found = [(module, module._modules.get(INDEXER)) for module in model.modules()]
    branches = [(owner, branch) for owner, branch in found if isinstance(branch, IndexBranch)]
    for owner, _ in branches:
        del owner._modules[INDEXER]
    return branches
