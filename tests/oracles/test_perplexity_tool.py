"""The runner of llama-perplexity: only the final estimate counts, and a lost one is asked again."""

from pathlib import Path

import pytest

from moequant.runtime.llama_cpp import LlamaCpp
from tests.oracles.perplexity_tool import ATTEMPTS, final_estimate, llama_perplexity


def fake_tool(folder: Path, good_call: int) -> LlamaCpp:
    """A llama-perplexity whose final estimate is there in one call and lost in the others."""
    script = folder / "llama-perplexity"
    script.write_text(
        "#!/bin/sh\n"
        f"echo call >> {folder}/calls\n"
        "echo '[1]7.0000,[2]8.0000,'\n"
        f"[ $(wc -l < {folder}/calls) -eq {good_call} ] &&"
        " echo 'Final estimate: PPL = 9.5000 +/- 0.25000'\n"
        "exit 0\n"
    )
    script.chmod(0o755)
    return LlamaCpp(folder, folder)


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


def test_a_lost_estimate_is_asked_for_again(tmp_path: Path) -> None:
    tool = fake_tool(tmp_path, good_call=3)
    assert final_estimate(tool, tmp_path / "model.gguf", tmp_path / "text") == (9.5, 0.25)
    assert calls(tmp_path) == 3


def test_a_running_figure_is_no_result(tmp_path: Path) -> None:
    tool = fake_tool(tmp_path, good_call=ATTEMPTS + 1)
    with pytest.raises(AssertionError, match="no final estimate in 5 attempts"):
        llama_perplexity(tool, tmp_path / "model.gguf", tmp_path / "text")
    assert calls(tmp_path) == ATTEMPTS
