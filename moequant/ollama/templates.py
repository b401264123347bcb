"""Chat templates in Ollama's form (Go's text/template), for the families whose form we know.

Owns: recognising a file's own Jinja template by what it renders, and the Go template that renders
the same. Leaves out: running the Jinja template (`render_template`); Gemma 4's tool calls, which
Ollama's built-in renderer writes.

A template is known if, on `PROBES`, it renders exactly the turns of `_FORMS`; how it ends a prompt
(nothing, an empty thought, …) is read off. What is not known gets no template: Ollama (0.30 and
later) then applies the file's own Jinja template.

Ollama gives a template `.Messages` (with `.Role`, `.Content`, `.Thinking`, `.ToolCalls`), `.Tools`,
`.Think` and `.IsThinkSet`. BOS is the tokenizer's work, so no template writes it. A last message of
the assistant is left open, to be continued.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from moequant.errors import OllamaError
from moequant.ollama.modelfile import writable

Message = dict[str, str]
Conversation = tuple[Message, ...]

PROBES: tuple[Conversation, ...] = (
    ({"role": "user", "content": "One"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two"}),
    (
        {"role": "user", "content": "Three"},
        {"role": "assistant", "content": "Four, and a line\nmore"},
        {"role": "user", "content": "Five"},
    ),
)
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
VARIANTS: tuple[dict[str, Any], ...] = (
    {}, {"enable_thinking": True}, {"enable_thinking": False}, {"tools": [TOOL]},
)  # fmt: skip
LONGEST_WAIT = 120  # seconds; render_template bounds its CPU time, a busy machine takes longer
LONGEST_ENDING = 100  # characters after the opening of the assistant's turn


@dataclass(frozen=True)
class ChatTemplate:
    """`text` is the Go template; `stop` ends a turn; renderer and parser are Ollama's own."""

    family: str
    text: str
    stop: str
    renderer: str | None = None
    parser: str | None = None


def known_template(jinja: str) -> ChatTemplate | None:
    """The Go template that renders what `jinja` renders, None where the form is not known.

    Raises:
        OllamaError: the program that renders `jinja` could not be run.
    """
    prompts = _rendered(jinja)

    def render(messages: Conversation, **options: Any) -> str | None:
        return prompts[PROBES.index(messages), VARIANTS.index(options)]

    for form in (_gemma4, _chatml):
        found = form(render)
        if found is not None:
            return found
    return None


