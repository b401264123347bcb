"""Banks as the exporter writes them: each expert's bytes, the maps, and what the model then is."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType

from moequant.architectures import describe
from moequant.calibrate import CalibrationOptions, Imatrix, calibrate
from moequant.calibrate.imatrix import MatrixStatistics
from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.errors import LlamaCppError
from moequant.evaluate.gguf_weights import GGUFWeights
from moequant.evaluate.perplexity import text_windows
from moequant.expert_banks import MAX_BANKS, read_banks
from moequant.gguf_file import read_model
from moequant.inspection import inspect
from moequant.pipeline import ExportOptions, export
from moequant.plan import Plan, preset_plan
from moequant.runtime.llama_cpp import LlamaCpp
from moequant.runtime.perplexity_tool import run_perplexity
from tests.checkpoints import TEXT, make_checkpoint
from tests.command_line import run

FAMILIES = ("gemma4-additive", "qwen3-moe")
# types of the experts by number, one after the other: all rows hold blocks of 32
LENGTH = 128  # tokens of a window
MIXED = ("Q8_0", "Q4_0", "Q5_1", "Q4_0", "F16")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<kind>`: a checkpoint in bfloat16; `<kind>.imatrix.gguf`: what was measured on it."""
    root = tmp_path_factory.mktemp("banks")
    for kind in FAMILIES:
        checkpoint = open_checkpoint(make_checkpoint(kind, root / kind))
        options = CalibrationOptions(tokens=1024, sequence_length=128, floor=8)
        calibrate(checkpoint, describe(checkpoint), options).write(root / f"{kind}.imatrix.gguf")
    return root


def opened(root: Path, kind: str) -> Checkpoint:
    return open_checkpoint(root / kind)


def typed(root: Path, kind: str, folder: Path, types: tuple[str, ...], rest: str = "F32") -> Path:
    """A file whose stacks have `types`, one expert after the other, and the rest `rest`."""
    plan = preset_plan(rest, describe(opened(root, kind)), has_imatrix=True)
    document = json.loads(plan.to_json())
    stacks = [name for name in document["tensors"] if name.endswith("_exps.weight")]
    assert stacks
    for name in stacks:
        entry = document["tensors"][name]
        count = entry["shape"][0]
        entry["type"] = types[0]
        entry["experts"] = {
            qtype: [e for e in range(count) if types[e % len(types)] == qtype]
            for qtype in dict.fromkeys(types)
        }
    path = folder / f"{'-'.join(types)}.json"
    path.write_text(json.dumps(document), "utf-8")
    target = path.with_suffix(".gguf")
    options = ExportOptions(plan_file=path, imatrix_file=root / f"{kind}.imatrix.gguf")
    export(opened(root, kind), target, options)
    return target


