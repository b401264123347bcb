"""The text model's configuration, as transformers understands config.json.

Owns: filling in defaults (the way llama.cpp's converter gets its hyperparameters: transformers'
config class, then `text_config` raised to the top), and refusing what that cannot take. Leaves out:
what a family can run (`Family.refuse`).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moequant.architectures.family import Config, Family
from moequant.errors import ArchitectureError, CheckpointError

MAX_LAYERS, MAX_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
COUNTS = ("num_local_experts", "num_experts")


def text_config(raw: Config, family: Family, origin: str = "config.json") -> dict[str, Any]:
    """config.json's text model with every default filled in; errors name `origin`.

    Raises:
        CheckpointError: values of the wrong type or size.
        ArchitectureError: a quantized checkpoint, or more than llama.cpp can hold.
    """
    own = raw.get("text_config", raw)
    if not isinstance(own, dict):
        raise CheckpointError(f"config.json: text_config is a {type(own).__name__}, not an object.")
    _check_counts(own, origin)
    _refuse_quantized(raw.get("quantization_config") or own.get("quantization_config"))
    full = _with_defaults(raw, origin)
    config = {**full, **full.get("text_config", {})}
    with readable(origin):
        unsupported = family.refuse(config)
    if unsupported:
        raise ArchitectureError(
            f"{origin}: a variant of {family.architecture} that llama.cpp does not run: "
            + "; ".join(unsupported)
            + "."
        )
    return config


@contextmanager
def readable(origin: str = "config.json") -> Iterator[None]:
    """Turns the stumble over a configuration that makes no sense into a CheckpointError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{origin}: makes no sense ({reason}).") from error


def _check_counts(own: Config, origin: str) -> None:
    """Refuse counts that would make lists of absurd length before anything else sees them."""
    limits = {"num_hidden_layers": MAX_LAYERS, **dict.fromkeys(COUNTS, MAX_EXPERTS)}
    for name, limit in limits.items():
        value = own.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"{origin}: {name} is {value!r}, not a count.")
        if value > limit:
            raise ArchitectureError(
                f"{origin}: {name} is {value}; llama.cpp holds at most {limit}."
            )


def _refuse_quantized(quantization: Any) -> None:
    if quantization:
        known = quantization if isinstance(quantization, dict) else {}
        method = known.get("quant_method", "an unknown method")
        raise ArchitectureError(
            f"config.json: a checkpoint quantized with {method}; use the original weights."
        )


def _with_defaults(raw: Config, origin: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(dict(raw)))
        values: dict[str, Any] = config.to_dict()
    except Exception as error:  # its validators raise whatever they meet
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{origin}: transformers refuses it: {reason}") from error
    return values
