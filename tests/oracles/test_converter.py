"""Against llama.cpp's `convert_hf_to_gguf.py`: the same keys, types, values, tensors and bytes.

Every kind of checkpoint in `tests/checkpoints.py` is exported at F32 and BF16 by both. Not compared
are `moequant.*` (ours alone) and `general.*` that tells where a model comes from. One process runs
all conversions, since importing takes longer than converting.

The converter knows a byte-level tokenizer by a hash over what it makes of a test text, so it cannot
know one trained on a few KB; the driver tells it "qwen2" instead. That this is right for the real
tokenizers is `test_the_converter_calls_qwen_tokenizers_qwen2`.
"""

import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moequant.architectures import describe
from moequant.checkpoint import open_checkpoint
from moequant.gguf_export.special_tokens import special_tokens
from moequant.pipeline import ExportOptions, export
from tests.checkpoints import KINDS, make_checkpoint, rewrite_config_as_released

pytestmark = pytest.mark.llama_cpp

TYPES = ("F32", "BF16")
PROVENANCE = ("general.name", "general.basename", "general.finetune", "general.version",
              "general.organization", "general.size_label")  # fmt: skip

DRIVER = """
import json, runpy, sys
from pathlib import Path
source, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
sys.path[:0] = [str(source), str(source / "gguf-py")]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
for job in jobs:
    sys.argv = ["convert_hf_to_gguf.py", *job]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")
"""


# --- checkpoints beyond the plain kinds ------------------------------------------------------


def _as_released(folder: Path) -> None:
    make_checkpoint("gemma4-conditional-additive", folder)
    rewrite_config_as_released(folder)


def _with_tensors(folder: Path, extra: dict[str, torch.Tensor]) -> None:
    """Put further tensors into the first shard and the index."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = min(index["weight_map"].values())
    save_file({**load_file(folder / shard), **extra}, folder / shard, {"format": "pt"})
    index["weight_map"].update(dict.fromkeys(extra, shard))
    index_path.write_text(json.dumps(index))


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _shared_kv(folder: Path) -> None:
    """E2B as Google stores it: the layers that share keys and values still have their own."""
    make_checkpoint("gemma4-ple", folder)
    extra = {}
    for bid, head in ((4, 32), (5, 64)):
        before = f"model.layers.{bid}.self_attn"
        extra[f"{before}.k_proj.weight"] = torch.randn(head, 256).bfloat16()
        extra[f"{before}.v_proj.weight"] = torch.randn(head, 256).bfloat16()
        extra[f"{before}.k_norm.weight"] = torch.ones(head).bfloat16()
    _with_tensors(folder, extra)


def _tied_with_head(folder: Path) -> None:
    make_checkpoint("qwen3-dense-tied", folder)
    _with_tensors(folder, {"lm_head.weight": torch.randn(512, 256).bfloat16()})


def _yarn(folder: Path) -> None:
    scaling = {
        "rope_type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 24.0,
    }
    make_checkpoint("qwen3-moe", folder, rope_parameters=scaling, num_experts=8)


def _other_tokens(folder: Path) -> None:
    """Untied, float16, odd vocabulary: tokens behind the base, bos unset, three chat templates."""
    make_checkpoint("gemma4-moe", folder, dtype=torch.float16, tie_word_embeddings=False,
                    vocab_size=642)  # fmt: skip

    def add_tokens(tokenizer: dict[str, Any]) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for index, (text, special) in enumerate((("<plain>", False), ("<control>", True))):
            tokenizer["added_tokens"].append(
                {"id": 640 + index, "content": text, "special": special, **flags}
            )
        tokenizer["post_processor"]["single"].append(
            {"SpecialToken": {"id": "<eos>", "type_id": 0}}
        )

    def set_specials(config: dict[str, Any]) -> None:
        config["extra_special_tokens"] = {"control_token": "<control>"}
        config["eos_token"] = "<turn|>"

    _edit(folder / "tokenizer.json", add_tokens)
    _edit(folder / "tokenizer_config.json", set_specials)
    (folder / "additional_chat_templates").mkdir()
    for name in ("tool use", "rag"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(f"{{{{ '{name}' }}}}")


VARIANTS: dict[str, Callable[[Path], None]] = {
    "as-released": _as_released,
    "shared-kv": _shared_kv,
    "tied-with-head": _tied_with_head,
    "yarn": _yarn,
    "other-tokens": _other_tokens,
}
CASES = [*KINDS, *VARIANTS]
BOTH_TYPES = [*KINDS, "other-tokens"]  # the other variants differ in names and keys only
CONVERSIONS = [
    (case, qtype) for case in CASES for qtype in (TYPES if case in BOTH_TYPES else ["BF16"])
]
EQUAL = [conversion for conversion in CONVERSIONS if conversion[0] != "shared-kv"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint per case, in a folder of its name."""
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in KINDS:
        make_checkpoint(kind, root / kind)
    for name, make in VARIANTS.items():
        make(root / name)
    return root


