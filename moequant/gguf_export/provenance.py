"""The `moequant.*` keys: what made a file, from what, and what its experts did in calibration.

Owns: those keys (documented in docs/formats.md). Leaves out: every key that llama.cpp reads.
"""

from collections.abc import Sequence
from typing import Any

from gguf import GGUFValueType

import moequant
from moequant.calibrate import Imatrix
from moequant.checkpoint import Checkpoint
from moequant.gguf_export.metadata import MetadataEntry
from moequant.parameters import Parameters
from moequant.plan import Plan

UINT64, UINT32 = GGUFValueType.UINT64, GGUFValueType.UINT32
RUNTIME = "llama.cpp with moequant's patch (expert banks)"
VALUE_TYPES = {str: GGUFValueType.STRING, int: UINT64, float: GGUFValueType.FLOAT64}


def provenance(
    checkpoint: Checkpoint,
    plan: Plan,
    imatrix: Imatrix | None,
    parameters: Parameters,
    *,
    source: str | None,
    unweighted: Sequence[str],
    edited: Sequence[str],
) -> list[MetadataEntry]:
    """Every `moequant.*` entry of a file; those about calibration only where there was one.

    `source`: the name of the imatrix file, None if importance was measured. `unweighted`: tensors
    without importance. `edited`: tensors whose type is not the preset's.
    """
    entries = [
        _text("moequant.version", moequant.__version__),
        _text("moequant.source.name", checkpoint.name),
        _text("moequant.source.digest", checkpoint.digest()),
        *([_text("moequant.source.part", checkpoint.part)] if checkpoint.part else []),
        _text("moequant.plan.preset", plan.preset),
        _text("moequant.plan.digest", plan.digest()),
        MetadataEntry("moequant.parameters.total", parameters.total, UINT64),
        MetadataEntry("moequant.parameters.active", parameters.active, UINT64),
        MetadataEntry("moequant.parameters.dense", parameters.dense, UINT64),
        MetadataEntry("moequant.parameters.expert", parameters.expert, UINT64),
    ]
    if plan.fallbacks:
        lines = [f"{t.name} {t.wanted} -> {t.qtype}: {t.reason}" for t in plan.fallbacks]
        entries.append(_array("moequant.plan.fallbacks", lines, GGUFValueType.STRING))
    if plan.banked:
        lines = [f"{t.name} {t.bank_summary}" for t in plan.banked]
        entries.append(_text("moequant.runtime", RUNTIME))
        entries.append(_array("moequant.plan.banks", lines, GGUFValueType.STRING))
    for key, names in (("plan.edited", edited), ("plan.unweighted", unweighted)):
        if names:
            entries.append(_array(f"moequant.{key}", list(names), GGUFValueType.STRING))
    if imatrix is None:
        return [*entries, _text("moequant.calibration.source", "none")]
    entries.append(_text("moequant.calibration.source", source or "measured"))
    return entries + _calibration(imatrix)


def _calibration(imatrix: Imatrix) -> list[MetadataEntry]:
    """What the imatrix says of itself, and each expert's share of its layer's routed tokens."""
    entries = [
        MetadataEntry(key, value, VALUE_TYPES[type(value)])
        for key, value in sorted(imatrix.metadata.items())
        if key.startswith(("moequant.calibration.", "moequant.checkpoint."))
        and type(value) in VALUE_TYPES
    ]
    if imatrix.datasets:
        entries.append(
            _array("moequant.calibration.datasets", list(imatrix.datasets), GGUFValueType.STRING)
        )
    shares = imatrix.routed_share()
    if shares:
        entries.append(_array("moequant.experts.layers", list(shares), UINT32))
        flat = [share for layer in shares.values() for share in layer]
        entries.append(_array("moequant.experts.routed_share", flat, GGUFValueType.FLOAT32))
    thin = [str(expert) for expert in imatrix.thin_experts()]
    if thin:
        entries.append(_array("moequant.experts.thin", thin, GGUFValueType.STRING))
    return entries


def _text(key: str, value: str) -> MetadataEntry:
    return MetadataEntry(key, value, GGUFValueType.STRING)


def _array(key: str, values: list[Any], kind: GGUFValueType) -> MetadataEntry:
    return MetadataEntry(key, values, GGUFValueType.ARRAY, kind)
