"""`moequant evaluate` on real files: ours, llama-quantize's, split, banked, damaged."""

import json
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType

from moequant.checkpoint import open_checkpoint
from moequant.cli import main
from moequant.pipeline import ExportOptions, export
from moequant.runtime.llama_cpp import LlamaCpp
from tests.banked_files import Q8_0, bank_tensors
from tests.checkpoints import make_checkpoint
from tests.gguf_files import rewrite, split

FEW = ("--tokens", "1024", "--sample-tokens", "512")
LAYERS, KEYS = 6, {"file", "reference", "engine", "text", "notes", "reference_perplexity", "models"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def measured(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(*arguments: object, code: int = 2) -> str:
    """One message, no traceback, as one line of words."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model as F32, Q2_K, Q4_K_M and Q8_0, without calibration."""
    folder = tmp_path_factory.mktemp("files")
    for preset in ("F32", "Q2_K", "Q4_K_M", "Q8_0"):
        options = ExportOptions(preset=preset, calibration=None)
        export(open_checkpoint(str(tiny_model)), folder / f"{preset}.gguf", options)
    return folder


@pytest.fixture(scope="module")
def held_out(tiny_model: Path) -> tuple[object, ...]:
    return "--text", tiny_model / "held-out.txt"


def test_what_is_printed(files: Path, tiny_model: Path, held_out: tuple[object, ...]) -> None:
    result = run(files / "Q4_K_M.gguf", "--reference", tiny_model, *held_out, *FEW)
    assert result.exit_code == 0, result.output
    for word in ("KLD mean", "KLD 99.9%", "same top token", "Δp RMS", "router overlap", "Q4_K"):
        assert word in result.stdout
    assert result.stdout.count("← hurts most") == 3


def test_the_json_is_whole_and_can_be_kept(
    files: Path, tiny_model: Path, held_out: tuple[object, ...], tmp_path: Path
) -> None:
    kept = tmp_path / "evaluation.json"
    found = measured(
        files / "Q2_K.gguf", "--reference", tiny_model, *held_out, *FEW, "--save", kept
    )
    assert json.loads(kept.read_text("utf-8")) == found
    assert set(found) == KEYS
    assert found["notes"] == []
    assert found["text"]["tokens_scored"] == 2 * 255
    (row,) = found["models"]
    assert row["kld"]["min"] < row["kld"]["median"] < row["kld"]["p99"] < row["kld"]["max"]
    assert sum(row["kld_histogram"]["counts"]) == 2 * 255
    assert [layer["layer"] for layer in row["layers"]] == list(range(LAYERS))
    assert all(0.5 < layer["router_overlap"] < 1 for layer in row["layers"])
    assert len(row["worst_layers"]) == len(row["worst_tensors"]) == 3
    types = {tensor["name"]: tensor["qtype"] for tensor in row["tensors"]}
    assert types["blk.0.ffn_gate_up_exps.weight"] == "Q2_K"
    assert row["bytes"] == sum(tensor["nbytes"] for tensor in row["tensors"])
    again = refused(files / "Q2_K.gguf", "--reference", tiny_model, "--save", kept)
    assert "exists" in again


@pytest.mark.llama_cpp
@pytest.mark.parametrize("preset", ["Q2_K", "Q4_K_M"])
def test_both_engines_agree(
    preset: str, files: Path, tiny_model: Path, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"  # of more than is wanted, the engines take other windows
    text.write_text((tiny_model / "held-out.txt").read_text("utf-8")[:24000], "utf-8")
    arguments = (files / f"{preset}.gguf", "--reference", tiny_model, "--text", text)
    ours = measured(*arguments, "--sample-tokens", "0")
    theirs = measured(*arguments, "--engine", "llama.cpp", "--threads", "1")
    assert theirs["engine"] == "llama.cpp"
    assert theirs["text"] == ours["text"]
    for key in ("reference_perplexity", "perplexity"):
        here, there = ((found if "ref" in key else found["models"][0]) for found in (ours, theirs))
        assert here[key]["ppl"] == pytest.approx(there[key]["ppl"], rel=5e-3)
        assert here[key]["token_stderr"] == pytest.approx(there[key]["stderr"], rel=2e-2)
    a, b = ours["models"][0], theirs["models"][0]
    assert a["kld"]["mean"] == pytest.approx(b["kld"]["mean"], rel=0.05, abs=1e-4)
    assert a["kld"]["token_stderr"] == pytest.approx(b["kld"]["stderr"], rel=0.15)
    assert a["kld"]["stderr"] > a["kld"]["token_stderr"]
    assert a["kld"]["median"] == pytest.approx(b["kld"]["median"], rel=0.1)
    assert a["kld"]["p99"] == pytest.approx(b["kld"]["p99"], rel=0.15)
    assert a["top1"]["share"] == pytest.approx(b["top1"]["share"], abs=0.01)
    assert a["delta_p"]["rms"] == pytest.approx(b["delta_p"]["rms"], rel=0.1)
    assert a["ppl_ratio"]["value"] == pytest.approx(b["ppl_ratio"]["value"], rel=5e-3)
    assert a["ppl_ratio"]["token_stderr"] == pytest.approx(b["ppl_ratio"]["stderr"], rel=0.1)
    assert (b["layers"], b["worst_tensors"]) == ([], [])


@pytest.mark.llama_cpp
def test_a_file_by_llama_quantize(
    files: Path, tiny_model: Path, held_out: tuple[object, ...], llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    made = tmp_path / "theirs.gguf"
    command = [llama_cpp.tool("llama-quantize"), files / "F32.gguf", made, "Q4_K_M", "1"]
    subprocess.run(command, check=True, capture_output=True)
    arguments = ("--reference", tiny_model, *held_out, *FEW[:2], "--sample-tokens", "0")
    theirs = measured(made, *arguments)["models"][0]
    ours = measured(files / "Q4_K_M.gguf", *arguments)["models"][0]
    assert [t["qtype"] for t in theirs["tensors"]] == [t["qtype"] for t in ours["tensors"]]
    assert 0.5 < theirs["kld"]["mean"] / ours["kld"]["mean"] < 2.0


def test_a_gguf_file_as_reference(
    files: Path, tiny_model: Path, held_out: tuple[object, ...]
) -> None:
    """The F32 file is the checkpoint, its tokenizer included."""
    arguments = (files / "Q4_K_M.gguf", *held_out, *FEW, "--reference")
    by_file = measured(*arguments, files / "F32.gguf")
    by_checkpoint = measured(*arguments, tiny_model)
    assert by_file["reference"] == "F32.gguf"
    assert by_file["text"] == by_checkpoint["text"]
    a, b = by_file["models"][0], by_checkpoint["models"][0]
    for part in ("kld", "perplexity", "delta_p"):
        assert a[part] == pytest.approx(b[part], rel=1e-3, abs=1e-7)
    for ours, theirs in zip(a["layers"], b["layers"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert a["worst_tensors"] == b["worst_tensors"]


def test_a_split_file_is_the_whole_one(
    files: Path, tiny_model: Path, held_out: tuple[object, ...], tmp_path: Path
) -> None:
    first = split(files / "Q4_K_M.gguf", tmp_path / "shards", 40)
    arguments = ("--reference", tiny_model, *held_out, *FEW)
    whole, shards = measured(files / "Q4_K_M.gguf", *arguments), measured(first, *arguments)
    assert len(list(first.parent.iterdir())) > 2
    for found in (whole, shards):
        del found["file"], found["models"][0]["name"]
        found["models"][0]["tensors"].sort(key=lambda tensor: tensor["name"])
    assert shards == whole


def banked(source: Path, target: Path) -> None:
    """`source` with the down projections of layer 1 in two banks: even experts, and odd as Q8_0."""
    name = "blk.1.ffn_down_exps"
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == f"{name}.weight")
    keys = {"gemma4.expert_bank_version": 1, "gemma4.expert_bank_count": 2}
    rewrite(source, target, tensors=bank_tensors(tensor, (None, Q8_0)), keys=keys)


def test_a_banked_file(
    files: Path, tiny_model: Path, held_out: tuple[object, ...], tmp_path: Path
) -> None:
    banked(files / "Q4_K_M.gguf", tmp_path / "banked.gguf")
    arguments = (*held_out, *FEW, "--reference")
    (row,) = measured(tmp_path / "banked.gguf", *arguments, files / "Q4_K_M.gguf")["models"]
    types = {tensor["name"]: tensor["qtype"] for tensor in row["tensors"]}
    assert "+Q8_0" in types["blk.1.ffn_down_exps.weight"]
    errors = {t["name"]: t["nmse"] for t in row["tensors"]}
    assert 0 < errors.pop("blk.1.ffn_down_exps.weight") < 1e-4  # Q8_0 of half the experts
    assert {error for error in errors.values() if error is not None} == {0.0}


@pytest.mark.llama_cpp
def test_the_patched_llama_cpp_measures_a_banked_file(
    files: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """By both engines on the same windows; and as the reference of another file."""
    text, path = tmp_path / "text.txt", tmp_path / "banked.gguf"
    text.write_text((tiny_model / "held-out.txt").read_text("utf-8")[:12000], "utf-8")
    banked(files / "Q4_K_M.gguf", path)
    arguments = ("--reference", tiny_model, "--text", text, "--context", "256")
    ours = measured(path, *arguments, "--sample-tokens", "0")
    theirs = measured(path, *arguments, "--engine", "llama.cpp", "--threads", "1")
    assert ours["text"]["windows"] == theirs["text"]["windows"] > 8
    (one,), (other,) = ours["models"], theirs["models"]
    assert other["perplexity"]["ppl"] == pytest.approx(one["perplexity"]["ppl"], rel=5e-3)
    assert 0 < other["kld"]["mean"] - one["kld"]["mean"] < 1e-3  # activations in 8 bits
    against = measured(files / "Q4_K_M.gguf", *arguments[2:], "--reference", path,
                       "--engine", "llama.cpp", "--threads", "1")  # fmt: skip
    assert against["models"][0]["kld"]["mean"] < one["kld"]["mean"] / 2


def test_the_dense_part_against_the_whole(tiny_model: Path, tmp_path: Path) -> None:
    made = tmp_path / "dense.gguf"
    arguments = ["export", tiny_model, "-o", made, "--quant", "F32", "--without-experts"]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    found = measured(made, "--reference", tiny_model, *FEW)
    (row,) = found["models"]
    assert any("not made of the same tensors" in note for note in found["notes"])
    assert row["worst_tensors"] == []
    assert {layer["router_overlap"] for layer in row["layers"]} == {None}
    assert row["kld"]["mean"] > 0.05


def test_windows_are_spread_over_all_of_the_text(
    files: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Two windows of two texts: one of each, so neither text alone gives the same."""
    held_out = (tiny_model / "held-out.txt").read_text("utf-8")
    parts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for number, part in enumerate(parts):
        part.write_text(held_out[4000 * number : 4000 * (number + 1)], "utf-8")
    common = (files / "Q8_0.gguf", "--reference", tiny_model, "--tokens", 1024,
              "--sample-tokens", 0)  # fmt: skip
    both = measured(*common, "--text", parts[0], "--text", parts[1])
    first = measured(*common, "--text", parts[0])
    assert both["text"]["windows"] == 2
    assert both["reference_perplexity"]["ppl"] != pytest.approx(
        first["reference_perplexity"]["ppl"]
    )


def test_what_is_read_is_never_written_over(files: Path, tiny_model: Path, tmp_path: Path) -> None:
    first = split(files / "Q8_0.gguf", tmp_path / "shards", 40)
    second = sorted(first.parent.iterdir())[1]
    before = second.read_bytes()
    said = refused(first, "--reference", tiny_model, "--save", second, "--force")
    assert "belongs to what is read" in said
    assert second.read_bytes() == before


def test_a_context_beyond_the_model_s_is_refused(files: Path, tiny_model: Path) -> None:
    said = refused(files / "Q8_0.gguf", "--reference", tiny_model, "--context", 4096)
    assert "4096" in said and "2048" in said


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_baselines_stand_beside_the_file(
    kind: str, files: Path, tiny_model: Path, held_out: tuple[object, ...]
) -> None:
    found = measured(files / "Q8_0.gguf", "--reference", tiny_model, *held_out, *FEW[:2],
                     "--sample-tokens", 0, "--baseline", kind, "--baseline", kind)  # fmt: skip
    file, baseline = found["models"]
    assert baseline["name"] == f"bitsandbytes {kind}"
    assert 0 < baseline["bytes"] != file["bytes"]
    assert baseline["kld"]["mean"] > file["kld"]["mean"] > 0
    assert len(baseline["layers"]) == LAYERS


def test_chat_renders_the_template(files: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen3-moe", tmp_path / "model")
    made = tmp_path / "model.gguf"
    export(open_checkpoint(str(checkpoint)), made, ExportOptions(preset="Q4_0", calibration=None))
    text = tmp_path / "text.txt"
    text.write_text("What turns the wheel?\n\nThe river does.\n\nAnd at night?\n\nIt rests.\n" * 20)
    common = ("--reference", checkpoint, "--text", text, "--context", 64)
    plain, chat = measured(made, *common), measured(made, *common, "--chat")
    assert chat["text"]["chat"] is True
    assert chat["text"]["windows"] > plain["text"]["windows"]  # turn markers are tokens, too
    by_file = measured(made, *common[2:], "--chat", "--reference", made)
    assert by_file["text"] == chat["text"]  # the file's own template
    assert by_file["models"][0]["kld"]["max"] < 1e-6


def test_chat_without_a_template_is_refused(files: Path, tmp_path: Path) -> None:
    rewrite(files / "Q8_0.gguf", tmp_path / "x.gguf", keys={"tokenizer.chat_template": None})
    said = refused(files / "Q8_0.gguf", "--reference", tmp_path / "x.gguf", "--chat")
    assert "x.gguf has no chat template" in said


def test_a_file_of_another_model_is_refused(files: Path, tmp_path: Path) -> None:
    other = make_checkpoint("gemma4-additive", tmp_path / "other")
    said = refused(files / "Q8_0.gguf", "--reference", other)
    for part in ("not a file of the model", "attn_output", "vocab_size", "block_count"):
        assert part in said


def test_another_vocabulary_is_refused(files: Path, tiny_model: Path, tmp_path: Path) -> None:
    tokens = gguf.GGUFReader(files / "Q8_0.gguf").fields["tokenizer.ggml.tokens"].contents()
    tokens[300] = "somebody else's"
    rewrite(files / "Q8_0.gguf", tmp_path / "x.gguf", keys={"tokenizer.ggml.tokens": tokens})
    said = refused(tmp_path / "x.gguf", "--reference", tiny_model)
    assert "300" in said
    assert "somebody else's" in said


def test_other_metadata_is_a_note(
    files: Path, tiny_model: Path, held_out: tuple[object, ...], tmp_path: Path
) -> None:
    """And it is the file's that counts, as it would in llama.cpp."""
    keys = {"gemma4.rope.freq_base": np.float32(50.0)}
    rewrite(files / "F32.gguf", tmp_path / "x.gguf", keys={k: float(v) for k, v in keys.items()})
    found = measured(tmp_path / "x.gguf", "--reference", tiny_model, *held_out, *FEW)
    assert any("rope.freq_base" in note for note in found["notes"])
    assert found["models"][0]["kld"]["mean"] > 1e-4


def test_text_under_a_window_is_refused(files: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    said = refused(files / "Q8_0.gguf", "--reference", tiny_model, "--text", tmp_path / "short.txt")
    assert "short.txt" in said
    assert "longer text" in said


def test_a_type_nobody_decodes_is_refused(files: Path, tiny_model: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    (tensor,) = [t for t in gguf.GGUFReader(files / "F32.gguf").tensors if t.name == name]
    values = np.array(tensor.data).astype(np.float64)
    rewrite(files / "F32.gguf", tmp_path / "x.gguf",
            tensors={name: (values, GGMLQuantizationType.F64)})  # fmt: skip
    said = refused(tmp_path / "x.gguf", "--reference", tiny_model)
    assert name in said
    assert "F64" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--engine", "llama.cpp", "--chat"), "--chat needs the engine moequant"),
        (("--engine", "llama.cpp", "--baseline", "nf4"), "--baseline needs the engine moequant"),
        (("--threads", "2"), "only for --engine llama.cpp"),
        (("--device", "cuda:9"), "--device cuda:9"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_options_that_do_not_go_together(
    options: tuple[str, ...], words: str, files: Path, tiny_model: Path
) -> None:
    assert words in refused(files / "Q8_0.gguf", "--reference", tiny_model, *options)


def test_a_baseline_needs_a_checkpoint(files: Path) -> None:
    said = refused(files / "Q8_0.gguf", "--reference", files / "F32.gguf", "--baseline", "nf4")
    assert "quantizes a checkpoint" in said


def test_what_is_no_gguf_file_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.gguf", "--reference", tiny_model)
    assert "name the folder" in refused(tiny_model / "config.json", "--reference", tiny_model)
    assert "is a folder" in refused(tiny_model, "--reference", tiny_model)
