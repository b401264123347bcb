"""The reader of llama-perplexity's result: only the final estimate counts."""

from pathlib import Path

import pytest

from moequant.runtime import perplexity_tool
from moequant.runtime.llama_cpp import LlamaCpp
from tests.oracles.perplexity_tool import final_estimate, llama_perplexity


def fake_tool(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> LlamaCpp:
    """A llama-perplexity that says only this."""
    script = folder / "llama-perplexity"
    script.write_text(f"#!/bin/sh\necho '{said}'\n")
    script.chmod(0o755)
    monkeypatch.setattr(perplexity_tool, "tool_command", lambda _: [str(script)])
    return LlamaCpp(folder, folder)


def test_the_final_estimate_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "[1]7.0000,[2]8.0000,\nFinal estimate: PPL = 9.5000 +/- 0.25000"
    tool = fake_tool(tmp_path, monkeypatch, said)
    assert final_estimate(tool, tmp_path / "model.gguf", tmp_path / "text") == (9.5, 0.25)


def test_a_running_figure_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = fake_tool(tmp_path, monkeypatch, "[1]7.0000,[2]8.0000,")
    with pytest.raises(AssertionError, match="8.0000"):
        llama_perplexity(tool, tmp_path / "model.gguf", tmp_path / "text")
