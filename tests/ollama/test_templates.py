"""Go templates rendered by Go itself against the Jinja templates of the families they stand for."""

import json
import os
import re
import shutil
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from moequant.errors import OllamaError
from moequant.ollama.templates import LONGEST_WAIT, known_template
from moequant.runtime.llama_cpp import LlamaCpp

GEMMA = ["google-gemma-4-31B-it.jinja", "google-gemma-4-31B-it-interleaved.jinja"]
QWEN = ["Qwen-Qwen3-0.6B.jinja"]
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-additive-moe" / "chat_template.jinja"
# the older Gemma 4 form, which ends the prompt with the opening of the turn
SMALL_GEMMA = """{{ bos_token }}{% if enable_thinking is defined and enable_thinking or
messages[0]['role'] == 'system' %}{{ '<|turn>system\n' }}{% if enable_thinking is defined and
enable_thinking %}{{ '<|think|>\n' }}{% endif %}{% if messages[0]['role'] == 'system' %}{{
messages[0]['content'] | trim }}{% set messages = messages[1:] %}{% endif %}{{ '<turn|>\n' }}{%
endif %}{% for message in messages %}{{ '<|turn>' + ('model' if message['role'] == 'assistant' else
message['role']) + '\n' + message['content'] | trim + '<turn|>\n' }}{% endfor %}{% if
add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"""