def raw_experts(path: Path) -> dict[str, list[tuple[str, bytes]]]:
    """Stack → each expert's type and bytes, by gguf-py and the maps as the format says."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found: dict[str, list[tuple[str, bytes]]] = {}
    for name, tensor in tensors.items():
        if name.endswith("_exps.weight"):
            found[name] = [(tensor.tensor_type.name, m.tobytes()) for m in tensor.data]
        elif name.endswith(".bank_map"):
            stem = name.removesuffix(".bank_map")
            places = [np.flatnonzero(column >= 0) for column in tensor.data.T]
            assert all(len(place) == 1 for place in places)
            chosen = [
                (tensors[f"{stem}.bank{bank}.weight"], tensor.data[bank, expert])
                for expert, (bank,) in enumerate(places)
            ]
            found[f"{stem}.weight"] = [(b.tensor_type.name, b.data[i].tobytes()) for b, i in chosen]
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_experts_bytes_are_those_it_has_where_all_have_its_type(
    kind: str, root: Path, tmp_path: Path
) -> None:
    """With its own importance; and everything else in the file is as in the unbanked one."""
    mixed = typed(root, kind, tmp_path, MIXED)
    uniform = {q: raw_experts(typed(root, kind, tmp_path, (q,))) for q in set(MIXED)}
    found = raw_experts(mixed)
    assert found.keys() == uniform["F16"].keys()
    for name, experts in found.items():
        assert len(experts) == 16
        for expert, (qtype, data) in enumerate(experts):
            assert qtype == MIXED[expert % len(MIXED)]
            assert (qtype, data) == uniform[qtype][name][expert]
    file, whole = read_model(mixed), read_model(tmp_path / "F16.gguf")
    assert len(whole.tensors) + len(found) * len(set(MIXED)) == len(file.tensors)
    for name, tensor in whole.tensors.items():
        if name not in found:
            assert (file.read(name) == whole.read(name)).all(), tensor
    assert len(read_banks(file)) == len(found)


def keys_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_the_keys_the_maps_and_the_size(root: Path, tmp_path: Path) -> None:
    path = typed(root, FAMILIES[0], tmp_path, MIXED)
    reader, keys = gguf.GGUFReader(path), keys_of(path)
    assert (keys["gemma4.expert_bank_version"], keys["gemma4.expert_bank_count"]) == (1, 4)
    assert {reader.fields[f"gemma4.expert_bank_{key}"].types[0].name
            for key in ("version", "count")} == {"UINT32"}  # fmt: skip
    assert keys["moequant.runtime"] == "llama.cpp with moequant's patch (expert banks)"
    assert (
        "ffn_down_exps.weight F16 × 3, Q8_0 × 4, Q5_1 × 3, Q4_0 × 6"
        in keys["moequant.plan.banks"][1]
    )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    table = tensors["blk.0.ffn_down_exps.bank_map"]
    assert table.tensor_type == GGMLQuantizationType.I32
    assert table.data.tolist()[0] == [-1, -1, -1, -1, 0, -1, -1, -1, -1, 1, -1, -1, -1, -1, 2, -1]
    assert tuple(table.shape) == (16, 4)  # ggml's order
    plan = Plan.read(path.with_suffix(".json"))
    assert plan.size_bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    whole = typed(root, FAMILIES[0], tmp_path, ("Q8_0",))
    assert not any("expert_bank" in key or "runtime" in key for key in keys_of(whole))
    assert not any("bank" in tensor.name for tensor in gguf.GGUFReader(whole).tensors)
    assert inspect(str(path)).parameters == inspect(str(whole)).parameters


@pytest.mark.parametrize("kind", FAMILIES)
def test_types_that_hold_the_same_values_give_the_weights_of_the_unbanked_file(
    kind: str, root: Path, tmp_path: Path
) -> None:
    """Banks in F32 and BF16 of a bfloat16 checkpoint: bit by bit the weights, by name."""
    model = describe(opened(root, kind))
    files = [typed(root, kind, tmp_path, types) for types in (("BF16",), ("F32", "BF16", "BF16"))]
    whole, banked = (GGUFWeights(read_model(path), model) for path in files)
    assert read_banks(read_model(files[1]))
    assert whole.tensors.keys() == banked.tensors.keys()
    for name in whole.tensors:
        assert torch.equal(whole.read(name), banked.read(name)), name


def test_eight_banks_are_written_and_read(root: Path, tmp_path: Path) -> None:
    types = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
    path = typed(root, FAMILIES[1], tmp_path, types)
    assert keys_of(path)["qwen3moe.expert_bank_count"] == MAX_BANKS == 8
    for stack in read_banks(read_model(path)).values():
        assert stack.qtypes == types * 2


def ordinary(path: Path) -> Any:
    """The checkpoint as transformers loads it, in float32."""
    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def log_probabilities(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Of all tokens, at the positions that are scored, float64."""
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, LENGTH // 2 : -1]
    return logits.double().log_softmax(-1)


