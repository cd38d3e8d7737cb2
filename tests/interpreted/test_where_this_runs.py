"""The one test of this folder that runs in any process."""

from pathlib import Path


def test_every_other_file_skips_itself_where_kernels_are_not_interpreted() -> None:
    files = set(Path(__file__).parent.glob("test_*.py")) - {Path(__file__)}
    assert len(files) >= 5
    assert [path.name for path in files if "import interpreter" not in path.read_text()] == []
