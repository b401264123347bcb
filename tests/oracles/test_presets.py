"""Named presets against the pinned llama-quantize: the type of every tensor, fallbacks included.

`llama-quantize --dry-run` chooses types without reading a value, so every preset can be asked
about every model, with and without importance data. That a real run writes the types that a dry
run prints is checked too.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import pytest

from moequant.architectures import ModelSpec, describe
from moequant.checkpoint import open_checkpoint
from moequant.plan import PRESETS, Model, Plan, Tensor, preset_plan
from moequant.runtime.llama_cpp import LlamaCpp
from tests.checkpoints import make_checkpoint
from tests.plan.models import (
    KINDS,
    VOCABULARY,
    FakeModel,
    Shapes,
    attention,
    dense_ffn,
    expert_ffn,
    expert_keys,
    fake_model,
    write_gguf,
)

pytestmark = pytest.mark.llama_cpp

BASES = ("F32", "F16", "BF16")
QUANTIZED = [name for name, preset in PRESETS.items() if not preset.is_float]
NEVER_TOUCHED = "per_layer_model_proj.weight"  # by llama-quantize; the converter gives it outtype

_TENSOR = re.compile(r"^\[ *\d+/ *\d+\] (\S+) +- \[.*\], type = +(\w+), .*?(?:\((\w+)\))?$", re.M)
_WANTED = re.compile(r"^warning: (\S+) .*\(required for type +(\w+)\)", re.M)


@dataclass(frozen=True)
class Run:
    """What a dry run says: every tensor's type, and the wanted one where rows did not fit."""

    types: dict[str, str]
    wanted: dict[str, str]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GGUF files and imatrix files, each written once."""
    return tmp_path_factory.mktemp("presets")


def float_file(folder: Path, kind: str, base: str) -> Path:
    """The model of this kind as the converter would have left it with `--outtype base`."""
    path = folder / f"{kind}.{base}.gguf"
    if not path.exists():
        write_gguf(path, KINDS[kind], preset_plan(base, KINDS[kind], has_imatrix=False).types)
    return path


def imatrix_file(folder: Path, name: str, tensors: Sequence[Tensor]) -> Path:
    """Importance of one for every column of every matrix, in llama.cpp's format."""
    path = folder / f"{name}.imatrix.gguf"
    if path.exists():
        return path
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for tensor in tensors:
        if len(tensor.shape) >= 2:
            matrices = tensor.shape[0] if len(tensor.shape) == 3 else 1
            sums = np.ones((matrices, tensor.shape[-1]), np.float32)
            writer.add_tensor(f"{tensor.name}.in_sum2", sums)
            writer.add_tensor(f"{tensor.name}.counts", np.ones((matrices, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantize(llama_cpp: LlamaCpp, *arguments: str | Path) -> str:
    """Output of llama-quantize; a failure fails the test with it."""
    command = [str(llama_cpp.tool("llama-quantize")), *map(str, arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


def dry_run(llama_cpp: LlamaCpp, source: Path, preset: str, imatrix: Path | None) -> Run:
    """Types that llama-quantize would write."""
    options = ["--imatrix", str(imatrix)] if imatrix else []
    output = quantize(llama_cpp, "--dry-run", *options, source, preset)
    lines = _TENSOR.findall(output)
    types = {name: (final or first).upper() for name, first, final in lines}
    wanted = {name: qtype.upper() for name, qtype in _WANTED.findall(output)}
    return Run(types, wanted)


def differences(plan: Plan, types: dict[str, str]) -> list[str]:
    """Every tensor on which they disagree; also fails where either knows a tensor alone."""
    assert plan.types.keys() == types.keys()
    return [
        f"{plan.preset} {name}: {qtype}, llama-quantize says {types[name]}"
        for name, qtype in plan.types.items()
        if qtype != types[name]
    ]


def assert_all_presets_agree(
    llama_cpp: LlamaCpp, source: Path, model: Model, imatrix: Path | None
) -> None:
    """Fails with every tensor that differs, under any preset that quantizes."""
    wrong, compared = [], 0
    for preset in QUANTIZED:
        run = dry_run(llama_cpp, source, preset, imatrix)
        plan = preset_plan(preset, model, has_imatrix=imatrix is not None)
        wrong += differences(plan, run.types)
        compared += len(run.types)
    assert not wrong, "\n".join(wrong[:30])
    assert compared == len(QUANTIZED) * len(model.tensors) > 0


@pytest.mark.parametrize("has_imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("kind", KINDS)
def test_types_are_those_of_llama_quantize(
    llama_cpp: LlamaCpp, folder: Path, kind: str, has_imatrix: bool
) -> None:
    source, model = float_file(folder, kind, "BF16"), KINDS[kind]
    imatrix = imatrix_file(folder, kind, model.tensors) if has_imatrix else None
    assert_all_presets_agree(llama_cpp, source, model, imatrix)


@pytest.mark.parametrize("kind", KINDS)
def test_fallbacks_are_those_llama_quantize_warns_of(
    llama_cpp: LlamaCpp, folder: Path, kind: str
) -> None:
    """Ours are its own, and the output tensor that it makes Q8_0 without a warning."""
    model = KINDS[kind]
    outputs = {"output.weight", "token_embd.weight", "per_layer_token_embd.weight"}
    for preset in ("Q4_K_M", "Q3_K_M", "IQ4_XS", "MXFP4_MOE"):
        run = dry_run(llama_cpp, float_file(folder, kind, "BF16"), preset, None)
        ours = {
            tensor.name: tensor.wanted
            for tensor in preset_plan(preset, model, has_imatrix=False).fallbacks
        }
        for name in outputs & ours.keys():
            assert run.wanted.get(name) in (ours[name], "Q8_0", None)
        assert {n: t for n, t in ours.items() if n not in outputs} == {
            n: t for n, t in run.wanted.items() if n not in outputs
        }
        assert run.wanted.keys() <= ours.keys()


@pytest.mark.parametrize("base", ["F32", "F16"])
@pytest.mark.parametrize("kind", ["gemma4-ple", "qwen3moe-16"])
def test_what_is_not_quantized_keeps_the_base(
    llama_cpp: LlamaCpp, folder: Path, kind: str, base: str
) -> None:
    source = float_file(folder, kind, base)
    for preset in ("Q8_0", "Q4_K_M"):
        plan = preset_plan(preset, KINDS[kind], has_imatrix=False, base=base)
        assert not differences(plan, dry_run(llama_cpp, source, preset, None).types)


@pytest.mark.parametrize("preset", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_float_presets_agree_but_for_what_it_never_touches(
    llama_cpp: LlamaCpp, folder: Path, kind: str, preset: str
) -> None:
    """From F32, llama-quantize leaves per_layer_model_proj at F32; the converter does not."""
    plan = preset_plan(preset, KINDS[kind], has_imatrix=False)
    run = dry_run(llama_cpp, float_file(folder, kind, "F32"), preset, None)
    differ = {name for name, qtype in plan.types.items() if qtype != run.types[name]}
    expected = {NEVER_TOUCHED} & plan.types.keys() if preset != "F32" else set()
    assert differ == expected
    copied = dry_run(llama_cpp, float_file(folder, kind, preset), preset, None)
    assert not differences(plan, copied.types)


@pytest.mark.parametrize(
    ("kind", "preset", "has_imatrix"),
    [
        ("gemma4-additive", "Q4_K_M", True),
        ("gemma4-ple-moe-odd-rows", "Q3_K_M", False),
        ("qwen3-odd-rows", "IQ4_XS", False),
        ("qwen3moe-8", "Q4_0", True),
        ("qwen3moe-16", "MXFP4_MOE", False),
    ],
)
def test_a_real_run_writes_the_planned_types(
    llama_cpp: LlamaCpp, folder: Path, kind: str, preset: str, has_imatrix: bool
) -> None:
    source = float_file(folder, kind, "BF16")
    written = folder / f"{kind}.{preset}.gguf"
    imatrix = imatrix_file(folder, kind, KINDS[kind].tensors)
    options = ["--imatrix", str(imatrix)] if has_imatrix else []
    quantize(llama_cpp, *options, source, written, preset, "2")
    reader = gguf.GGUFReader(written)
    plan = preset_plan(preset, KINDS[kind], has_imatrix=has_imatrix)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert not differences(plan, types)
    assert plan.size_bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    file_type = reader.get_field("general.file_type")
    assert file_type is not None
    assert file_type.contents() == PRESETS[preset].file_type
    written.unlink()


def test_file_types_are_llama_cpps(llama_cpp: LlamaCpp) -> None:
    header = (llama_cpp.source / "include" / "llama.h").read_text()
    found = dict(re.findall(r"LLAMA_FTYPE_(?:ALL|MOSTLY)_(\w+) += (\d+),", header))
    for name, preset in PRESETS.items():
        assert preset.file_type == int(found[name])


def random_model(random: Random) -> FakeModel:
    """Any number of layers, heads, experts and values per row that a small model may have."""
    layers, kv_heads = random.randint(1, 42), random.choice((1, 2, 4))
    row = random.choice((256, 512, 288, 208, 40))
    layer = attention(row, kv_heads * random.choice((1, 3, 4, 8)), kv_heads)
    experts = random.choice((0, 0, 1, 2, 8, 16))
    dense = dense_ffn(row, random.choice((256, 320, 100)))
    if experts:
        layer |= expert_ffn(row, random.choice((256, 96, 20)), experts)
    has_values = [random.random() < 0.8 for _ in range(layers)]
    has_dense = [not experts or random.random() < 0.5 for _ in range(layers)]
    shapes = [
        {
            name: shape
            for name, shape in (layer | dense if has_dense[bid] else layer).items()
            if has_values[bid] or name != "attn_v.weight"
        }
        for bid in range(layers)
    ]
    outside: Shapes = {"token_embd.weight": (VOCABULARY, row)}
    if random.random() < 0.5:
        outside["output.weight"] = (VOCABULARY, row)
    heads = layer["attn_q.weight"][0] // 64
    keys = expert_keys(experts, 96)
    return fake_model("qwen3moe", shapes, outside, experts, heads, (kv_heads,) * layers, row, keys)


def test_random_models(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """40 models of up to 42 layers, four presets each."""
    random = Random(1)
    wrong, compared = [], 0
    for number in range(40):
        model = random_model(random)
        source = tmp_path / "model.gguf"
        base = random.choice(BASES)
        write_gguf(source, model, preset_plan(base, model, has_imatrix=False).types)
        for preset in random.sample(QUANTIZED, 4):
            plan = preset_plan(preset, model, has_imatrix=False, base=base)
            found = differences(plan, dry_run(llama_cpp, source, preset, None).types)
            wrong += [f"model {number}: {line}" for line in found]
            compared += len(plan.tensors)
    assert not wrong, "\n".join(wrong[:30])
    assert compared > 20_000


# Checkpoint, config to override. From here on files are the converter's own.
CONVERTED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4-ple": ("gemma4-ple", {}),
    "gemma4-additive-some-layers": ("gemma4-additive-some-layers", {}),
    "gemma4-additive of 8": ("gemma4-additive", {"num_experts": 8}),
    "qwen3-dense": ("qwen3-dense", {}),
    "qwen3-dense-tied": ("qwen3-dense-tied", {}),
    "qwen3-moe": ("qwen3-moe", {}),
    "qwen3-moe of 8": ("qwen3-moe", {"num_experts": 8}),
}

# One process for all files. The tests' tokenizers are none that the converter knows by hash.
CONVERTER = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
import convert_hf_to_gguf
for job in sys.argv[2:]:
    checkpoint, outfile, outtype = job.split("|")
    sys.argv = ["convert", "--outtype", outtype, "--outfile", outfile, checkpoint]
    convert_hf_to_gguf.main()
"""


def convert(llama_cpp: LlamaCpp, jobs: Sequence[tuple[Path, Path, str]]) -> None:
    """Run the pinned converter on (checkpoint, outfile, outtype), one after another."""
    arguments = [f"{checkpoint}|{outfile}|{outtype}" for checkpoint, outfile, outtype in jobs]
    command = [sys.executable, "-c", CONVERTER, str(llama_cpp.source), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="session")
def converted(llama_cpp: LlamaCpp, folder: Path) -> dict[str, ModelSpec]:
    """Each checkpoint as moequant describes it; the converter's files are `converted_file`s."""
    sources = {
        name: make_checkpoint(kind, folder / name, **config)
        for name, (kind, config) in CONVERTED.items()
    }
    jobs = [
        (source, converted_file(folder, name, "BF16"), "bf16") for name, source in sources.items()
    ]
    for base in ("F32", "F16"):
        file = converted_file(folder, "gemma4-ple", base)
        jobs.append((sources["gemma4-ple"], file, base.lower()))
    convert(llama_cpp, jobs)
    return {name: describe(open_checkpoint(source)) for name, source in sources.items()}


def converted_file(folder: Path, name: str, base: str) -> Path:
    """Where the converter's file is."""
    return folder / f"{name}.{base}.converted.gguf"


@pytest.mark.parametrize("has_imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", CONVERTED)
def test_checkpoints_from_description_to_types(
    llama_cpp: LlamaCpp,
    folder: Path,
    converted: dict[str, ModelSpec],
    name: str,
    has_imatrix: bool,
) -> None:
    model, source = converted[name], converted_file(folder, name, "BF16")
    imatrix = imatrix_file(folder, f"{name}.spec", model.tensors) if has_imatrix else None
    assert_all_presets_agree(llama_cpp, source, model, imatrix)


@pytest.mark.parametrize(
    ("name", "preset"),
    [*((name, "BF16") for name in CONVERTED), ("gemma4-ple", "F32"), ("gemma4-ple", "F16")],
)
def test_float_presets_are_the_converters(
    folder: Path, converted: dict[str, ModelSpec], name: str, preset: str
) -> None:
    reader = gguf.GGUFReader(converted_file(folder, name, preset))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    plan = preset_plan(preset, converted[name], has_imatrix=False)
    assert not differences(plan, types)
    assert plan.size_bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
