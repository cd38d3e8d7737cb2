"""A picture of the key blocks that the queries of each group select, from the queries and keys of a real call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from msa_compile.kernels import select_blocks

UNSEEN, LEFT_OUT, SELECTED, LOCAL = range(4)
COLOURS = {UNSEEN: "#ffffff", LEFT_OUT: "#e3e6ea", SELECTED: "#2f6db5", LOCAL: "#f28e2b"}
LABELS = {LEFT_OUT: "left out", SELECTED: "selected", LOCAL: "local, always in"}
MAX_PANELS = 4


class AttentionInputs(TorchFunctionMode):
    """Keeps the query and key of the first attention call that one module makes."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner
        self.inside = False
        self.query: Tensor | None = None
        self.key: Tensor | None = None

    def __enter__(self) -> AttentionInputs:
        self.hooks = [self.owner.register_forward_pre_hook(self._go_in), self.owner.register_forward_hook(self._go_out)]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def _go_in(self, *_: Any) -> None:
        self.inside = True

    def _go_out(self, *_: Any) -> None:
        self.inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.inside and self.query is None:
            named = dict(zip(("query", "key"), args, strict=False)) | kwargs
            self.query, self.key = named["query"].detach(), named["key"].detach()
        return func(*args, **kwargs)


def selected_blocks(
    model: nn.Module, ids: Tensor, *, site: str, groups: int, block_size: int, topk: int
) -> tuple[Tensor, int]:
    """Blocks that one attention layer selects for `ids`, int32 `[Hkv, T, topk]`, and the number of query heads.

    Args:
        model: The dense model; it is run once.
        ids: Token ids `[1, T]`.
        site: Module path of the attention layer.
        groups: `Hkv`.
        block_size: Keys in a block.
        topk: Blocks that a query selects.
    """
    with torch.no_grad(), AttentionInputs(model.get_submodule(site)) as seen:
        model(input_ids=ids, use_cache=False)
    if seen.query is None or seen.key is None:
        raise RuntimeError(f"{site} does not call F.scaled_dot_product_attention, so there is nothing to draw")
    heads = seen.query.shape[1]
    # The "keys" indexer: a group's index query is the mean of its heads. The call may have been given repeated keys.
    index_query = seen.query.unflatten(1, (groups, heads // groups)).mean(2)
    index_key = seen.key[:, :: seen.key.shape[1] // groups]
    return select_blocks(index_query, index_key, block_size=block_size, topk=topk)[0], heads


def draw_blocks(block_ids: Tensor, *, heads: int, block_size: int, title: str, out: Path) -> None:
    """Write a PNG with one panel a group: key blocks from left to right, queries from top to bottom."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    groups, length, _ = block_ids.shape
    blocks = -(-length // block_size)
    panels = min(groups, MAX_PANELS)
    figure, axes = plt.subplots(1, panels, figsize=(1.2 + 3.9 * panels, 5.4), sharey=True, squeeze=False)
    for group, panel in enumerate(axes[0][:panels]):
        panel.imshow(
            _categories(block_ids[group], blocks, block_size).numpy(),
            cmap=ListedColormap(list(COLOURS.values())),
            vmin=UNSEEN,
            vmax=LOCAL,
            aspect="auto",
            interpolation="nearest",
            extent=(0, blocks, length, 0),
        )
        size = heads // groups
        panel.set_title(f"group {group}: query heads {group * size} to {group * size + size - 1}", fontsize=11)
        panel.set_xlabel(f"key block ({block_size} keys each)")
        panel.tick_params(length=3)
    axes[0][0].set_ylabel("query position")
    figure.suptitle(title, fontsize=13)
    handles = [Patch(facecolor=COLOURS[kind], edgecolor="#9aa0a6", label=label) for kind, label in LABELS.items()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _categories(block_ids: Tensor, blocks: int, block_size: int) -> Tensor:
    """What each block is to each query, int64 `[T, N]`, from `block_ids [T, topk]`."""
    length = block_ids.shape[0]
    own = (torch.arange(length) // block_size)[:, None]
    picture = torch.where(torch.arange(blocks)[None] <= own, LEFT_OUT, UNSEEN)
    chosen = torch.zeros(length, blocks + 1, dtype=torch.bool)
    chosen.scatter_(1, block_ids.long().cpu() % (blocks + 1), True)  # -1, no block, lands in the last column
    picture[chosen[:, :blocks]] = SELECTED
    return picture.scatter(1, own, LOCAL)
