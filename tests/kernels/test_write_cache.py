"""The write of a step into a cache of fixed length: each row at its own position, and the cache is left as it was."""

import torch

import msa_compile.kernels.write_cache  # noqa: F401  (registers the op)


def test_each_row_is_written_at_its_own_position_and_nothing_else_is():
    cache, update = torch.zeros(2, 3, 10, 4), torch.randn(2, 3, 2, 4)
    written = torch.ops.msa.write_cache(cache, update, torch.tensor([0, 7]))
    assert torch.equal(written[0, :, 0:2], update[0])
    assert torch.equal(written[1, :, 7:9], update[1])
    assert int(written.count_nonzero()) == update.numel()
    assert int(cache.count_nonzero()) == 0
    torch.library.opcheck(torch.ops.msa.write_cache.default, (cache, update, torch.tensor([3, 8])))
