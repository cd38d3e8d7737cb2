"""What Inductor makes of a site: each op once, and the index projections, norms and RoPE around it in few kernels."""

import copy
import re
from dataclasses import dataclass

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import msa_compile
from models.learned import LEARNED, sharpen
from models.subject import BLOCK_SIZE, TOPK, tokens
from models.zoo import ZOO
from msa_compile import MSAConfig

KEYS = MSAConfig(block_size=BLOCK_SIZE, topk_blocks=TOPK, dense_below=0)
# A call in generated code: a kernel of Inductor's own, a matrix product, or an op that stays whole.
_CALL = re.compile(r"(?P<fused>cpp_fused_\w+)\(|extern_kernels\.(?P<product>\w+)\(|= torch\.ops\.(?P<op>[\w.]+)\(")
_LAYERS, _PRODUCTS_OF_MLP = 2, 3


@dataclass(frozen=True)
class Site:
    """The calls of one layer's attention, from behind its first norm up to its output projection."""

    fused: list[str]
    products: int
    ops: list[str]


def sites_of(config: MSAConfig, *, against_eager: bool = False) -> list[Site]:
    """Compile a prompt of Qwen3, whose heads are normed and turned, and cut the generated code into its layers."""
    model = ZOO["qwen3"].build()
    plain = copy.deepcopy(model)
    sharpen(msa_compile.sparsify(model, config))
    with torch._inductor.config.patch(fx_graph_cache=False):
        found, codes = run_and_get_code(lambda: model(tokens(1, 40), use_cache=False).logits)
    assert len(codes) == 1
    if against_eager:
        sharpen(msa_compile.sparsify(plain, config, inner="eager"))
        torch.testing.assert_close(found, plain(tokens(1, 40), use_cache=False).logits, rtol=0, atol=1e-4)
    calls = [match.groupdict() for match in _CALL.finditer(codes[0], codes[0].index("def call("))]
    products = [at for at, call in enumerate(calls) if call["product"]]
    sites, first = [], 0
    for _ in range(_LAYERS):
        attention = next(
            at for at in range(products[first], len(calls)) if calls[at]["op"] == "msa.block_sparse_attention.default"
        )
        last = next(turn for turn, at in enumerate(products) if at > attention)
        mine = calls[products[first] : products[last] + 1]
        sites.append(
            Site(
                fused=[call["fused"] for call in mine if call["fused"]],
                products=last + 1 - first,
                ops=[call["op"] for call in mine if call["op"]],
            )
        )
        first = last + 1 + _PRODUCTS_OF_MLP
    assert first == len(products) - 1, "behind the last layer there is one product, that of the vocabulary"
    assert sum(call["op"] is not None for call in calls) == _LAYERS * 2
    return sites


def test_a_site_is_two_ops_and_three_kernels() -> None:
    for site in sites_of(KEYS):
        assert site.ops == ["msa.select_blocks.default", "msa.block_sparse_attention.default"]
        assert site.products == 4, "queries, keys, values and output"
        # Norm and RoPE of the keys; those of the queries, with the mean of a group that is the index query; the heads
        # side by side for the output projection.
        assert len(site.fused) <= 3
        of_query = site.fused[-2]
        assert "rsqrt" in of_query
        assert "cos" in of_query


@pytest.mark.slow
def test_an_index_branch_is_two_products_and_two_kernels_more() -> None:
    for site in sites_of(LEARNED, against_eager=True):
        assert site.ops == ["msa.select_blocks.default", "msa.block_sparse_attention.default"]
        assert site.products == 6, "and those of the index queries and the index key"
        assert len(site.fused) <= 5
