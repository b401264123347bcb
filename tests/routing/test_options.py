"""What options refuse, and what importing them costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from moequant.errors import UsageError
from moequant.routing.options import RoutingOptions, default_tops


def test_numbers_of_experts_to_try() -> None:
    assert default_tops(4) == (1, 2, 3, 4)
    assert default_tops(8) == tuple(range(1, 9))
    assert default_tops(10) == (1, 2, 4, 8, 10)
    assert default_tops(16) == (1, 2, 4, 8, 16)
    assert RoutingOptions(tops=(6, 1)).tops_for(4, 16) == (1, 4, 6)
    with pytest.raises(UsageError, match="--top 0, 17: the model has 16 experts"):
        RoutingOptions(tops=(17, 2, 0)).tops_for(4, 16)


def test_options_out_of_range_are_named_together() -> None:
    twice = (("a", Path("x")), ("b", Path("y")), ("a", Path("z")))
    with pytest.raises(UsageError) as error:
        RoutingOptions(texts=twice, tokens=8, sequence_length=16, seed=-1, ablation=False, tops=())
    message = str(error.value)
    for part in ("tokens = 8, at least 16", "named 'a'", "seed = -1", "without the ablation"):
        assert part in message
    assert "'b'" not in message


def test_options_are_cheap_to_import() -> None:
    """`--help` shows them, and torch takes seconds."""
    code = "import sys, moequant.routing.options; print('torch' in sys.modules, len(sys.modules))"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.split()[0] == "False" and int(made.stdout.split()[1]) < 400
