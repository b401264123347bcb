"""Checkpoints and reference models that the tests of calibration share, made once per kind."""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from moequant.architectures import ModelSpec, describe
from moequant.checkpoint import Checkpoint, open_checkpoint
from tests.checkpoints import LAYERS_WITH_EXPERTS, TEXT, make_checkpoint

_KEPT: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends

# llama.cpp's Gemma tokenizer never merges across a newline; the one trained on TEXT does.
ONE_LINE = TEXT.replace("\n", " ")


@functools.cache
def folder(kind: str) -> Path:
    """The checkpoint of a kind, in float32."""
    _KEPT.append(tempfile.TemporaryDirectory())
    return make_checkpoint(kind, Path(_KEPT[-1].name) / kind, dtype=torch.float32)


@functools.cache
def described(kind: str) -> tuple[Checkpoint, ModelSpec]:
    """The checkpoint, opened and described."""
    checkpoint = open_checkpoint(folder(kind))
    return checkpoint, describe(checkpoint)


def reference(kind: str, path: Path | None = None) -> Any:
    """The whole model, loaded by transformers, with its eager experts: the same order of sums."""
    path = path or folder(kind)
    loader = transformers.AutoModelForCausalLM
    if "conditional" in kind:
        loader = transformers.AutoModelForImageTextToText
    transformers.utils.logging.set_verbosity_error()
    model = loader.from_pretrained(path).eval()
    if kind in LAYERS_WITH_EXPERTS:
        plain = copy.deepcopy(model.config)
        plain.enable_moe_block = False
        for bid in set(range(len(model.model.layers))) - set(LAYERS_WITH_EXPERTS[kind]):
            layer = type(model.model.layers[bid])(plain, bid)
            layer.load_state_dict(model.model.layers[bid].state_dict(), strict=False)
            model.model.layers[bid] = layer.eval()
    model.set_experts_implementation("eager")
    return model


def windows(sequences: int = 3, length: int = 96, seed: int = 1) -> torch.Tensor:
    """Random ids of ordinary tokens, longer than the sliding windows of the checkpoints."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(30, 480, (sequences, length), generator=generator)