def _rendered(jinja: str) -> dict[tuple[int, int], str | None]:
    """The prompt of every probe in every variant; None where the template fails.

    All are None where it runs into a bound of `render_template`.
    """
    keys = list(product(range(len(PROBES)), range(len(VARIANTS))))
    conversations = [{"messages": PROBES[probe], **VARIANTS[way]} for probe, way in keys]
    job = json.dumps({"template": jinja, "conversations": conversations})
    program = Path(__file__).with_name("render_template.py")
    try:
        ended = subprocess.run(
            [sys.executable, "-P", str(program)], input=job, capture_output=True,
            encoding="utf-8", errors="replace", timeout=LONGEST_WAIT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return dict.fromkeys(keys)
    if ended.returncode < 0:  # by a signal: the kernel's, past a bound
        return dict.fromkeys(keys)
    if ended.returncode > 0:
        raise OllamaError(f"the chat template cannot be rendered:\n{ended.stderr[-500:]}")
    return dict(zip(keys, json.loads(ended.stdout), strict=True))


Render = Callable[..., str | None]


def _ending(render: Render, turns: Callable[[Message], str], opening: str, **options: Any
            ) -> str | None:  # fmt: skip
    """What follows `opening` at the end of every probe's prompt; None if any turn differs."""
    endings = set()
    for messages in PROBES:
        body = "".join(map(turns, messages)) + opening
        prompt = render(messages, **options)
        if prompt is None or not prompt.startswith(body):
            return None
        endings.add(prompt.removeprefix(body))
    ending = endings.pop()
    return ending if not endings and _plain(ending) else None


def _plain(ending: str) -> bool:
    """Whether it can stand in a Go template, and in a Modelfile, as it is."""
    return len(ending) <= LONGEST_ENDING and not set("{}`") & set(ending) and writable(ending)


# --- Gemma 4 ---------------------------------------------------------------------------------

GEMMA4 = """\
{{- $think := and .IsThinkSet .Think }}
{{- $open := false }}
{{- range $i, $message := .Messages }}
{{- if and $think (eq $i 0) (ne .Role "system") }}<|turn>system
<|think|>
<turn|>
{{ end }}
{{- if eq .Role "assistant" }}<|turn>model
{{ else }}<|turn>{{ .Role }}
{{ end }}
{{- if and $think (eq $i 0) (eq .Role "system") }}<|think|>
{{ end }}
{{- .Content }}
{{- if and (eq .Role "assistant") (eq (len (slice $.Messages $i)) 1) }}{{ $open = true }}
{{- else }}<turn|>
{{ end }}
{{- end }}
{{- if not $open }}<|turn>model
{{ if $think }}THINKING{{ else }}PLAIN{{ end }}
{{- end }}"""


def _gemma_turn(message: Message) -> str:
    role = "model" if message["role"] == "assistant" else message["role"]
    return f"<|turn>{role}\n{message['content']}<turn|>\n"


def _gemma4(render: Render) -> ChatTemplate | None:
    plain = _ending(render, _gemma_turn, "<|turn>model\n")
    if plain is None:
        return None
    text = GEMMA4
    asked = render(PROBES[0], enable_thinking=True) or ""
    if _ending(render, _gemma_turn, "<|turn>model\n", enable_thinking=True) == plain:
        text = text.replace("and .IsThinkSet .Think", "false")  # a template that knows no thinking
    elif not _says_think(render):
        return None
    thinking = asked.rpartition("<|turn>model\n")[2]
    if not _plain(thinking):
        return None
    text = text.replace("THINKING", thinking).replace("PLAIN", plain)
    return ChatTemplate("gemma4", text, "<turn|>", renderer="gemma4", parser="gemma4")


def _says_think(render: Render) -> bool:
    """Whether thinking is asked for by <|think|> at the top of the system turn."""
    alone = render(PROBES[0], enable_thinking=True) or ""
    before = render(PROBES[1], enable_thinking=True) or ""
    return alone.startswith("<|turn>system\n<|think|>\n<turn|>\n<|turn>user\nOne") and (
        before.startswith("<|turn>system\n<|think|>\nBe brief.<turn|>\n")
    )


# --- ChatML, as Qwen writes it ---------------------------------------------------------------

TOOLS_BEFORE = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
TOOLS_AFTER = """
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

CHATML_TOOLS = f"""\
{{{{- if and $.Tools (eq $i 0) }}}}<|im_start|>system
{{{{ if eq .Role "system" }}}}{{{{ .Content }}}}

{{{{ end }}}}{TOOLS_BEFORE}{{{{ range $.Tools }}}}
{{{{ . }}}}{{{{ end }}}}{TOOLS_AFTER}<|im_end|>
{{{{ end }}}}
"""
CHATML_CALLS = """\
{{- range $j, $call := .ToolCalls }}
{{- if or $message.Content (gt $j 0) }}
{{ end }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>
{{- end }}
"""
CHATML = """\
{{- $asked := -1 }}
{{- range $i, $message := .Messages }}{{ if eq .Role "user" }}{{ $asked = $i }}{{ end }}{{ end }}
{{- $before := "" }}
{{- range $i, $message := .Messages }}
TOOLS{{- if and (eq $before "tool") (ne .Role "tool") }}<|im_end|>
{{ end }}
{{- if eq .Role "tool" }}
{{- if ne $before "tool" }}<|im_start|>user{{ end }}
<tool_response>
{{ .Content }}
</tool_response>
{{- else if eq .Role "assistant" }}<|im_start|>assistant
REASONING{{ .Content }}
CALLS{{- if or .ToolCalls (gt (len (slice $.Messages $i)) 1) }}<|im_end|>
{{ end }}
{{- else if SKIPPED }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}
{{- $before = .Role }}
{{- if .ToolCalls }}{{ $before = "call" }}{{ end }}
{{- end }}
{{- if eq $before "tool" }}<|im_end|>
{{ end }}
{{- if ne $before "assistant" }}<|im_start|>assistant
{{ if and .IsThinkSet (not .Think) }}PLAIN{{ else }}DEFAULT{{ end }}
{{- end }}"""
REASONING = """\
{{ if and .Thinking (gt $i $asked) }}<think>
{{ .Thinking }}
</think>

{{ end }}"""


def _chatml_turn(message: Message) -> str:
    return f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"


def _chatml(render: Render) -> ChatTemplate | None:
    opening = "<|im_start|>assistant\n"
    default = _ending(render, _chatml_turn, opening)
    plain = _ending(render, _chatml_turn, opening, enable_thinking=False)
    if default is None or plain is None:
        return None
    tools = _writes_tools(render)
    if not tools and render(PROBES[0], tools=[TOOL]) != render(PROBES[0]):
        return None  # tools in a form of its own: no template is better than one without them
    parts = {
        "TOOLS": CHATML_TOOLS if tools else "",
        "CALLS": CHATML_CALLS if tools else "",
        "SKIPPED": 'not (and $.Tools (eq $i 0) (eq .Role "system"))' if tools else "true",
        "REASONING": REASONING if "</think>" in default + plain else "",
        "PLAIN": plain,
        "DEFAULT": default,
    }
    text = CHATML
    for word, part in parts.items():
        text = text.replace(word, part)
    return ChatTemplate("chatml", text, "<|im_end|>")


def _writes_tools(render: Render) -> bool:
    """Whether tools are announced as Qwen does it."""
    prompt = render(PROBES[1], tools=[TOOL]) or ""
    listed = f"{TOOLS_BEFORE}\n{json.dumps(TOOL)}{TOOLS_AFTER}"
    return prompt.startswith(f"<|im_start|>system\nBe brief.\n\n{listed}<|im_end|>\n")
