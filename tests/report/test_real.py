"""The page of a real export, evaluation and routing analysis: what the commands print, it reads."""

import json
from pathlib import Path

from click.testing import CliRunner

from moequant.cli import main


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_page_of_what_was_really_measured(tiny_model: Path, tmp_path: Path) -> None:
    made, text = tmp_path / "model.gguf", tiny_model / "held-out.txt"
    exported = json.loads(run("export", tiny_model, "-o", made, "--quant", "Q4_K_M", "--report",
                              "--calibration-tokens", 2048, "--perplexity", text,
                              "--json"))  # fmt: skip
    page = made.with_suffix(".html")
    assert exported["report"] == str(page)
    assert f"{exported['perplexity']['after']['ppl']:.2f}" in page.read_text("utf-8")
    evaluation, routing = tmp_path / "evaluation.json", tmp_path / "routing.json"
    run("evaluate", made, "--reference", tiny_model, "--text", text, "--tokens", 1024,
        "--sample-tokens", 512, "--baseline", "int8", "--save", evaluation)  # fmt: skip
    routing.write_text(run("routing", tiny_model, "--tokens", 512, "--top", 1, "--json"), "utf-8")
    run("report", evaluation, "--routing", routing, "--force")
    found, html = json.loads(evaluation.read_text("utf-8")), page.read_text("utf-8")
    for row in found["models"]:
        assert row["name"] in html
    for tensor in found["models"][0]["worst_tensors"]:
        assert tensor in html
    assert "top-1" in html
    assert "Not in this report" not in html