@pytest.fixture(scope="session")
def converted(folder: Path, llama_cpp: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pinned converter makes of every case: `<case>-<type>.gguf`."""
    out = tmp_path_factory.mktemp("converted")
    jobs = [
        [
            str(folder / case),
            "--outfile",
            str(out / f"{case}-{qtype}.gguf"),
            "--outtype",
            qtype.lower(),
        ]
        for case, qtype in CONVERSIONS
    ]
    command = [sys.executable, "-c", DRIVER, str(llama_cpp.source), json.dumps(jobs)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return out


# --- comparison ------------------------------------------------------------------------------


def _keys(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Key -> (value types, value), without what is not compared."""
    keys = {
        name: ([kind.name for kind in field.types], field.contents())
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "moequant.")) and name not in PROVENANCE
    }
    if "tokenizer.chat_templates" in keys:  # the converter writes a set: any order
        kinds, names = keys["tokenizer.chat_templates"]
        keys["tokenizer.chat_templates"] = (kinds, sorted(names))
    return keys


def _tensors(reader: gguf.GGUFReader) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        tensor.name: (tensor.tensor_type.name, tensor.shape.tolist(), tensor.data.tobytes())
        for tensor in reader.tensors
    }


def _ours(source: Path, target: Path, preset: str) -> gguf.GGUFReader:
    export(open_checkpoint(source), target, ExportOptions(preset=preset))
    return gguf.GGUFReader(target)


@pytest.mark.parametrize(("case", "preset"), EQUAL)
def test_export_is_what_the_converter_writes(
    case: str, preset: str, folder: Path, converted: Path, tmp_path: Path
) -> None:
    ours = _ours(folder / case, tmp_path / "ours.gguf", preset)
    theirs = gguf.GGUFReader(converted / f"{case}-{preset}.gguf")

    ours_keys, theirs_keys = _keys(ours), _keys(theirs)
    assert set(ours_keys) == set(theirs_keys)
    for name in theirs_keys:
        assert ours_keys[name] == theirs_keys[name], name

    ours_tensors, theirs_tensors = _tensors(ours), _tensors(theirs)
    assert set(ours_tensors) == set(theirs_tensors)
    for name, (qtype, shape, data) in theirs_tensors.items():
        assert ours_tensors[name][:2] == (qtype, shape), name
        assert ours_tensors[name][2] == data, name
    assert len(theirs_tensors) > 40
    assert {qtype for qtype, _, _ in theirs_tensors.values()} == {"F32", preset}


def test_only_what_no_implementation_reads_is_missing(
    folder: Path, converted: Path, tmp_path: Path
) -> None:
    """The converter also writes keys and values of layers that share an earlier layer's."""
    ours = _ours(folder / "shared-kv", tmp_path / "ours.gguf", "BF16")
    theirs = gguf.GGUFReader(converted / "shared-kv-BF16.gguf")
    ours_tensors, theirs_tensors = _tensors(ours), _tensors(theirs)
    only_theirs = {
        name: theirs_tensors.pop(name) for name in set(theirs_tensors) - set(ours_tensors)
    }

    assert sorted(only_theirs) == [
        f"blk.{bid}.attn_{part}.weight" for bid in (4, 5) for part in ("k", "k_norm", "v")
    ]
    assert theirs_tensors == ours_tensors
    assert _keys(ours) == _keys(theirs)
    assert len(describe(open_checkpoint(folder / "shared-kv")).left_out) == 6


def test_the_cases_cover_what_they_are_for(converted: Path) -> None:
    """A comparison of files without experts, stacks, towers or odd keys would prove little."""
    keys = {case: _keys(gguf.GGUFReader(converted / f"{case}-BF16.gguf")) for case in CASES}
    assert keys["yarn"]["qwen3moe.rope.scaling.type"][1] == "yarn"
    assert keys["yarn"]["qwen3moe.expert_count"][1] == 8
    assert keys["gemma4-ple"]["gemma4.feed_forward_length"][1] == [512] * 4 + [1024] * 2
    assert keys["gemma4-ple"]["gemma4.attention.shared_kv_layers"][1] == 2
    assert keys["gemma4-additive"]["gemma4.attention.head_count_kv"][1] == [4, 2, 4, 2]
    assert keys["as-released"] == keys["gemma4-conditional-additive"]

    kinds = gguf.TokenType
    types = keys["other-tokens"]["tokenizer.ggml.token_type"][1]
    assert types[-2:] == [kinds.USER_DEFINED, kinds.CONTROL]
    assert set(types) == {kinds.NORMAL, kinds.CONTROL, kinds.USER_DEFINED, kinds.BYTE}
    assert len(keys["other-tokens"]["tokenizer.chat_templates"][1]) == 2
    assert keys["other-tokens"]["tokenizer.ggml.eos_token_id"][1] == 1
    assert keys["qwen3-moe"]["tokenizer.ggml.token_type"][1].count(kinds.UNUSED) == 5