SYSTEM = {"role": "system", "content": "You answer in one line."}
USER = {"role": "user", "content": 'What is "{{ .System }}" in <b>Go</b>?\nAnd ünïcode: 水?'}
ANSWER = {"role": "assistant", "content": "A field of the template's data."}
AGAIN = {"role": "user", "content": "And %s?"}
CONVERSATIONS = [
    [USER], [SYSTEM, USER], [USER, ANSWER, AGAIN], [SYSTEM, USER, ANSWER, AGAIN, ANSWER, USER],
]  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Which"}},
            "required": ["city"],
        },
    },
}
CALL = {"function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}}
RESULT = {"role": "tool", "content": '{"rain": true}'}


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The renderer, compiled; skipped, with a warning in the summary, where there is no Go."""
    compiler = shutil.which("go")
    if compiler is None:
        pytest.skip("NOT CHECKED: Go's text/template; install it (Debian: golang-go)")
    folder = tmp_path_factory.mktemp("go")
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "GO111MODULE": "off",
        "GOCACHE": str(folder / "cache"), "CGO_ENABLED": "0",
    }  # fmt: skip
    source = Path(__file__).with_name("render.go")
    binary = folder / "render"
    subprocess.run([compiler, "build", "-o", binary, source], env=environment, check=True)
    return binary


def rendered(go: Path, template: str, messages: list[Any], **values: Any) -> str:
    """What Ollama would send to the model."""
    case = {"Template": template, "Values": {"Messages": messages, **values}}
    run = subprocess.run([go], input=json.dumps([case]), capture_output=True, text=True, check=True)
    return str(json.loads(run.stdout)[0])


def jinja(template: str, messages: list[Any], **options: Any) -> str:
    tools = options.pop("tools", None)
    with warnings.catch_warnings():
        texts, _ = render_jinja_template(
            [messages], tools=tools, chat_template=template, add_generation_prompt=True,
            bos_token="", **options,
        )  # fmt: skip
    return str(texts[0])


def jinja_of(llama_cpp: LlamaCpp, name: str) -> str:
    if name == "small":
        return SMALL_GEMMA
    if name == "example":
        return EXAMPLE.read_text(encoding="utf-8")
    return (llama_cpp.source / "models" / "templates" / name).read_text(encoding="utf-8")


def plain_json(text: str) -> str:
    """Every line that is JSON, written one way: the two sides differ in blanks and order only."""

    def same(match: re.Match[str]) -> str:
        try:
            return json.dumps(json.loads(match[0]), sort_keys=True)
        except ValueError:
            return match[0]

    return re.sub(r"^\{.*\}$", same, text, flags=re.M)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", [*GEMMA, "small", "example", *QWEN])
@pytest.mark.parametrize("think", [None, False, True])
def test_conversations_render_alike(
    llama_cpp: LlamaCpp, go: Path, name: str, think: bool | None
) -> None:
    source = jinja_of(llama_cpp, name)
    found = known_template(source)
    assert found is not None
    asked = {} if think is None else {"enable_thinking": think}
    given = {"Think": bool(think), "IsThinkSet": think is not None}
    for messages in CONVERSATIONS:
        expected = jinja(source, messages, **asked)
        assert rendered(go, found.text, messages, **given) == expected


@pytest.mark.llama_cpp
def test_gemma_and_qwen_are_told_apart(llama_cpp: LlamaCpp) -> None:
    gemma = known_template(jinja_of(llama_cpp, GEMMA[0]))
    qwen = known_template(jinja_of(llama_cpp, QWEN[0]))
    assert gemma is not None and qwen is not None
    assert (gemma.family, gemma.stop, gemma.renderer, gemma.parser) == (
        "gemma4", "<turn|>", "gemma4", "gemma4",
    )  # fmt: skip
    assert (qwen.family, qwen.stop, qwen.renderer) == ("chatml", "<|im_end|>", None)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("before", [[USER], [SYSTEM, USER]])
@pytest.mark.parametrize("content", ["", "I shall look."])
def test_qwen_tools_render_alike(
    llama_cpp: LlamaCpp, go: Path, before: list[Any], content: str
) -> None:
    """Two calls, two results, reasoning between them; then a question after it all."""
    source = jinja_of(llama_cpp, QWEN[0])
    found = known_template(source)
    assert found is not None
    calls = {"role": "assistant", "content": content, "tool_calls": [CALL, CALL]}
    reasoned = calls | {"reasoning_content": "It may rain."}
    theirs = [*before, reasoned, RESULT, RESULT]
    answer = calls | {"Thinking": "It may rain.", "ToolCalls": [CALL, CALL]}
    ours = [*before, answer, RESULT, RESULT]
    for more in ([], [ANSWER, AGAIN]):
        expected = jinja(source, theirs + more, tools=[TOOL])
        text = rendered(go, found.text, ours + more, Tools=[TOOL])
        assert "<tool_call>\n" in text and "<tools>" in text
        assert plain_json(text) == plain_json(expected)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", [GEMMA[0], QWEN[0]])
def test_an_answer_that_has_begun_is_left_open(llama_cpp: LlamaCpp, go: Path, name: str) -> None:
    found = known_template(jinja_of(llama_cpp, name))
    assert found is not None
    text = rendered(go, found.text, [USER, ANSWER])
    assert text.endswith(ANSWER["content"])
    closed = rendered(go, found.text, [USER, ANSWER, AGAIN])
    assert closed.startswith(text + found.stop)


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    "name", ["google-gemma-2-2b-it.jinja", "Qwen-Qwen2.5-7B-Instruct.jinja", "Qwen3-Coder.jinja"]
)
def test_other_forms_are_not_guessed(llama_cpp: LlamaCpp, name: str) -> None:
    """Gemma 2's turns, Qwen 2.5's own system message, Qwen3-Coder's tools in XML."""
    assert known_template(jinja_of(llama_cpp, name)) is None


@pytest.mark.parametrize(
    "source",
    ["", "{{", "{{ raise_exception('no') }}", "{% for m in messages %}{{ m.content }}{% endfor %}"],
)
def test_broken_templates_are_unknown(source: str) -> None:
    assert known_template(source) is None


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'x' * 9 ** 10 }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    ],
)
def test_a_template_that_never_ends_is_given_up(source: str) -> None:
    """Bounds of the kernel: the wait, which is for a machine that is busy, is not what ends it."""
    asked = time.monotonic()
    assert known_template(source) is None
    assert time.monotonic() - asked < LONGEST_WAIT


def test_a_renderer_that_cannot_run_is_no_unknown_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moequant.ollama.templates.__file__", str(tmp_path / "templates.py"))
    with pytest.raises(OllamaError, match="cannot be rendered"):
        known_template("{{ messages }}")
