"""Where an untrained index branch starts: near the layer's own queries and keys.

The branch's query of a group is to be the mean of the group's heads, and its key the mean of all key heads, both before
RoPE: the projections are the least-squares fit of these to the hidden state, on one call, and the norms' gains their
sizes. Scores are then near the group's mean logits, as those of `"keys"` are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from msa_compile.calibrate.feed import Call, Enough
from msa_compile.calibrate.metrics import support_of
from msa_compile.calibrate.shards import add_over_processes
from msa_compile.indexer import IndexBranch
from msa_compile.observed import SiteCall

_RIDGE = 1e-4  # of the mean square of the hidden state


def is_untrained(branch: IndexBranch) -> bool:
    """Whether its norms are as they are made; every training moves them."""
    return not branch.is_calibrated and not bool(branch.q_norm.weight.any() or branch.k_norm.weight.any())


class Start:
    """Gives branches their start on the first call that it visits.

    Args:
        branches: Those that are not trained, by the name of their site.
        is_split: Whether each process has query weights of its own groups.
    """

    def __init__(self, branches: Mapping[str, IndexBranch], *, is_split: bool) -> None:
        self._branches, self._is_split = branches, is_split
        self._counted: Tensor | None = None

    def begin(self, call: Call) -> bool:
        """See :class:`Visitor`."""
        self._counted = call.counted
        return True

    def end(self) -> None:
        """See :class:`Visitor`."""
        raise Enough

    def see(self, call: SiteCall) -> None:
        """Fit one branch."""
        branch = self._branches.get(call.name)
        if branch is None or call.query.shape[2] != call.key.shape[2]:
            return
        rows = support_of(call, self._counted).counted
        assert rows is not None, "it is always said which queries count"
        width = call.query.shape[3]
        scale = width**-0.5 if call.factors["scale"] is None else call.factors["scale"]
        queries = call.query.unflatten(1, (call.key.shape[1], -1)).mean(2) * scale * width**0.5
        outputs = (call.index_query, call.index_key)
        wanted = (queries, call.key.mean(1, keepdim=True))
        # RoPE turns and does no more: what it makes of a cotangent is the same tensor turned back.
        turned_back = torch.autograd.grad(
            outputs, (call.plain_query, call.plain_key), [w.to(o.dtype) for w, o in zip(wanted, outputs, strict=True)]
        )
        hidden = call.hidden.detach()[rows].double()
        targets = [part[rows].flatten(1).double() for part in turned_back]
        gram, sizes = hidden.T @ hidden, torch.stack([part.square().sum() for part in targets])
        products = [hidden.T @ part for part in targets]
        count = sizes.new_tensor([len(hidden)])
        if self._is_split:
            # Each process fits the queries of its own groups, and all of them one key.
            of_query = _solved(gram, products.pop(0))
        add_over_processes([gram, *products, sizes, count])
        of_key = _solved(gram, products.pop())
        if not self._is_split:
            of_query = _solved(gram, products.pop())
        gains = (sizes / (count * width * sizes.new_tensor([branch.groups, 1]))).sqrt()
        with torch.no_grad():
            branch.q_proj.weight.copy_(of_query.T)
            branch.k_proj.weight.copy_(of_key.T)
            branch.q_norm.weight.fill_(gains[0] - 1)
            branch.k_norm.weight.fill_(gains[1] - 1)


def _solved(gram: Tensor, product: Tensor) -> Tensor:
    ridge = _RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), product)
