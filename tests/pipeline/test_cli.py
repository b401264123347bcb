"""The commands as a user types them: what they print, what they leave, and how they refuse."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from moequant.commands.shared import print_json
from moequant.gguf_file import read_gguf
from moequant.plan import PRESETS
from tests.checkpoints import make_checkpoint
from tests.command_line import SHORT, export_by_stages, run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gemma4-additive", tmp_path_factory.mktemp("cli") / "tiny")


def test_export_prints_fallbacks_sizes_and_perplexity(checkpoint: Path, tmp_path: Path) -> None:
    path, text = tmp_path / "model.gguf", checkpoint / "README.md"
    text.write_text("A text that is long enough to be measured. " * 400)
    result = run("export", checkpoint, "-o", path, *SHORT, "--perplexity", text)
    assert result.exit_code == 0, result.output
    assert "ffn_down_exps × 2 (layers 0-1): Q4_K → Q5_0, +1.00 bits per weight" in result.output
    for expected in ("bits per weight", "perplexity before", "perplexity after", "token_embd"):
        assert expected in result.output
    assert path.is_file()


def test_export_json_agrees_with_the_file(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    result = run("export", checkpoint, "-o", path, "--quant", "q5_k_m", *SHORT, "--json")
    data = json.loads(result.stdout)
    assert data["file_bytes"] == path.stat().st_size
    reader = gguf.GGUFReader(path)
    assert data["bytes"] == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert data["preset"] == "Q5_K_M"
    assert reader.fields["moequant.plan.preset"].contents() == "Q5_K_M"
    assert reader.fields["moequant.parameters.total"].contents() == data["parameters"]["total"]
    shares = reader.fields["moequant.experts.routed_share"].contents()
    layers = reader.fields["moequant.experts.layers"].contents()
    assert len(shares) == 16 * len(layers)
    assert sum(shares) == pytest.approx(len(layers), abs=1e-4)


def test_the_stages_one_by_one_give_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    whole, parts, imatrix = export_by_stages(checkpoint, tmp_path)
    one, other = read_gguf(whole), read_gguf(parts)
    assert one.metadata.pop("moequant.calibration.source") == "measured"
    assert other.metadata.pop("moequant.calibration.source") == imatrix.name
    assert one.metadata == other.metadata
    assert one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        assert (one.read(name) == other.read(name)).all(), name


def test_export_keeps_plan_and_imatrix_if_asked(checkpoint: Path, tmp_path: Path) -> None:
    kept = (tmp_path / "kept.imatrix.gguf", tmp_path / "kept.json")
    result = run("export", checkpoint, "-o", tmp_path / "model.gguf", *SHORT,
                 "--save-imatrix", kept[0], "--save-plan", kept[1])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(run("inspect", kept[0], "--json").stdout)["kind"] == "imatrix"
    assert '"Q4_K"' in kept[1].read_text()


def test_an_edited_plan_is_followed(checkpoint: Path, tmp_path: Path) -> None:
    plan, path = tmp_path / "plan.json", tmp_path / "model.gguf"
    run("plan", checkpoint, "-o", plan)
    text = plan.read_text()
    name = "blk.0.attn_q.weight"
    line = next(line for line in text.splitlines() if f'"{name}"' in line)
    plan.write_text(text.replace(line, line.replace("Q4_K", "Q3_K")))
    result = run("export", checkpoint, "-o", path, "--plan", plan, "--no-calibration")
    assert result.exit_code == 0, result.output
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types[name] == "Q3_K"
    assert gguf.GGUFReader(path).fields["moequant.plan.edited"].contents() == [name]
    assert "1 tensors edited" in result.output


def test_inspect_shows_a_checkpoint_a_file_and_an_imatrix(checkpoint: Path, tmp_path: Path) -> None:
    path, imatrix = tmp_path / "model.gguf", tmp_path / "imatrix.gguf"
    run("export", checkpoint, "-o", path, *SHORT, "--save-imatrix", imatrix)
    found = {str(p): json.loads(run("inspect", p, "--json").stdout)
             for p in (checkpoint, path, imatrix)}  # fmt: skip
    assert [data["kind"] for data in found.values()] == ["checkpoint", "gguf", "imatrix"]
    before, after = found[str(checkpoint)], found[str(path)]
    assert before["parameters"] == after["parameters"]
    assert before["architecture"] == after["architecture"] == "gemma4"
    shards = checkpoint.glob("*.safetensors")
    numels = [tensor.numel() for shard in shards for tensor in load_file(shard).values()]
    assert before["parameters"]["total"] == sum(numels)
    for p in found:
        shown = run("inspect", p)
        assert shown.exit_code == 0
        assert "Traceback" not in shown.output
    assert "experts by routed share" in run("inspect", imatrix).output
    assert "moequant.source.digest" in run("inspect", path).output


def test_inspect_names_what_an_export_leaves_out(tmp_path: Path) -> None:
    folder = make_checkpoint("gemma4-conditional", tmp_path / "conditional")
    shown = run("inspect", folder)
    assert "left out:" in shown.output
    assert "vision_tower" in shown.output
    assert "audio_tower" in shown.output


def test_presets_lists_every_preset() -> None:
    data = json.loads(run("presets", "--json").stdout)
    assert [row["name"] for row in data] == list(PRESETS)
    assert all(name in run("presets").output for name in PRESETS)


def test_every_command_has_help() -> None:
    for command in ("export", "calibrate", "plan", "inspect", "presets"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "Usage:" in result.output


def refused(code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stderr


def test_bad_usage_is_one_message_and_exit_code_2(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    existing = tmp_path / "there.gguf"
    existing.touch()
    assert "exists" in refused(2, "export", checkpoint, "-o", existing)
    assert "Q4_K_M" in refused(2, "export", checkpoint, "-o", path, "--quant", "Q9_Z")
    assert "exclude each other" in refused(
        2, "export", checkpoint, "-o", path, "--imatrix", existing, "--no-calibration"
    )
    assert "no-such" in refused(2, "export", tmp_path / "no-such", "-o", path)
    assert "nowhere" in refused(2, "export", checkpoint, "-o", tmp_path / "nowhere" / "m.gguf")
    assert "there.gguf" in refused(2, "inspect", existing)
    missing = tmp_path / "missing.txt"
    assert "missing.txt" in refused(2, "export", checkpoint, "-o", path, "--calibration", missing)
    assert not path.exists()


def test_options_without_effect_and_files_used_twice_are_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    path, plan = tmp_path / "model.gguf", tmp_path / "plan.json"
    run("plan", checkpoint, "-o", plan)
    export = ("export", checkpoint, "-o", path)
    assert "--seed" in refused(2, *export, "--no-calibration", "--seed", 5)
    assert "--quant" in refused(2, *export, "--plan", plan, "--quant", "Q2_K")
    assert "two outputs" in refused(2, *export, "--save-plan", path)
    assert "belongs to what is read" in refused(
        2, "export", checkpoint, "--force", "-o", next(checkpoint.glob("*.safetensors"))
    )
    assert "belongs to what is read" in refused(
        2, "export", checkpoint, "--plan", plan, "--force", "-o", plan
    )
    assert not path.exists()


@pytest.mark.parametrize(
    ("output", "options", "kept"),
    [
        ("m.gguf", ("--ollama", "x", "--save-plan", "m.Modelfile"), None),
        ("p.gguf", ("--ollama", "x", "--force", "--plan", "p.Modelfile"), "p.Modelfile"),
        ("h.gguf", ("--report", "--force", "--perplexity", "h.html"), "h.html"),
        ("m.gguf", ("--report", "--save-plan", "m.html"), None),
        ("m.html", ("--report",), None),
        ("m.Modelfile", ("--ollama", "x"), None),
    ],
)
def test_no_file_of_an_export_replaces_another(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    output: str, options: tuple[str, ...], kept: str | None,
) -> None:  # fmt: skip
    """The page and the Modelfile, too, against what is saved beside them and what is read."""
    monkeypatch.chdir(tmp_path)
    if kept == "p.Modelfile":
        assert run("plan", checkpoint, "-o", kept).exit_code == 0
    elif kept is not None:
        Path(kept).write_text("A text that is long enough to be measured. " * 400)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    message = refused(2, "export", checkpoint, "-o", output, "--no-calibration", *options)
    assert ("two outputs" if kept is None else "belongs to what is read") in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_names_are_printed_as_they_are(checkpoint: Path, tmp_path: Path) -> None:
    """No emoji for `:rocket:`, and no escape code that a terminal would obey."""
    path = tmp_path / ":rocket:.gguf"
    result = run("export", checkpoint, "-o", path, "--no-calibration", "--quant", "Q8_0")
    assert ":rocket:.gguf" in "".join(result.output.split())
    message = refused(2, "export", checkpoint, "-o", tmp_path / "\x1b[31mno" / "m.gguf")
    assert "\x1b" not in message and "\\x1b[31mno" in "".join(message.split())


def test_json_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"ppl": float("inf"), "rows": [1.5, (float("nan"), 2)]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "ppl": None, "rows": [1.5, [None, 2]],
    }  # fmt: skip


def test_the_list_of_commands_has_whole_sentences() -> None:
    listed = run("--help").output.partition("Commands:")[2].strip().splitlines()
    assert len(listed) == 12
    assert all(line.endswith(".") and "..." not in line for line in listed), listed


def test_a_preset_that_needs_no_imatrix_still_refuses_another_models(
    checkpoint: Path, tmp_path: Path
) -> None:
    other = make_checkpoint("gemma4-dense", tmp_path / "other")
    imatrix, path = tmp_path / "imatrix.gguf", tmp_path / "model.gguf"
    assert run("calibrate", checkpoint, "-o", imatrix, *SHORT).exit_code == 0
    message = refused(2, "export", other, "-o", path, "--quant", "Q8_0", "--imatrix", imatrix)
    assert "belongs to another model" in message
    assert not path.exists()


def test_a_file_says_where_its_importance_came_from(checkpoint: Path, tmp_path: Path) -> None:
    twin = make_checkpoint("gemma4-additive", tmp_path / "twin", max_position_embeddings=4096)
    path, imatrix = tmp_path / "model.gguf", tmp_path / "one.imatrix.gguf"
    measured = run("export", checkpoint, "-o", path, *SHORT, "--save-imatrix", imatrix, "--json")
    assert json.loads(measured.stdout)["notes"] == []
    fields = gguf.GGUFReader(path).fields
    assert fields["moequant.calibration.source"].contents() == "measured"
    assert fields["moequant.plan.unweighted"].contents() == ["token_embd.weight"]
    given = run("export", twin, "-o", path, "--force", "--imatrix", imatrix, "--json")
    assert "another checkpoint" in json.loads(given.stdout)["notes"][0]
    fields = gguf.GGUFReader(path).fields
    assert fields["moequant.calibration.source"].contents() == "one.imatrix.gguf"
    source, calibrated = (fields[f"moequant.{key}.digest"].contents()
                          for key in ("source", "checkpoint"))  # fmt: skip
    assert source != calibrated
    run("export", checkpoint, "-o", path, "--force", "--no-calibration")
    fields = gguf.GGUFReader(path).fields
    assert fields["moequant.calibration.source"].contents() == "none"


def test_an_imatrix_is_saved_even_if_the_types_have_no_use_for_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    imatrix = tmp_path / "kept.imatrix.gguf"
    result = run("export", checkpoint, "-o", tmp_path / "m.gguf", "--quant", "Q8_0", *SHORT,
                 "--save-imatrix", imatrix)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(run("inspect", imatrix, "--json").stdout)["kind"] == "imatrix"


def test_a_tokenizer_that_is_not_served_is_refused_before_calibration(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3-moe", tmp_path / "qwen")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    imatrix = tmp_path / "imatrix.gguf"
    message = refused(2, "export", folder, "-o", tmp_path / "m.gguf", *SHORT,
                      "--save-imatrix", imatrix)  # fmt: skip
    assert "calibrate" not in message
    assert not imatrix.exists()


def test_an_imatrix_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = make_checkpoint("qwen3-moe", tmp_path / "other")
    imatrix, path = tmp_path / "other.imatrix.gguf", tmp_path / "model.gguf"
    assert run("calibrate", other, "-o", imatrix, *SHORT).exit_code == 0
    message = refused(2, "export", checkpoint, "-o", path, "--imatrix", imatrix)
    assert "imatrix" in message
    assert not path.exists()


@pytest.mark.parametrize("calibration", [SHORT, ("--no-calibration",)])
def test_a_nan_in_a_weight_is_named(tmp_path: Path, calibration: tuple[str, ...]) -> None:
    folder = make_checkpoint("gemma4-additive", tmp_path / "nan")
    name = "model.layers.2.experts.down_proj"
    shard = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    tensors[name][3, 1, 4:7] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    path = tmp_path / "model.gguf"
    message = refused(2, "export", folder, "-o", path, *calibration)
    assert name in message
    assert "3 NaN" in message
    assert list(tmp_path.iterdir()) == [folder]


def test_a_perplexity_text_that_is_too_short_is_refused_before_the_work(
    checkpoint: Path, tmp_path: Path
) -> None:
    text, path = tmp_path / "short.txt", tmp_path / "model.gguf"
    text.write_text("Too short.")
    message = refused(2, "export", checkpoint, "-o", path, *SHORT, "--perplexity", text)
    assert "short.txt has 8 tokens" in message
    assert not path.exists()


def test_no_calibration_is_run_for_a_preset_that_has_no_use_for_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    result = run("export", checkpoint, "-o", tmp_path / "m.gguf", "--quant", "Q8_0", "--json")
    assert "thin_experts" not in json.loads(result.stdout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: nothing to refuse")
def test_a_device_that_is_not_there_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    message = refused(2, "export", checkpoint, "-o", path, "--device", "cuda")
    assert "cuda" in message
    assert "device" in refused(2, "export", checkpoint, "-o", path, "--device", "toaster")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_nothing_behind(tmp_path: Path, sent: signal.Signals) -> None:
    folder = make_checkpoint("gemma4-additive", tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "moequant.cli", "export", str(folder), "-o",
               str(out / "m.gguf"), "--calibration-tokens", "200000", "--sequence-length", "64",
               "--save-imatrix", str(out / "i.gguf")]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    assert "calibrate" in process.stderr.readline()  # it is at work: the first layer is done
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=120)
    # -2: CPython ends by the signal itself if it came while C code ran Python; a shell shows 130
    assert process.returncode in (130, -signal.SIGINT), stderr
    assert "Traceback" not in stderr
    assert "Stopped" in stderr
    assert list(out.iterdir()) == []
