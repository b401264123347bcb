"""How fast llama.cpp runs experts in banks, against the same experts in one tensor.

Writes a synthetic Qwen3-MoE in which only the MoE branch matters (hidden 2048, 64 experts of width
768, 8 of them per token, 4 layers, vocabulary 4096; random weights in Q4_K), then the same weights
in 2 and in 3 banks of that type, and once with banks of three types. Runs the patched llama-bench
on all files in one call, several times over, and prints the ratios of tokens per second to the
ordinary file: of each call, and their median. Needs 3 GB of disk and about five minutes on two
cores, without the build:

    python benchmarks/expert_banks.py [--rounds 8] [--threads 2] [--json]
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from moequant.expert_banks import COUNT_KEY, NOT_HERE, VERSION, VERSION_KEY, bank_name, map_name
from moequant.quants import quantize
from moequant.runtime.llama_cpp import ensure_built

ARCHITECTURE = "qwen3moe"
LAYERS, HIDDEN, EXPERTS, TOP_K, EXPERT_WIDTH = 4, 2048, 64, 8, 768
HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 32, 4, 128, 4096
TYPE = "Q4_K"
SAMPLE_ROWS = 512  # that are encoded; every matrix is made of such rows, in an order of its own
NEEDED = {"pp": 0.92, "tg": 0.95}  # of the ordinary file's speed, for banks of one type

# each file's banks: the type of each, and how many of every four experts are in it
Banks = tuple[tuple[str, int], ...]
FILES: dict[str, Banks] = {
    "one tensor": ((TYPE, 4),),
    "2 banks": ((TYPE, 2), (TYPE, 2)),
    "3 banks": ((TYPE, 1), (TYPE, 2), (TYPE, 1)),
    "3 types": (("Q5_K", 1), (TYPE, 2), ("Q3_K", 1)),
}


class Rows:
    """Encoded rows of random weights; the same in all files, whatever their types."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.encoded: dict[tuple[str, int], npt.NDArray[np.uint8]] = {}

    def order(self, *shape: int) -> npt.NDArray[np.intp]:
        """Which rows a tensor of `shape` [..., rows] is made of."""
        return self.random.integers(SAMPLE_ROWS, size=shape)

    def matrices(
        self, order: npt.NDArray[np.intp], cols: int, qtype: str = TYPE
    ) -> npt.NDArray[np.uint8]:
        """The bytes of these rows, [..., rows, row bytes]."""
        if (qtype, cols) not in self.encoded:
            values = np.random.default_rng(cols).standard_normal((SAMPLE_ROWS, cols), np.float32)
            data = quantize(torch.from_numpy(values / np.float32(cols**0.5)), qtype).numpy()
            self.encoded[qtype, cols] = data.view(np.uint8).reshape(SAMPLE_ROWS, -1)
        return self.encoded[qtype, cols][order]


def tensors_of(banks: Banks) -> Iterator[tuple[str, npt.NDArray[Any], str]]:
    """Names, values or bytes, and types of all tensors."""
    rows = Rows()

    def vector(name: str, length: int) -> tuple[str, npt.NDArray[Any], str]:
        return f"{name}.weight", np.ones(length, np.float32), "F32"

    def matrix(name: str, out: int, width: int) -> tuple[str, npt.NDArray[Any], str]:
        return f"{name}.weight", rows.matrices(rows.order(out), width), TYPE

    yield matrix("token_embd", VOCABULARY, HIDDEN)
    yield vector("output_norm", HIDDEN)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        for name, length in (("attn_norm", HIDDEN), ("attn_q_norm", HEAD_DIM),
                             ("attn_k_norm", HEAD_DIM), ("ffn_norm", HIDDEN)):  # fmt: skip
            yield vector(prefix + name, length)
        for name, out, width in (("attn_q", HEADS * HEAD_DIM, HIDDEN),
                                 ("attn_k", KV_HEADS * HEAD_DIM, HIDDEN),
                                 ("attn_v", KV_HEADS * HEAD_DIM, HIDDEN),
                                 ("attn_output", HIDDEN, HEADS * HEAD_DIM)):  # fmt: skip
            yield matrix(prefix + name, out, width)
        router = rows.random.standard_normal((EXPERTS, HIDDEN), np.float32) / HIDDEN**0.5
        yield f"{prefix}ffn_gate_inp.weight", router, "F32"
        for kind, out, width in (("gate", EXPERT_WIDTH, HIDDEN), ("up", EXPERT_WIDTH, HIDDEN),
                                 ("down", HIDDEN, EXPERT_WIDTH)):  # fmt: skip
            yield from experts(rows, f"{prefix}ffn_{kind}_exps.weight", (out, width), banks)


