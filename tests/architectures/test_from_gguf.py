"""`describe_gguf` against `describe`: what the file tells is what the checkpoint tells.

Files come from moequant's export and from llama.cpp's converter, of every kind of checkpoint. The
logits of the file alone are those of the checkpoint.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from moequant.architectures import describe, describe_gguf
from moequant.architectures.file_keys import FileKeys
from moequant.architectures.gemma4 import _rotated_part
from moequant.calibrate.forward import StreamedModel
from moequant.calibrate.weights import WeightSource
from moequant.checkpoint import open_checkpoint
from moequant.errors import ArchitectureError, GGUFError, MoequantError
from moequant.evaluate.gguf_weights import GGUFWeights
from moequant.gguf_file import read_model
from moequant.pipeline import ExportOptions, export
from moequant.runtime.llama_cpp import LlamaCpp
from tests.banked_files import Q8_0, banked
from tests.calibrate.models import windows
from tests.checkpoints import KINDS, make_checkpoint
from tests.gguf_files import rewrite, split
from tests.halved_files import halved
from tests.oracles.test_converter import DRIVER, VARIANTS

F32 = GGMLQuantizationType.F32

# Fields that no forward of text uses: GGUF has them elsewhere, or not at all.
UNUSED = {"architectures", "dtype", "eos_token_id", "bos_token_id", "pad_token_id", "model_type",
          "text_config", "vision_config", "audio_config", "_name_or_path",
          "image_token_id", "audio_token_id", "video_token_id",
          "boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_index"}  # fmt: skip
CASES = [*KINDS, "as-released", "shared-kv", "tied-with-head", "yarn"]
LOGITS = ["gemma4-additive-some-layers", "gemma4-ple", "shared-kv", "tied-with-head", "yarn",
          "qwen3-moe"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint per case, in a folder of its name."""
    root = tmp_path_factory.mktemp("checkpoints")
    for case in CASES:
        make = VARIANTS.get(case, lambda path, kind=case: make_checkpoint(kind, path))
        make(root / case)
    return root


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """BF16 files of the cases, as exported here; the checkpoints are BF16, so nothing is lost."""
    out = tmp_path_factory.mktemp("exported")

    def of(case: str) -> Path:
        path = out / f"{case}.gguf"
        if not path.exists():
            options = ExportOptions("BF16", calibration=None)
            export(open_checkpoint(folder / case), path, options)
        return path

    return of