def test_bf16_differs_from_f32_where_it_should(converted: Path) -> None:
    """The F32 comparison is not the BF16 one in disguise."""
    f32 = _tensors(gguf.GGUFReader(converted / "other-tokens-F32.gguf"))
    bf16 = _tensors(gguf.GGUFReader(converted / "other-tokens-BF16.gguf"))
    name = "blk.0.ffn_down_exps.weight"
    exact = np.frombuffer(f32[name][2], np.float32)
    rounded = np.frombuffer(bf16[name][2], np.uint16).astype(np.uint32) << 16
    assert not np.array_equal(exact, rounded.view(np.float32))
    np.testing.assert_allclose(rounded.view(np.float32), exact, rtol=2**-8)


def test_the_converter_calls_qwen_tokenizers_qwen2(llama_cpp: Any) -> None:
    """The row's `pre` is the converter's name for the tokenizers it has hashed as Qwen's."""
    lines = (llama_cpp.source / "conversion" / "base.py").read_text().splitlines()
    named = {
        lines[number].rsplit("/", 1)[1]: lines[number + 1].strip()
        for number in range(len(lines) - 1)
        if "# ref: https://huggingface.co/Qwen/Qwen3-" in lines[number]
    }
    assert named == {"Qwen3-Embedding-0.6B": 'res = "qwen2"'}


# --- special tokens, against the pinned gguf-py ----------------------------------------------


def _special(text: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": 0}}


def _template(single: str, pair: str) -> dict[str, Any]:
    """A `TemplateProcessing` from "<bos> A <eos>": capital letters are the sequences."""

    def items(text: str) -> list[dict[str, Any]]:
        return [
            {"Sequence": {"id": part, "type_id": 0}} if part in "AB" else _special(part)
            for part in text.split()
        ]

    return {"type": "TemplateProcessing", "single": items(single), "pair": items(pair)}


NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": {"content": "<pad>"}}
BYTE_LEVEL = {"type": "ByteLevel"}
POST_PROCESSORS: list[dict[str, Any] | None] = [
    None,
    BYTE_LEVEL,
    _template("A", "A B"),
    _template("<bos> A", "<bos> A B"),
    _template("<bos> A", "<bos> A <bos> B"),
    _template("A <eos>", "A <eos> B <eos>"),
    _template("<bos> A <eos>", "<bos> A <eos> B <eos>"),
    _template("<bos> A <sep>", "<bos> A <sep> B <sep>"),
    _template("<bos> A", "<bos> A <eos> B"),
    _template("<bos> A", "<bos> A <eos> <eos> B"),
    _template("<bos> A", "<bos> A <sep> <eos> B"),
    _template("<cls> A <sep>", "<cls> A <sep> B <sep>"),
    {"type": "Sequence", "processors": [BYTE_LEVEL, _template("<bos> A", "<bos> A <bos> B")]},
]
SETTINGS: list[dict[str, Any]] = [
    {},
    NAMES,
    {**NAMES, "add_bos_token": False, "add_eos_token": True, "sep_token": "<sep>"},
    {"cls_token": "<cls>", "sep_token": "<sep>", "add_bos_token": True},
    {"eos_token": "<eos>", "unk_token": None, "mask_token": "<nowhere>"},
]
CONFIGS: list[dict[str, Any]] = [
    {},
    {
        "bos_token_id": 5,
        "eos_token_id": [1, 2],
        "text_config": {"eos_token_id": 7, "pad_token_id": 8},
    },
]


@pytest.mark.parametrize("config", CONFIGS, ids=["no-ids", "ids"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("post_processor", POST_PROCESSORS)
def test_special_tokens_are_what_the_pinned_gguf_finds(
    post_processor: dict[str, Any] | None,
    settings: dict[str, Any],
    config: dict[str, Any],
    llama_cpp: Any,
    tmp_path: Path,
) -> None:
    texts = ("<pad>", "<eos>", "<bos>", "<sep>", "<cls>", "<eos>")
    tokenizer = {
        "added_tokens": [{"id": 10 + n, "content": text} for n, text in enumerate(texts)],
        "post_processor": post_processor,
        "model": {"merges": []},
    }
    for name, value in (
        ("tokenizer", tokenizer),
        ("tokenizer_config", settings),
        ("config", config),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    theirs = _pinned_vocab(llama_cpp.source).SpecialVocab(tmp_path)
    ours = special_tokens(tokenizer, settings, config)
    assert ours.ids == theirs.special_token_ids
    assert ours.added == theirs.add_special_token


@functools.cache
def _pinned_vocab(source: Path) -> Any:
    """The pinned gguf-py's `vocab` module, inside the installed package."""
    path = source / "gguf-py" / "gguf" / "vocab.py"
    spec = importlib.util.spec_from_file_location("gguf.pinned_vocab", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
