"""The code in the documentation runs and is right; every reason has its line."""

import re
from pathlib import Path

import torch

import msa_compile
from msa_compile import Reason

ROOT = Path(__file__).parents[1]
REFUSALS = (ROOT / "docs" / "refusals.md").read_text()


def test_every_reason_has_one_line_in_the_table():
    codes = re.findall(r"^\| `(\w+)` \|", REFUSALS, re.MULTILINE)
    for reason in Reason:
        assert codes.count(reason.value) == 1, reason


def test_the_paged_cache_of_the_documentation_equals_a_contiguous_one():
    generator = torch.Generator().manual_seed(0)
    rows, heads, groups, dim, page_size, pages, new = 2, 4, 2, 16, 4, 6, 3
    length = torch.tensor([23, 17])
    k, v = torch.randn(2, rows, groups, pages * page_size, dim, generator=generator)
    q = torch.randn(rows, heads, new, dim, generator=generator)
    table = torch.randperm(rows * pages, generator=generator).view(rows, pages)

    def paged(tensor):
        made = torch.full((rows * pages, page_size, groups, dim), torch.nan)
        made[table] = tensor.transpose(1, 2).unflatten(1, (pages, page_size))
        return made

    (code,) = re.findall(r"```python\n(k = key_pages.*?)```", REFUSALS, re.DOTALL)
    given = {"key_pages": paged(k), "value_pages": paged(v), "table": table, "length": length, "q": q}
    given |= {"page_size": page_size, "msa_compile": msa_compile}
    exec(code.replace("16}", "3}"), given)
    for row in range(rows):
        end = int(length[row])
        expected = msa_compile.attention(
            q[row : row + 1], k[row : row + 1, :, :end], v[row : row + 1, :, :end],
            query_start=torch.tensor([end - new]), block_size=page_size, topk_blocks=3,
        )  # fmt: skip
        torch.testing.assert_close(given["out"][row : row + 1], expected)
