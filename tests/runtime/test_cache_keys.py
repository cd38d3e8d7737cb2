"""Inductor's cache on disk: one config hits what it left there, another config never does."""

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import msa_compile
from msa_compile import MSAConfig
from runtime.tiny import small, tokens


def logits(config: MSAConfig, inner: str) -> tuple[torch.Tensor, int, int]:
    """The result of a fresh process' first call, and the graphs that were and were not in the cache."""
    torch._dynamo.reset()
    counters.clear()
    model = msa_compile.sparsify(small(""), config, example_inputs=(tokens(),), inner=inner)
    with torch.no_grad():
        result = model(tokens())
    return result, counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]


# AOTAutograd's cache stands in front of Inductor's and counts apart.
@torch._functorch.config.patch(enable_autograd_cache=False)
@torch._inductor.config.patch(fx_graph_cache=True)
def test_two_configs_do_not_share_compiled_code():
    few = MSAConfig(block_size=4, topk_blocks=2, dense_below=0)
    others = [
        MSAConfig(block_size=4, topk_blocks=3, dense_below=0),
        MSAConfig(block_size=4, topk_blocks=2, dense_below=64),
    ]
    with fresh_cache():
        first, hits, misses = logits(few, "inductor")
        assert (hits, misses) == (0, 1)
        again, hits, misses = logits(few, "inductor")
        assert (hits, misses) == (1, 0)
        assert torch.equal(again, first)
        for config in others:
            found, hits, misses = logits(config, "inductor")
            assert (hits, misses) == (0, 1), config
            torch.testing.assert_close(found, logits(config, "eager")[0])
            assert not torch.allclose(found, first), "the configs differ in what they compute"
