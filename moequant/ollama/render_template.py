"""Renders one chat template for several conversations: a program of its own, run as a child.

Owns: rendering within bounds of output, CPU time and memory. A template in a downloaded file is a
program by a stranger, and one that never ends can be stopped only from outside. Leaves out: what
the conversations are, and what is made of the prompts (`templates`).

Reads JSON from stdin: {"template": …, "conversations": [{"messages": […], …options}]}; prints a
list with the prompt that transformers would make of each, without BOS, or null where the template
fails or writes more than `LONGEST` characters. Imports nothing of moequant, so that it starts fast.
"""

import json
import resource
import sys
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

LONGEST = 100_000  # characters of a prompt
CPU_SECONDS = 2  # for all conversations; those of known families take milliseconds
MEMORY = 1 << 30  # bytes beyond what the imports took


def main() -> None:
    job = json.load(sys.stdin)
    _bound()
    prompts = [_prompt(job["template"], **options) for options in job["conversations"]]
    json.dump(prompts, sys.stdout)


def _bound() -> None:
    """The kernel ends the process past `CPU_SECONDS`, and gives it no more than `MEMORY`."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(usage.ru_utime + usage.ru_stime) + CPU_SECONDS
    _lower(resource.RLIMIT_CPU, seconds)
    _lower(resource.RLIMIT_DATA, MEMORY)
    _lower(resource.RLIMIT_CORE, 0)


def _lower(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _prompt(template: str, messages: list[dict[str, str]], **options: Any) -> str | None:
    try:
        rendered, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True,
            bos_token="", eos_token="", **options,
        )  # fmt: skip
    except Exception:  # whatever a template written by others raises, it is not one we know
        return None
    return rendered[0] if len(rendered[0]) <= LONGEST else None


if __name__ == "__main__":
    main()