def give_experts(model: Any, path: Path) -> int:
    """Put the file's experts, decoded by gguf-py, into an ordinary model; how many matrices."""
    done = 0
    for name, experts in raw_experts(path).items():
        bid, kind = int(name.split(".")[1]), name.split(".")[2]
        layer = model.model.layers[bid]
        module = layer.experts if hasattr(layer, "experts") else layer.mlp.experts
        parameter = module.down_proj if "down" in kind else module.gate_up_proj
        half = parameter.shape[1] // 2
        rows = {"ffn_gate_exps": slice(0, half), "ffn_up_exps": slice(half, None)}
        for expert, (qtype, data) in enumerate(experts):
            values = gguf.dequantize(np.frombuffer(data, np.uint8), GGMLQuantizationType[qtype])
            target = parameter.data[expert, rows.get(kind, slice(None))]
            target.copy_(torch.from_numpy(values.astype(np.float32)).reshape(target.shape))
            done += 1
    return done


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_model_is_the_ordinary_one_with_the_decoded_experts(
    kind: str, root: Path, tmp_path: Path
) -> None:
    """Perplexity and KLD of `evaluate` against transformers' own forward and the definition."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 2, "utf-8")
    path = typed(root, kind, tmp_path, MIXED)
    result = run("evaluate", path, "--reference", root / kind, "--text", text, "--context", LENGTH,
                 "--sample-tokens", "0", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["models"]
    windows = text_windows(root / kind, text, LENGTH, describe(opened(root, kind)))
    model = ordinary(root / kind)
    before = log_probabilities(model, windows)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert give_experts(model, path) == 16 * len(raw_experts(path))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    after = log_probabilities(model, windows)
    kld = (before.exp() * (before - after)).sum(-1)
    nll = -after.gather(-1, windows[:, LENGTH // 2 + 1 :, None])
    assert kld.mean() > 1e-4  # the banks are not lossless
    assert row["kld"]["mean"] == pytest.approx(float(kld.mean()), rel=1e-3)
    assert row["kld"]["max"] == pytest.approx(float(kld.max()), rel=1e-3)
    assert row["perplexity"]["ppl"] == pytest.approx(float(nll.mean().exp()), rel=1e-5)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kind", FAMILIES)
def test_stock_llama_cpp_refuses_the_file(
    kind: str, root: Path, tmp_path: Path, llama_cpp: LlamaCpp
) -> None:
    """By its own error and exit code, before anything is computed."""
    path, text = typed(root, kind, tmp_path, MIXED), tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    with pytest.raises(LlamaCppError) as caught:
        run_perplexity(llama_cpp, ["-m", str(path), "-f", str(text), "-c", "64", "-b", "64",
                                   "-t", "1"], timeout=60)  # fmt: skip
    said = str(caught.value)
    assert said.startswith("llama-perplexity failed with exit code 1:")  # a signal is negative
    assert re.search(r"tensor 'blk\.0\.ffn_\w+_exps\.weight' not found", said)


def test_banks_by_the_rule_are_those_of_the_saved_plan(root: Path, tmp_path: Path) -> None:
    """`--expert-precision per-expert` and `--plan` with what it saved make one file."""
    kind = FAMILIES[1]
    given = ("--imatrix", root / f"{kind}.imatrix.gguf")
    one, other, plan = (tmp_path / name for name in ("one.gguf", "other.gguf", "plan.json"))
    result = run("export", root / kind, "-o", one, *given, "--quant", "Q3_K_M",
                 "--expert-precision", "per-expert", "--save-plan", plan)  # fmt: skip
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "Only a llama.cpp with moequant's patch (expert banks) runs the file" in shown
    assert "ffn_gate_exps × 4 (layers 0-3): experts of Q4_K × 3, Q3_K × 9, Q2_K × 4" in shown
    result = run("export", root / kind, "-o", other, *given, "--plan", plan, "--json")
    data = json.loads(result.stdout)
    assert data["needs_patched_llama_cpp"] is True
    assert set(data["banks"]) == set(data["edited"])
    assert one.read_bytes() == other.read_bytes()
    shown = run("inspect", one).output
    for expected in ("moequant.runtime", "expert_bank_count", "ffn_gate_exps.bank2"):
        assert expected in shown
    preset = preset_plan("Q3_K_M", describe(opened(root, kind)), has_imatrix=True)
    maps = 4 * 16 * sum(len(banks) for banks in data["banks"].values())
    step = max(t.n_params // t.shape[0] for t in preset.tensors if "_exps" in t.name) * 3 / 8
    assert 0 <= preset.size_bytes + maps - data["bytes"] < step


def refused(*arguments: object) -> str:
    result = run("export", *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def test_what_goes_against_banks_is_refused_before_any_work(root: Path, tmp_path: Path) -> None:
    kind, path, plan = root / FAMILIES[0], tmp_path / "model.gguf", tmp_path / "plan.json"
    wanted = (kind, "-o", path, "--expert-precision", "per-expert")
    assert "leave out --no-calibration" in refused(*wanted, "--no-calibration")
    said = refused(*wanted, "--quant", "Q8_0")
    assert "under Q8_0 experts of one tensor cannot differ" in said
    assert "the model has no experts" in refused(*wanted, "--without-experts")
    assert "cannot run expert banks" in refused(*wanted, "--ollama", "mine")
    banked = typed(root, FAMILIES[0], tmp_path, MIXED)
    banked.with_suffix(".json").rename(plan)
    said = refused(kind, "-o", path, "--plan", plan, "--ollama", "mine")
    assert "plan.json, which gives experts of one layer different types" in said
    assert "no use beside --plan" in refused(*wanted, "--plan", plan)
    assert not list(tmp_path.glob("model*"))


def test_an_imatrix_without_gates_is_refused(root: Path, tmp_path: Path) -> None:
    """llama-imatrix's has none; here they are taken out of ours."""
    kind = FAMILIES[1]
    imatrix = Imatrix.read(root / f"{kind}.imatrix.gguf")
    plain = {name: MatrixStatistics(e.in_sum2, e.counts) for name, e in imatrix.entries.items()}
    Imatrix(plain, imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size).write(
        tmp_path / "plain.gguf"
    )
    said = refused(root / kind, "-o", tmp_path / "model.gguf", "--expert-precision", "per-expert",
                   "--imatrix", tmp_path / "plain.gguf")  # fmt: skip
    assert "ranks experts by their gates" in said
    assert "blk.0.ffn_gate_exps.weight" in said
    assert not (tmp_path / "model.gguf").exists()
