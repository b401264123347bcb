"""`.ci/run`: what its last lines and its exit code are."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "run"


@pytest.mark.parametrize(("outcome", "code"), [("1 failed, 1 passed", 2), ("2 passed", 0)])
def test_skipped_lines_and_the_closing_line_come_last(
    tmp_path: Path, outcome: str, code: int
) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci" / "run")
    closing = f"=== {outcome}, 1 skipped in 1.00s ==="
    make = tmp_path / "make"
    make.write_text(
        "#!/bin/sh\necho 'SKIPPED [1] tests/a.py:3: no GPU'\n"
        f"echo '{closing}'\necho 'make: *** something' >&2\nexit {code}\n"
    )
    make.chmod(0o755)
    browser = tmp_path / "chromium"  # so that nothing is installed here
    browser.write_text("#!/bin/sh\n")
    browser.chmod(0o755)
    result = subprocess.run(
        [tmp_path / ".ci" / "run"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code
    assert result.stdout.splitlines()[-2:] == ["SKIPPED [1] tests/a.py:3: no GPU", closing]