@pytest.fixture(scope="module")
def converted(folder: Path, llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pinned converter makes of every case: `<case>.gguf`, BF16."""
    out = tmp_path_factory.mktemp("converted")
    jobs = [[str(folder / case), "--outfile", str(out / f"{case}.gguf"), "--outtype", "bf16"]
            for case in CASES]  # fmt: skip
    command = [sys.executable, "-c", DRIVER, str(llama_cpp.source), json.dumps(jobs)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return out


def check_same(checkpoint_folder: Path, path: Path) -> None:
    """The description of the file is the checkpoint's, but for names before "layers."."""
    ours, theirs = describe_gguf(read_model(path)), describe(open_checkpoint(checkpoint_folder))
    expected = {k: v for k, v in theirs.config.items() if k not in UNUSED}
    if "tied-with-head" in str(checkpoint_folder):  # a head makes it untied, whatever config says
        expected["tie_word_embeddings"] = False
    found = {k: v for k, v in ours.config.items() if k not in UNUSED}
    assert found == expected | _without_experts(ours.config, expected)
    assert len(expected) > 20
    assert _tensors(ours, "model.") == _tensors(theirs, theirs.prefix)
    for name in ("architecture", "block_count", "expert_count", "expert_used_count", "moe_layers",
                 "hidden_size", "vocab_size", "head_count", "head_count_kv", "context_length",
                 "tied_embeddings"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name


def _without_experts(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Nothing, where the model has experts; the tensors are compared apart."""
    return {} if expected.get("enable_moe_block", True) else {"num_experts": found["num_experts"]}


def _tensors(spec: Any, prefix: str) -> list[Any]:
    return [
        (t.name, t.shape, tuple(s.removeprefix(prefix) for s in t.sources if "lm_head" not in s),
         t.bid, t.role, t.n_matrices, t.is_expert, t.op)
        for t in spec.tensors
    ]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_our_file_is_described_as_its_checkpoint(
    case: str, folder: Path, exported: Callable[[str], Path]
) -> None:
    check_same(folder / case, exported(case))


@pytest.mark.llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_the_converter_s_file_is_described_as_its_checkpoint(
    case: str, folder: Path, converted: Path
) -> None:
    check_same(folder / case, converted / f"{case}.gguf")


@pytest.mark.llama_cpp
def test_keys_and_values_that_no_layer_reads_are_left_out(converted: Path) -> None:
    spec = describe_gguf(read_model(converted / "shared-kv.gguf"))
    assert sorted(spec.left_out) == [
        f"blk.{bid}.attn_{part}.weight" for bid in (4, 5) for part in ("k", "k_norm", "v")
    ]


def logits(source: WeightSource, spec: Any) -> torch.Tensor:
    """All logits of a few windows, float32 (positions, vocabulary)."""
    model = StreamedModel(source, spec, dtype=torch.float32)
    batches = model.embed(windows(2, 80))
    model.run_layers(batches)
    hidden = torch.cat([model.final_norm(batch.hidden.flatten(0, 1)) for batch in batches])
    return torch.cat([part for _, _, part in model.logits(hidden)], dim=1)


def file_logits(path: Path) -> torch.Tensor:
    """Of the file alone: nothing of the checkpoint is at hand."""
    file = read_model(path)
    spec = describe_gguf(file)
    return logits(GGUFWeights(file, spec), spec)


@pytest.mark.parametrize("case", LOGITS)
def test_logits_of_the_file_alone_are_the_checkpoint_s(
    case: str, folder: Path, exported: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(folder / case)
    expected = logits(checkpoint, describe(checkpoint))
    found = file_logits(exported(case))
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("case", ["shared-kv", "gemma4-conditional-additive"])
def test_logits_of_the_converter_s_file_are_the_checkpoint_s(
    case: str, folder: Path, converted: Path
) -> None:
    checkpoint = open_checkpoint(folder / case)
    expected = logits(checkpoint, describe(checkpoint))
    found = file_logits(converted / f"{case}.gguf")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["gemma4-additive-some-layers", "qwen3-moe"])
def test_banks_of_the_same_type_change_nothing(
    case: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """Both ways of naming experts: one fused tensor, and one per expert; split into files, too."""
    banked(exported(case), tmp_path / "banked.gguf", (None, None, None))
    first = split(tmp_path / "banked.gguf", tmp_path / "shards", 20)
    expected = file_logits(exported(case))
    torch.testing.assert_close(file_logits(first), expected, rtol=0, atol=0)


def test_banks_of_two_types_differ_where_they_should(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """Half of the experts in Q8_0: these are what gguf decodes, the others as they were."""
    banked(exported("qwen3-moe"), tmp_path / "banked.gguf", (None, Q8_0))
    file, before = read_model(tmp_path / "banked.gguf"), read_model(exported("qwen3-moe"))
    spec = describe_gguf(file)
    ours, whole = GGUFWeights(file, spec), GGUFWeights(before, spec)
    for expert in range(16):
        name = f"model.layers.2.mlp.experts.{expert}.down_proj.weight"
        found, exact = ours.read(name), whole.read(name)
        if expert % 2:
            exact = torch.from_numpy(gguf.dequantize(gguf.quantize(exact.numpy(), Q8_0), Q8_0))
        assert torch.equal(found, exact)
    error = file_logits(tmp_path / "banked.gguf") - file_logits(exported("qwen3-moe"))
    assert 0 < error.square().mean().sqrt() < 0.2


@pytest.mark.parametrize("case", ["gemma4-additive-some-layers", "gemma4-moe"])
def test_separate_gate_and_up_are_the_fused_tensor(
    case: str, folder: Path, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    halved(exported(case), tmp_path / "apart.gguf")
    assert not any("gate_up" in name for name in read_model(tmp_path / "apart.gguf").tensors)
    check_same(folder / case, tmp_path / "apart.gguf")
    expected = file_logits(exported(case))
    torch.testing.assert_close(file_logits(tmp_path / "apart.gguf"), expected, rtol=0, atol=0)


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name)


def shorten(name: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        values, qtype = tensors[name]
        tensors[name] = (values[:, 1:].copy(), qtype)

    return change


GATE, UP, BOTH = (f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "gate_up"))
BAD_HALVES = {
    "no gate": (drop(GATE), [f"1 tensors .*\n  - {GATE}: missing, of shape \\[16, 96, 256\\]"]),
    "no up": (drop(UP), [f"1 tensors .*\n  - {UP}: missing, of shape \\[16, 96, 256\\]"]),
    "another shape": (
        shorten(UP),
        [f"1 tensors .*\n  - {UP}: shape \\[16, 95, 256\\], expected \\[16, 96, 256\\]"],
    ),
    "the whole, too": (
        drop(BOTH),  # from what is replaced, so that it stays
        ["2 tensors", *(f"{half}: unexpected \\({BOTH} is there, too\\)" for half in (GATE, UP))],
    ),
}


@pytest.mark.parametrize("damage", BAD_HALVES)
def test_gate_without_its_up_is_refused(
    damage: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    change, messages = BAD_HALVES[damage]
    halved(exported("gemma4-additive"), tmp_path / "bad.gguf", change=change)
    for message in messages:
        with pytest.raises(GGUFError, match=message):
            describe_gguf(read_model(tmp_path / "bad.gguf"))


@pytest.mark.llama_cpp
def test_fused_experts_of_qwen3_are_refused_here_and_there(
    exported: Callable[[str], Path], llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    tensors = {t.name: t for t in gguf.GGUFReader(exported("qwen3-moe")).tensors}
    changes: dict[str, Any] = {}
    for gate in [name for name in tensors if "ffn_gate_exps" in name]:
        up = gate.replace("gate", "up")
        fused = np.concatenate([tensors[gate].data, tensors[up].data], axis=1)
        changes |= {gate: None, up: None}
        changes[gate.replace("gate", "gate_up")] = fused, tensors[gate].tensor_type
    rewrite(exported("qwen3-moe"), tmp_path / "fused.gguf", tensors=changes)
    with pytest.raises(GGUFError, match=r"blk\.0\.ffn_gate_up_exps\.weight: unexpected"):
        describe_gguf(read_model(tmp_path / "fused.gguf"))
    command = [llama_cpp.tool("llama-perplexity"), "-m", tmp_path / "fused.gguf", "-t", "1",
               "-f", Path(__file__), "-c", "64", "--chunks", "1"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "tensor 'blk.0.ffn_gate_exps.weight' not found" in result.stdout + result.stderr


def test_a_file_without_its_experts_is_dense(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """What remains is the dense model's rows; the experts' keys may still be there."""
    file = read_model(exported("gemma4-additive"))
    dense = {t.name.removeprefix(f"blk.{n}.") for n in range(4) for t in
             describe_gguf(read_model(exported("gemma4-dense"))).tensors}  # fmt: skip
    gone = {name: None for name in file.tensors if name.split(".", 2)[-1] not in dense
            and name not in dense}  # fmt: skip
    rewrite(exported("gemma4-additive"), tmp_path / "dense.gguf", tensors=gone)
    spec = describe_gguf(read_model(tmp_path / "dense.gguf"))
    assert (spec.expert_count, spec.expert_used_count, spec.moe_layers) == (0, 0, ())
    assert len(gone) == 4 * 8
    assert file_logits(tmp_path / "dense.gguf").isfinite().all()


# --- what is refused -------------------------------------------------------------------------

EXTRA = {"blk.1.attn_qkv.weight": (np.zeros((4, 256), np.float32), F32)}
REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], list[str]]] = {
    "all offenders": (
        "gemma4-additive",
        {
            "tensors": {
                "blk.0.ffn_up.weight": None,
                "blk.1.attn_q.weight": (np.zeros((511, 256), np.float32), F32),
                **EXTRA,
            }
        },
        GGUFError,
        [
            "3 tensors are not what its metadata describe",
            r"blk\.0\.ffn_up\.weight: missing, of shape \[512, 256\]",
            r"blk\.1\.attn_q\.weight: shape \[511, 256\], expected \[512, 256\]",
            r"blk\.1\.attn_qkv\.weight: unexpected",
        ],
    ),
    "a tensor that the model has no place for": (
        "gemma4-dense",
        {"tensors": {"blk.0.inp_gate.weight": (np.zeros((128, 256), np.float32), F32)}},
        GGUFError,
        [r"inp_gate\.weight: unexpected \(hidden_size_per_layer_input is 0\)"],
    ),
    "a layer that is not there": (
        "qwen3-dense",
        {"keys": {"qwen3.block_count": 5}},
        GGUFError,
        [r"blk\.4\.attn_norm\.weight: missing"],
    ),
    "a missing key": (
        "gemma4-ple",
        {"keys": {"gemma4.attention.sliding_window": None}},
        GGUFError,
        [r"the key gemma4\.attention\.sliding_window is missing"],
    ),
    "a key of another type": (
        "qwen3-dense",
        {"keys": {"qwen3.embedding_length": "wide"}},
        GGUFError,
        [r"qwen3\.embedding_length is 'wide', not one count"],
    ),
    "more layers than there can be": (
        "qwen3-dense",
        {"keys": {"qwen3.block_count": 1 << 30}},
        ArchitectureError,
        ["num_hidden_layers is 1073741824; llama.cpp holds at most 512"],
    ),
    "no heads": (
        "qwen3-dense",
        {"keys": {"qwen3.attention.head_count": 0}},
        GGUFError,
        [r"metadata"],
    ),
    "too few experts": (
        "qwen3-moe",
        {"keys": {"qwen3moe.expert_used_count": 17}},
        GGUFError,
        [r"qwen3moe\.expert_used_count is 17, qwen3moe\.expert_count 16"],
    ),
    "other frequencies": (
        "gemma4-dense",
        {"tensors": {"rope_freqs.weight": (np.full(32, 2.5, np.float32), F32)}},
        GGUFError,
        ["other values than ones and then 1e30"],
    ),
    "no frequencies": (
        "gemma4-dense",
        {"tensors": {"rope_freqs.weight": None}},
        GGUFError,
        [r"rope_freqs\.weight is missing; with attention\.key_length 64 it has 32 values"],
    ),
    "a rotary scaling that is not served": (
        "qwen3-dense",
        {"keys": {"qwen3.rope.scaling.type": "longrope", "qwen3.rope.scaling.factor": 4.0}},
        GGUFError,
        ["longrope"],
    ),
    "another kind of file": (
        "qwen3-dense",
        {"keys": {"general.type": "adapter"}},
        GGUFError,
        ["general.type is 'adapter'; a model is needed"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_contradicts_itself_is_refused(
    case: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    kind, changes, error, messages = REFUSED[case]
    rewrite(exported(kind), tmp_path / "bad.gguf", **changes)
    for message in messages:
        with pytest.raises(error, match=message) as caught:
            describe_gguf(read_model(tmp_path / "bad.gguf"))
        assert "bad.gguf" in str(caught.value)


def test_another_architecture_is_named_with_those_served(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    message = r"llama\.gguf: architecture 'llama' is not supported.* gemma4, qwen3, qwen3moe"
    with pytest.raises(ArchitectureError, match=message):
        describe_gguf(read_model(tmp_path / "llama.gguf"))


ODD = (None, -1, 0, 1, 3, 1 << 31, 1 << 62, 1e30, float("nan"), -2.5, "x", "", True, [], [1],
       [0] * 6, [True] * 6, ["a"] * 6, [1 << 31] * 6)  # fmt: skip


@pytest.mark.parametrize("case", ["gemma4-ple", "gemma4-additive-some-layers", "qwen3-moe", "yarn"])
def test_no_value_of_a_key_does_harm(case: str, exported: Callable[[str], Path]) -> None:
    """Each key with each odd value: a model, or one error that names the file; never a crash."""
    file = read_model(exported(case))
    architecture = file.metadata["general.architecture"]
    keys = [key for key in file.metadata if key.startswith(f"{architecture}.")]
    keys += [f"{architecture}.rope.scaling.type", f"{architecture}.expert_bank_version"]
    described = refused = 0
    for key in keys:
        for value in ODD:
            metadata = {**file.metadata, key: value}
            if value is None:
                del metadata[key]
            try:
                describe_gguf(replace(file, metadata=metadata))
                described += 1
            except MoequantError as error:
                assert str(file.path) in str(error)
                refused += 1
    assert described > 10 and refused > 100


def test_a_partial_rotation_comes_back_for_every_size_of_head() -> None:
    """Where 2·n/head is no exact number, the factor must still give n rotated pairs."""
    for head in range(2, 600, 2):
        for rotated in {1, head // 6 or 1, head // 3 or 1, head // 2}:
            divisors = np.array([1.0] * rotated + [1e30] * (head // 2 - rotated), np.float32)
            keys = FileKeys(
                origin="file",
                architecture="gemma4",
                metadata={"gemma4.attention.key_length": head},
                shapes={"rope_freqs.weight": divisors.shape},
                values=lambda _, divisors=divisors: divisors,
            )
            part = _rotated_part(keys)
            assert int(head * part / 2) == int(part * head // 2) == rotated
