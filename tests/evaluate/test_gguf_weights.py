"""GGUF weights: the values of every checkpoint tensor against gguf-py's own reading of the file."""

import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from moequant.architectures import describe, describe_gguf
from moequant.checkpoint import open_checkpoint
from moequant.errors import GGUFError
from moequant.evaluate.gguf_weights import GGUFWeights, decoded_types, stored
from moequant.gguf_file import read_model
from moequant.pipeline import ExportOptions, export
from moequant.runtime.llama_cpp import LlamaCpp
from tests.banked_files import Q8_0, banked
from tests.checkpoints import make_checkpoint
from tests.gguf_files import Value, rewrite, split
from tests.halved_files import halved

KINDS = ("gemma4-additive-some-layers", "qwen3-moe")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<kind>` is a checkpoint, `<kind>.gguf` the file of it, F32."""
    root = tmp_path_factory.mktemp("weights")
    for kind in KINDS:
        checkpoint = open_checkpoint(make_checkpoint(kind, root / kind))
        export(checkpoint, root / f"{kind}.gguf", ExportOptions("F32", calibration=None))
    return root


def expected_values(path: Path) -> dict[str, torch.Tensor]:
    """GGUF name → values, read and decoded by gguf-py."""
    return {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).astype(np.float32))
        for t in gguf.GGUFReader(path).tensors
    }


def check_all(weights: GGUFWeights, path: Path, *, first: Path) -> None:
    """Every source of every tensor, whole and in slices, against gguf-py's reading of `path`."""
    values = expected_values(path)
    for spec in describe_gguf(read_model(first)).tensors:
        whole = values[spec.name].reshape(spec.shape)
        for index, source in enumerate(spec.sources):
            expected = whole if len(spec.sources) == 1 else whole[index]
            assert torch.equal(weights.read(source), expected), source
            stop = max(2, len(expected) // 3)
            assert torch.equal(weights.read_slice(source, 1, stop), expected[1:stop]), source
            assert weights.tensors[source].dtype == torch.float32


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_a_split_file_of_llama_quantize(
    llama_cpp: LlamaCpp, root: Path, tmp_path: Path, kind: str
) -> None:
    """Types mixed as llama.cpp mixes them, in several files, described by nothing but itself."""
    path = tmp_path / "q.gguf"
    command = [llama_cpp.tool("llama-quantize"), root / f"{kind}.gguf", path, "Q4_K_M", "1"]
    subprocess.run(command, check=True, capture_output=True)
    first = split(path, tmp_path / "shards", 15)
    file = read_model(first)
    spec = describe_gguf(file)
    assert len(file.shards) > 2
    assert {t.qtype for t in file.tensors.values()} >= {"F32", "Q4_K", "Q6_K", "Q5_0"}
    check_all(GGUFWeights(file, spec), path, first=first)
    sizes = {t.name: (t.tensor_type.name, t.n_bytes) for t in gguf.GGUFReader(path).tensors}
    assert stored(file, spec) == sizes


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_s_description_serves_as_well(root: Path, kind: str) -> None:
    checkpoint, file = open_checkpoint(root / kind), read_model(root / f"{kind}.gguf")
    weights = GGUFWeights(file, describe(checkpoint))
    names = {name for name in weights.tensors if not name.startswith("rope")}
    assert names == set(checkpoint.tensors)
    for name in names:
        assert torch.equal(weights.read(name), checkpoint.read(name).float()), name


@pytest.mark.parametrize("kind", KINDS)
def test_banked_experts(root: Path, tmp_path: Path, kind: str) -> None:
    """Experts in three banks, values as those of a stack that was rounded expert by expert."""
    banked(root / f"{kind}.gguf", tmp_path / "banked.gguf", (None, Q8_0, None))
    rounded = {}
    for tensor in gguf.GGUFReader(root / f"{kind}.gguf").tensors:
        if tensor.name.endswith("_exps.weight"):
            values = tensor.data.copy()
            values[1::3] = gguf.dequantize(gguf.quantize(values[1::3], Q8_0), Q8_0)
            rounded[tensor.name] = (values, GGMLQuantizationType.F32)
    rewrite(root / f"{kind}.gguf", tmp_path / "rounded.gguf", tensors=rounded)

    file = read_model(tmp_path / "banked.gguf")
    spec = describe_gguf(file)
    check_all(GGUFWeights(file, spec), tmp_path / "rounded.gguf", first=file.path)
    sizes = stored(file, spec)
    for name, (values, _) in rounded.items():
        size = values[0].size
        assert sizes[name] == ("F32+Q8_0", 11 * size * 4 + 5 * size // 32 * 34)
    assert len(sizes) == len(spec.tensors)


@pytest.mark.llama_cpp
def test_gate_and_up_in_two_tensors(llama_cpp: LlamaCpp, root: Path, tmp_path: Path) -> None:
    """Read whole, in slices and in banks, bit by bit what the fused file holds."""
    fused, apart, banks = (tmp_path / f"{name}.gguf" for name in ("fused", "apart", "banks"))
    command = [llama_cpp.tool("llama-quantize"), root / f"{KINDS[0]}.gguf", fused, "Q4_K_M", "1"]
    subprocess.run(command, check=True, capture_output=True)
    halved(fused, apart)
    banked(apart, banks, (None, None, None))
    file = read_model(fused)
    sizes = stored(file, describe_gguf(file))
    assert sizes["blk.1.ffn_gate_up_exps.weight"][0] == "Q4_K"
    for path in (apart, banks):
        file = read_model(path)
        spec = describe_gguf(file)
        check_all(GGUFWeights(file, spec), fused, first=path)
        assert stored(file, spec) == sizes


def only_gate(tensors: dict[str, Value | None]) -> None:
    for name in [name for name in tensors if "_up_exps" in name]:
        del tensors[name]


def test_gate_and_up_of_two_types(root: Path, tmp_path: Path) -> None:
    """And one of them in banks, the other not."""
    source, name = root / f"{KINDS[0]}.gguf", "blk.1.ffn_gate_up_exps.weight"
    replaced = halved(source, tmp_path / "apart.gguf", (None, Q8_0))
    banked(tmp_path / "apart.gguf", tmp_path / "banks.gguf", (None, None), change=only_gate)
    rounded = {}
    for tensor in gguf.GGUFReader(source).tensors:
        if ".ffn_gate_up_exps." in tensor.name:
            up, _ = replaced[tensor.name.replace("gate_up", "up")] or ()
            values = tensor.data.copy()
            values[:, values.shape[1] // 2 :] = gguf.dequantize(up, Q8_0)
            rounded[tensor.name] = (values, GGMLQuantizationType.F32)
    rewrite(source, tmp_path / "rounded.gguf", tensors=rounded)
    for path in (tmp_path / "apart.gguf", tmp_path / "banks.gguf"):
        file = read_model(path)
        spec = describe_gguf(file)
        check_all(GGUFWeights(file, spec), tmp_path / "rounded.gguf", first=path)
        half = rounded[name][0].size // 2
        assert stored(file, spec)[name] == ("F32+Q8_0", half * 4 + half // 32 * 34)


def test_half_of_the_experts_is_not_enough(root: Path, tmp_path: Path) -> None:
    """Held against the checkpoint's description; `describe_gguf` has its own errors for these."""
    spec = describe(open_checkpoint(root / KINDS[0]))
    name = "blk.1.ffn_up_exps.weight"
    halved(root / f"{KINDS[0]}.gguf", tmp_path / "bad.gguf", change=lambda t: t.pop(name))
    message = r"gate_up_exps\.weight: only blk\.1\.ffn_gate_exps\.weight \(\d+, \d+, 256\) in the"
    with pytest.raises(GGUFError, match=message):
        GGUFWeights(read_model(tmp_path / "bad.gguf"), spec)


def test_types_that_gguf_does_not_decode_are_named(root: Path, tmp_path: Path) -> None:
    """I8 is no type of weights, and Q8_K one that only ggml's own kernels use."""
    name = "blk.0.attn_q.weight"
    shape = read_model(root / "qwen3-moe.gguf").tensors[name].shape
    bad = {name: (np.zeros(shape, np.int8), GGMLQuantizationType.I8)}
    rewrite(root / "qwen3-moe.gguf", tmp_path / "bad.gguf", tensors=bad)
    file = read_model(tmp_path / "bad.gguf")
    with pytest.raises(GGUFError, match=r"1 tensors have .*\n  - blk\.0\.attn_q\.weight: I8\n"):
        GGUFWeights(file, describe_gguf(file))
    assert {"Q8_K", "I8", "I32", "F64"} & decoded_types() == set()
    assert {"F32", "F16", "BF16", "Q4_K", "IQ2_XXS", "MXFP4"} <= decoded_types()


def test_a_file_of_another_model_is_refused(root: Path) -> None:
    spec = describe(open_checkpoint(root / KINDS[0]))
    with pytest.raises(GGUFError, match="is not a file of this model") as caught:
        GGUFWeights(read_model(root / "qwen3-moe.gguf"), spec)
    assert "token_embd.weight: (512, 256) in the file, (640, 256) in the model" in str(caught.value)
    assert "rope_freqs.weight: missing, (32,) in the model" in str(caught.value)
