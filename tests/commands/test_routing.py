"""`moequant routing` as a user types it: what it prints, and how it refuses."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moequant.cli import main
from tests.calibrate.models import ONE_LINE
from tests.checkpoints import make_checkpoint

SHORT = ("--sequence-length", "64", "--tokens", "128")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["routing", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gemma4-additive", tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """--text twice; a name with a space, a file with an equals sign."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a=b.txt").write_text(ONE_LINE)
    (folder / "numbers.txt").write_text(" ".join(str(n * n) for n in range(300)))
    return ("--text", f"plain prose={folder}/a=b.txt", "--text", f"[n]={folder}/numbers.txt")


def test_tables_fit_and_say_what_the_experts_do(checkpoint: Path, texts: tuple[str, ...]) -> None:
    result = run(checkpoint, *texts, *SHORT)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 120
    for expected in (
        "16 per layer, 4 per token, in 4 layers",
        "plain prose (128 tokens), [n] (128 tokens)",
        "64 if all were used alike, of 256",
        "p of top-4",
        "experts / dense branch",
    ):
        assert expected in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines if line and line[0].startswith(("off", "top-"))] == 2 * [
        "off", "top-1", "top-2", "top-3", "top-4",
    ]  # fmt: skip
    assert "of the checkpoint's" in result.stdout
    said = " ".join(result.stdout.split())
    assert "4 of 64 tokens" in said and "4 sequences, since tokens of one are alike, within" in said
    assert "plain prose has 2, [n] has 2, and 4 of each are needed." in said
    assert "by more than chance" not in said


def test_json_has_every_figure(checkpoint: Path, texts: tuple[str, ...]) -> None:
    result = run(checkpoint, *texts, *SHORT, "--top", "1, 2", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["checkpoint"] == "tiny"
    assert data["texts"] == [
        {"name": "plain prose", "tokens": 128},
        {"name": "[n]", "tokens": 128},
    ]
    assert data["sequence_length"] == 64
    (note,) = data["notes"]
    assert note.startswith("Too few sequences")
    assert [layer["layer"] for layer in data["layers"]] == [0, 1, 2, 3]
    layer = data["layers"][2]
    assert set(layer) == {
        "layer", "share", "gate_share", "gini", "entropy", "confidence", "dead", "dominant",
        "domain_share", "specialisation_bits", "specialisation_chance_bits", "specialists",
        "cosine", "branch",
    }  # fmt: skip
    shares = [layer["share"], layer["gate_share"], *layer["domain_share"].values()]
    assert [len(share) for share in shares] == [16] * 4
    assert [sum(share) for share in shares] == pytest.approx([1.0] * 4)
    assert set(layer["confidence"]) == {"top1", "chosen_mass", "entropy"}
    assert list(layer["domain_share"]) == ["plain prose", "[n]"]
    assert 0 < layer["specialisation_bits"] <= 1
    assert set(layer["cosine"]) == {"mean", "max", "pair"} and len(layer["cosine"]["pair"]) == 2
    assert set(layer["branch"]) == {"experts_rms", "dense_rms", "ratio", "cosine"}
    assert [one["name"] for one in data["ablation"]] == ["off", "top-1", "top-2", "top-4"]
    assert [one["experts"] for one in data["ablation"]] == [0, 1, 2, 4]
    off, whole = data["ablation"][0], data["ablation"][-1]
    assert (whole["delta_nll"], whole["delta_nll_stderr"]) == (0, 0)
    assert off["ppl"] / whole["ppl"] == pytest.approx(math.exp(off["delta_nll"]))
    assert 0 < whole["token_stderr"] != whole["stderr"] > 0
    assert 0 < off["delta_nll_token_stderr"] != off["delta_nll_stderr"] > 0
    assert set(whole["ppl_by_text"]) == {"plain prose", "[n]"}


def test_one_text_and_no_ablation(checkpoint: Path, texts: tuple[str, ...]) -> None:
    """Nothing is said on domains or perplexity, in tables and in JSON."""
    options = (checkpoint, *texts[:2], *SHORT, "--no-ablation")
    printed = run(*options).stdout
    assert "by chance" in printed and "prefer" not in printed and "perplexity" not in printed
    data = json.loads(run(*options, "--json").stdout)
    assert data["ablation"] is None and data["verdict"] is None and data["notes"] == []
    assert {layer["specialisation_bits"] for layer in data["layers"]} == {0.0}


def test_the_trained_example_is_worth_its_experts(tiny_model: Path) -> None:
    """The built-in texts, two windows each."""
    result = run(tiny_model, "--tokens", "1024", "--top", "1")
    assert result.exit_code == 0, result.output
    assert "No expert is dead, none dominates its layer." in result.stdout
    assert "The experts lower perplexity by" in result.stdout
    assert "Too few sequences" in result.stdout and "No expert prefers" not in result.stdout
    assert "14.2 MB of the checkpoint's 22.6 MB (63%)" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--text", "prose.txt"), "--text prose.txt: give a name and a file"),
        (("--text", "=prose.txt"), "--text =prose.txt: give a name and a file"),
        (("--text", "prose="), "--text prose=: give a name and a file"),
        (("--text", "a=x.txt", "--text", "a=y.txt"), "two texts are named 'a'"),
        (("--text", "a=no-such.txt"), "no-such.txt: no such file or folder"),
        (("--top", "1,two"), "--top 1,two: give numbers of experts"),
        (("--top", "²"), "--top ²: give numbers of experts"),
        (("--top", "17"), "--top 17: the model has 16 experts in a layer"),
        (("--top", "1", "--no-ablation"), "no use without the ablation"),
        (("--tokens", "100"), "tokens = 100, at least 512"),
        (("--device", "tpu"), "--device tpu: no such kind of device"),
    ],
)
def test_bad_input_is_one_clear_error(
    checkpoint: Path, arguments: tuple[str, ...], expected: str
) -> None:
    result = run(checkpoint, *arguments)
    assert result.exit_code == 2
    assert expected in " ".join(result.output.split())
    assert "Traceback" not in result.output and result.stdout == ""


def test_a_text_shorter_than_one_window(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too little")
    result = run(checkpoint, "--text", f"tale={tmp_path}/short.txt")
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "a window needs 512 tokens, and text tale has" in said and "--sequence-length" in said


def test_a_dense_model(tmp_path: Path) -> None:
    result = run(make_checkpoint("qwen3-dense", tmp_path / "dense"))
    assert result.exit_code == 2
    assert "dense has no layer with experts (4 dense layers)" in " ".join(result.output.split())
