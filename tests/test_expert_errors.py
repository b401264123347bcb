"""The score of an expert, held against the sum written out over gguf-py's decoder."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from moequant.architectures import describe
from moequant.calibrate import CalibrationOptions, Imatrix, calibrate
from moequant.calibrate.imatrix import MatrixStatistics
from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.errors import CheckpointError, ImatrixError
from moequant.expert_errors import expert_scores
from moequant.pipeline import ExportOptions, export
from moequant.plan import preset_plan, rankable
from tests.checkpoints import make_checkpoint

SMALL: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Imatrix, Path]:
    """One layer, its imatrix, and its file in the preset's types."""
    folder = tmp_path_factory.mktemp("scores")
    checkpoint = open_checkpoint(make_checkpoint("gemma4-additive", folder / "model", **SMALL))
    options = CalibrationOptions(tokens=1024, sequence_length=128, floor=8)
    imatrix = calibrate(checkpoint, describe(checkpoint), options)
    imatrix.write(folder / "imatrix.gguf")
    export(checkpoint, folder / "model.gguf", ExportOptions(imatrix_file=folder / "imatrix.gguf"))
    return checkpoint, imatrix, folder / "model.gguf"


def test_scores_are_the_sums_over_the_files_values(made: tuple[Checkpoint, Imatrix, Path]) -> None:
    checkpoint, imatrix, path = made
    model = describe(checkpoint)
    stacks = rankable(preset_plan("Q4_K_M", model, has_imatrix=True))
    seen: list[tuple[int, int]] = []
    scores = expert_scores(checkpoint, model, stacks, imatrix,
                           progress=lambda _, done, total: seen.append((done, total)))  # fmt: skip
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    specs = {spec.name: spec for spec in model.tensors}
    assert len(stacks) > 0
    for stack in stacks:
        found = tensors[stack.name]
        assert found.tensor_type == GGMLQuantizationType[stack.qtype]
        decoded = gguf.dequantize(found.data, found.tensor_type)
        exact = specs[stack.name].load(checkpoint).float().numpy()
        entry = imatrix.entries[stack.name]
        importance = imatrix.importance(stack.name, 16, stack.shape[-1])
        assert importance is not None
        assert entry.gate_counts is not None
        error = (exact.astype(np.float64) - decoded) ** 2
        weighted = (error * importance[:, None, :]).sum((1, 2))
        expected = weighted * entry.gate_counts.reshape(-1)
        np.testing.assert_allclose(scores[stack.name], expected, rtol=1e-5)
        assert len(set(scores[stack.name])) == 16
    total = 16 * len(stacks)
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_an_expert_that_is_never_used_scores_0(made: tuple[Checkpoint, Imatrix, Path]) -> None:
    checkpoint, imatrix, _ = made
    model = describe(checkpoint)
    stack = rankable(preset_plan("Q4_K_M", model, has_imatrix=True))[0]
    entry = imatrix.entries[stack.name]
    assert entry.gate_counts is not None
    gates = entry.gate_counts.copy()
    gates[5] = 0
    unused = MatrixStatistics(entry.in_sum2, entry.counts, entry.gate_in_sum2, gates)
    (scores,) = expert_scores(checkpoint, model, [stack], Imatrix({stack.name: unused})).values()
    assert scores[5] == 0
    assert min(score for expert, score in enumerate(scores) if expert != 5) > 0


def test_an_imatrix_without_gates_is_refused(made: tuple[Checkpoint, Imatrix, Path]) -> None:
    """As llama-imatrix's is; and one that lacks a stack altogether."""
    checkpoint, imatrix, _ = made
    model = describe(checkpoint)
    stacks = rankable(preset_plan("Q4_K_M", model, has_imatrix=True))
    name = stacks[0].name
    plain = MatrixStatistics(imatrix.entries[name].in_sum2, imatrix.entries[name].counts)
    with pytest.raises(ImatrixError, match="not for:") as caught:
        expert_scores(checkpoint, model, stacks, Imatrix({name: plain}))
    for stack in stacks:
        assert f"\n  - {stack.name}" in str(caught.value)
    assert "moequant calibrate" in str(caught.value)


def test_a_nan_is_the_checkpoints(made: tuple[Checkpoint, Imatrix, Path]) -> None:
    """And named as its tensor is there."""
    _, imatrix, path = made
    bad = make_checkpoint("gemma4-additive", path.parent / "bad", **SMALL)
    for shard in bad.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith("experts.gate_up_proj"):
                tensor[3, 0, 0] = torch.nan
        save_file(tensors, shard, metadata={"format": "pt"})
    opened = open_checkpoint(bad)
    model = describe(opened)
    stacks = rankable(preset_plan("Q4_K_M", model, has_imatrix=True))
    with pytest.raises(CheckpointError, match=r"gate_up_proj.*1 NaN"):
        expert_scores(opened, model, stacks, imatrix)