def experts(
    rows: Rows, name: str, shape: tuple[int, int], banks: Banks
) -> Iterator[tuple[str, npt.NDArray[Any], str]]:
    """The stack, or its banks and their map; of every four experts in turn, so many in each."""
    order = rows.order(EXPERTS, shape[0])
    if len(banks) == 1:
        yield name, rows.matrices(order, shape[1], banks[0][0]), banks[0][0]
        return
    of_four = [bank for bank, (_, share) in enumerate(banks) for _ in range(share)]
    home = np.array([of_four[expert % 4] for expert in range(EXPERTS)])
    table = np.full((len(banks), EXPERTS), NOT_HERE, np.int32)
    for bank, (qtype, _) in enumerate(banks):
        mine = np.flatnonzero(home == bank)
        table[bank, mine] = range(len(mine))
        yield bank_name(name, bank), rows.matrices(order[mine], shape[1], qtype), qtype
    yield map_name(name), table, "I32"


def write_model(path: Path, banks: Banks) -> None:
    """A model without a vocabulary, which llama-bench does not need."""
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(EXPERT_WIDTH)
    writer.add_expert_feed_forward_length(EXPERT_WIDTH)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(VOCABULARY)
    if len(banks) > 1:
        writer.add_uint32(f"{ARCHITECTURE}.{VERSION_KEY}", VERSION)
        writer.add_uint32(f"{ARCHITECTURE}.{COUNT_KEY}", len(banks))
    for name, data, qtype in tensors_of(banks):
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[qtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_once(tool: Path, files: dict[str, Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, file → {"pp", "tg"}, of one call of llama-bench."""
    command = [str(tool), "-o", "json", "-p", str(arguments.prompt), "-n", str(arguments.generate),
               "-r", str(arguments.repetitions), "-t", str(arguments.threads)]  # fmt: skip
    for path in files.values():
        command += ["-m", str(path)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    names = {str(path): name for name, path in files.items()}
    speeds: dict[str, Any] = {name: {} for name in files}
    for test in json.loads(printed):
        kind = "tg" if test["n_gen"] else "pp"
        speeds[names[test["model_filename"]]][kind] = median(test["samples_ts"])
    return speeds


def measure(tool: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the files, run the rounds; ratios to the first file."""
    files = {name: folder / f"{name.replace(' ', '-')}.gguf" for name in FILES}
    for name, path in files.items():
        if not path.is_file():
            write_model(path, FILES[name])
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append(run_once(tool, files, arguments))
        name = next(iter(files))
        files[name] = files.pop(name)  # each file comes first once, and so on
    first = next(iter(FILES))
    found: dict[str, Any] = {}
    for name in FILES:
        found[name] = {"bytes": (folder / f"{name.replace(' ', '-')}.gguf").stat().st_size}
        for kind in NEEDED:
            ratios = [speeds[name][kind] / speeds[first][kind] for speeds in rounds]
            found[name][kind] = {
                "speed": median(speeds[name][kind] for speeds in rounds),
                "ratio": median(ratios), "ratios": ratios,
            }  # fmt: skip
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2 * len(FILES))
    parser.add_argument("--repetitions", type=int, default=2, help="in each call")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tool", type=Path, help="a patched llama-bench of your own")
    parser.add_argument("--folder", type=Path, help="keep the files here, and use those there")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    tool = arguments.tool or ensure_built(("llama-bench",), patched=True).tool("llama-bench")
    with tempfile.TemporaryDirectory(prefix="moequant-") as temporary:
        found = measure(tool, arguments.folder or Path(temporary), arguments)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{'':>11} {'MB':>6} {'pp t/s':>8} {'ratio':>6} {'tg t/s':>8} {'ratio':>6}")
    for name, row in found.items():
        pp, tg = row["pp"], row["tg"]
        print(f"{name:>11} {row['bytes'] / 1e6:6.0f} {pp['speed']:8.1f} {pp['ratio']:6.3f} "
              f"{tg['speed']:8.2f} {tg['ratio']:6.3f}")  # fmt: skip
        for kind in NEEDED:
            shown = " ".join(f"{ratio:.3f}" for ratio in row[kind]["ratios"])
            print(f"{'':>11} {kind} {shown}")


if __name__ == "__main__":
    main()
