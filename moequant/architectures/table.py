"""The table of model families, and finding a configuration's row in it.

Owns: `FAMILIES`. A new family is a file beside this one and a name in this tuple.
"""

from collections.abc import Mapping
from typing import Any

from moequant.architectures.family import Family
from moequant.architectures.gemma4 import GEMMA4
from moequant.architectures.qwen3 import QWEN3, QWEN3_MOE
from moequant.errors import ArchitectureError

FAMILIES: tuple[Family, ...] = (GEMMA4, QWEN3, QWEN3_MOE)


def family_of(config: Mapping[str, Any]) -> Family:
    """The row that config.json's `model_type` names; ArchitectureError if there is none."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ArchitectureError(f"config.json: model_type {model_type!r} is not supported. It can be: {known}.")  # fmt: skip  # noqa: E501


def family_named(architecture: str) -> Family:
    """The row with GGUF's name `architecture`."""
    return next(family for family in FAMILIES if family.architecture == architecture)
