"""`moequant ollama`: the Modelfile by its grammar, and the calls by Ollama's documented API."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from moequant.cli import main
from moequant.errors import UsageError
from moequant.ollama import Modelfile, check_name, server_address
from moequant.ollama.templates import known_template
from tests.checkpoints import make_checkpoint
from tests.ollama.modelfiles import parse
from tests.ollama.server import Ollama

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)

TEXTS = {"general.license": "apache-2.0", "tokenizer.chat_template": CHATML}


def write_gguf(path: Path, **extra: Any) -> Path:
    """A file with the metadata that a Modelfile is made of; `extra` are further text keys."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_type("model")
    writer.add_context_length(32768)
    writer.add_token_list(["a", "b", "<|endoftext|>", "<|im_end|>"])
    writer.add_eos_token_id(3)
    writer.add_eot_token_id(2)
    writer.add_float32("general.sampling.temp", 0.6)
    writer.add_float32("general.sampling.top_p", 0.95)
    writer.add_int32("general.sampling.top_k", 20)
    writer.add_float32("general.sampling.penalty_repeat", 1.05)
    for key, value in {**TEXTS, **extra}.items():
        writer.add_key_value(
            key, value,
            gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32,
        )  # fmt: skip
    writer.add_tensor("token_embd.weight", np.arange(4 << 12, dtype=np.float32).reshape(4, -1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@dataclass
class Running:
    """A server that runs, and its address."""

    ollama: Ollama
    host: str


@pytest.fixture
def server() -> Iterator[Running]:
    state = Ollama()
    with state.serve() as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield Running(state, f"127.0.0.1:{http.server_address[1]}")
        http.shutdown()
        thread.join()


@contextmanager
def answering(body: str, status: int) -> Iterator[str]:
    """The address of a server that gives this answer to everything."""

    class Same(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode("utf-8"))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Same) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{http.server_address[1]}"
        http.shutdown()


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where nothing listens, which is also $OLLAMA_HOST."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("OLLAMA_HOST", host)
    return host


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["ollama", *map(str, arguments)])


# --- the Modelfile ---------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


@settings(deadline=None)
@given(ANY_TEXT, ANY_TEXT, ANY_TEXT, st.floats(0, 2), st.integers(0, 1 << 20))
def test_what_is_written_is_what_is_read(
    template: str, stop: str, system: str, temperature: float, context: int
) -> None:
    """Any text survives, quotes and line breaks too, or is refused before anything is written."""
    modelfile = Modelfile(
        ("./a file.gguf",), (("num_ctx", context), ("temperature", temperature), ("stop", stop)),
        template=template, system=system, license='"quoted"\nand "" more"',
    )  # fmt: skip
    writable = all(
        '"""' not in text and all(c.isprintable() or c in " \t\r\n" for c in text)
        for text in (template, stop, system)
    )
    if not writable:
        with pytest.raises(UsageError, match="Modelfile cannot hold"):
            modelfile.text.encode()
        return
    expected: list[tuple[str, object]] = [
        ("from", "./a file.gguf"), ("parameter", ("num_ctx", context)),
        ("parameter", ("temperature", temperature)), ("parameter", ("stop", stop)),
        ("template", template), ("system", system), ("license", '"quoted"\nand "" more"'),
    ]  # fmt: skip
    assert parse(modelfile.text) == [e for e in expected if e[1]]


def test_the_grammar_of_the_tests_is_ollama_s() -> None:
    """Cases that Ollama's own documentation and parser tests have."""
    text = (
        "# comment\nFROM llama3.2\nparameter temperature 1\n\nSYSTEM You are Mario from super.\n"
        'TEMPLATE """{{ if .System }}a\n"b" {{ end }}"""\nPARAMETER stop "AI assistant:"\n'
        'LICENSE """\nMIT\n"""\nMESSAGE user Is Toronto in Canada?'
    )
    assert parse(text) == [
        ("from", "llama3.2"), ("parameter", ("temperature", 1.0)),
        ("system", "You are Mario from super."), ("template", '{{ if .System }}a\n"b" {{ end }}'),
        ("parameter", ("stop", "AI assistant:")), ("license", "\nMIT\n"),
        ("message", "user Is Toronto in Canada?"),
    ]  # fmt: skip
    for broken in ("PARAMETER temperature 1", 'FROM a\nTEMPLATE """b', "FROM a\nBADCOMMAND b"):
        with pytest.raises(ValueError):
            parse(broken)


def test_a_modelfile_says_what_the_file_says(tmp_path: Path, nobody: str) -> None:
    file = write_gguf(tmp_path / "a model.gguf")
    result = run(file, "mine", "--system", "Be\nbrief.", "--json")
    assert result.exit_code == 0, result.output
    path = tmp_path / "a model.Modelfile"
    template = known_template(CHATML)
    assert template is not None
    assert parse(path.read_text(encoding="utf-8")) == [
        ("from", "./a model.gguf"), ("parameter", ("num_ctx", 8192)),
        ("parameter", ("temperature", 0.6)), ("parameter", ("top_p", 0.95)),
        ("parameter", ("top_k", 20)), ("parameter", ("repeat_penalty", 1.05)),
        ("parameter", ("stop", "<|im_end|>")), ("parameter", ("stop", "<|endoftext|>")),
        ("template", template.text), ("system", "Be\nbrief."), ("license", "apache-2.0"),
    ]  # fmt: skip
    answer = json.loads(result.stdout)
    assert answer["created"] is False
    assert answer["by_hand"] == f"ollama create mine -f '{path}'"


def test_without_a_server_the_command_is_told(tmp_path: Path, nobody: str) -> None:
    result = run(write_gguf(tmp_path / "m.gguf"), "mine")
    assert result.exit_code == 0
    assert f"ollama create mine -f {tmp_path / 'm.Modelfile'}" in result.stdout
    assert f"answered at http://{nobody}." in result.stdout
    again = run(tmp_path / "m.gguf", "mine")
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert run(tmp_path / "m.gguf", "mine", "--force").exit_code == 0


def test_context_is_bounded_by_the_model(tmp_path: Path, nobody: str) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    output = tmp_path / "elsewhere" / "Modelfile"
    output.parent.mkdir()
    assert run(file, "m", "--context", "32768", "-o", output).exit_code == 0
    read = parse(output.read_text())
    assert ("parameter", ("num_ctx", 32768)) in read
    assert read[0] == ("from", str(file.resolve()))
    refused = run(file, "m", "--context", "32769", "--force")
    assert refused.exit_code == 2
    assert "32768" in refused.stderr


def test_an_unknown_template_is_left_out_and_said(tmp_path: Path, nobody: str) -> None:
    file = write_gguf(
        tmp_path / "m.gguf",
        **{"tokenizer.chat_template": "{{ messages }}", "general.sampling.xtc_threshold": 1},
    )
    result = run(file, "m", "--json")
    words = [word for word, _ in parse((tmp_path / "m.Modelfile").read_text())]
    assert "template" not in words
    notes = json.loads(result.stdout)["notes"]
    assert any("no TEMPLATE" in note for note in notes)
    assert any("xtc_threshold" in note for note in notes)


@pytest.mark.parametrize("text", ['MIT """ or so', "MIT\x1b[31m", "MIT\x00"])
def test_a_license_no_modelfile_can_hold_is_left_out_and_said(
    tmp_path: Path, nobody: str, text: str
) -> None:
    file = write_gguf(tmp_path / "m.gguf", **{"general.license": text})
    result = run(file, "m", "--json")
    assert result.exit_code == 0, result.output
    assert "license" not in [word for word, _ in parse((tmp_path / "m.Modelfile").read_text())]
    assert any("no LICENSE" in note for note in json.loads(result.stdout)["notes"])


# --- the calls -------------------------------------------------------------------------------


def test_a_model_is_uploaded_and_created(
    tmp_path: Path, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", server.host)
    file = write_gguf(tmp_path / "m.gguf")
    result = run(file, "me/mine:q4")
    assert result.exit_code == 0, result.output
    assert server.ollama.faults == []
    [digest] = server.ollama.blobs
    assert server.ollama.blobs[digest] == file.read_bytes()
    blob = f"/api/blobs/{digest}"
    assert server.ollama.requests == [
        ("GET", "/api/tags"), ("HEAD", blob), ("POST", blob), ("POST", "/api/create"),
    ]  # fmt: skip
    made = server.ollama.models["me/mine:q4"]
    template = known_template(CHATML)
    assert template is not None
    assert made == {
        "model": "me/mine:q4", "stream": True, "files": {"m.gguf": digest},
        "template": template.text, "license": "apache-2.0",
        "parameters": {
            "num_ctx": 8192, "temperature": 0.6, "top_p": 0.95, "top_k": 20,
            "repeat_penalty": 1.05, "stop": ["<|im_end|>", "<|endoftext|>"],
        },
    }  # fmt: skip
    assert "ollama run me/mine:q4" in result.stdout


def test_a_blob_that_is_there_is_not_sent_again(tmp_path: Path, server: Running) -> None:
    file = write_gguf(tmp_path / "m:1.gguf")
    for _ in range(2):
        assert run(file, "m", "--host", server.host, "--force").exit_code == 0
    methods = [method for method, path in server.ollama.requests if "/blobs/" in path]
    assert methods == ["HEAD", "POST", "HEAD"]
    assert server.ollama.faults == []


def test_upload_is_counted_to_the_last_byte(tmp_path: Path, server: Running) -> None:
    from moequant.ollama import publish

    file = write_gguf(tmp_path / "m.gguf")
    seen: list[tuple[str, int, int]] = []
    published = publish(file, "m", host=server.host, progress=lambda *a: seen.append(a))
    assert published.created
    uploaded = [done for stage, done, _ in seen if stage == "uploading"]
    size = file.stat().st_size
    assert uploaded == sorted(uploaded) and uploaded[0] == 0 and uploaded[-1] == size
    assert len(uploaded) > 2
    assert {total for stage, _, total in seen if stage == "uploading"} == {size}
    assert seen[-1] == ("creating", 4, 4)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"refuse": (400, "unknown model architecture")}, "unknown model architecture (HTTP 400)"),
        ({"refuse": (500, "no space")}, "no space (HTTP 500)"),
        ({"stream_error": "invalid file magic"}, "invalid file magic"),
        ({"breaks": "upload"}, "did not create m"),
        ({"breaks": "create"}, "did not create m"),
        ({"unfinished": True}, "fell silent after 'using existing layer'"),
    ],
)
def test_what_a_server_refuses_is_one_error(
    tmp_path: Path, server: Running, how: dict[str, Any], said: str
) -> None:
    for name, value in how.items():
        setattr(server.ollama, name, value)
    result = run(write_gguf(tmp_path / "m.gguf"), "m", "--host", server.host)
    assert result.exit_code == 1
    assert said in result.stderr and server.host in result.stderr
    assert "Traceback" not in result.output
    assert (tmp_path / "m.Modelfile").exists()
    assert server.ollama.models == {}


def test_something_else_that_answers_is_told_from_ollama(tmp_path: Path) -> None:
    with answering("File not found", 404) as host:
        result = run(write_gguf(tmp_path / "m.gguf"), "m", "--host", host)
    assert result.exit_code == 1
    assert "no Ollama server" in result.stderr


NO_ADDRESSES = [
    "http://[::1", "127.0.0.1:notaport", "127.0.0.1:99999", "ftp://x", "not a host", "http://",
    "127.0.0.1:1\n", "127.0.0.1:0", "a..b:1", "user:word@localhost", "localhost?x=1",
]  # fmt: skip


@pytest.mark.parametrize("host", NO_ADDRESSES)
@pytest.mark.parametrize("by", ["option", "variable"])
def test_a_bad_address_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, by: str
) -> None:
    if by == "variable":
        monkeypatch.setenv("OLLAMA_HOST", host)
    given = ("--host", host) if by == "option" else ()
    result = run(write_gguf(tmp_path / "m.gguf"), "m", *given)
    assert result.exit_code == 2
    assert repr(host) in result.stderr and "Traceback" not in result.output
    assert ("$OLLAMA_HOST" in result.stderr) == (by == "variable")
    assert not (tmp_path / "m.Modelfile").exists()


@pytest.mark.parametrize(
    ("variable", "good", "code"),
    [
        ({"OLLAMA_HOST": "127.0.0.1:99999"}, False, 2),
        ({"OLLAMA_HOST": "127.0.0.1:99999"}, True, 0),
        ({"OLLAMA_HOST": "http://[::1"}, True, 0),
        ({"ALL_PROXY": "nonsense://x"}, True, 0),
    ],
)
def test_a_bad_variable_does_not_stop_the_import(
    tmp_path: Path, server: Running, variable: dict[str, str], good: bool, code: int
) -> None:
    """In a new process: the client's package makes a client of its own as it is imported."""
    file = write_gguf(tmp_path / "m.gguf")
    given = ["--host", server.host] if good else []
    command = [sys.executable, "-m", "moequant.cli", "ollama", str(file), "mine", *given]
    ended = subprocess.run(
        command, env=os.environ | variable, capture_output=True, text=True, check=False
    )
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ("mine" in server.ollama.models) == good


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("localhost", "http://localhost:11434"), (":1234", "http://127.0.0.1:1234"),
        ("https://a.b-c.org/api/", "https://a.b-c.org:443/api"), ("http://x", "http://x:80"),
        ("[::1]:5", "http://[::1]:5"), ("0.0.0.0", "http://0.0.0.0:11434"),
    ],
)  # fmt: skip
def test_addresses_are_read_as_the_official_client_reads_them(host: str, address: str) -> None:
    from ollama._client import _parse_host

    assert server_address(host) == address == _parse_host(host)


@pytest.mark.parametrize(
    "body", ["[]", "null", "7", '{"models": 5}', '{"models": [[]]}', "<html>", '["\\ud800"]']
)
@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_of_another_shape_is_one_error(tmp_path: Path, body: str, status: int) -> None:
    with answering(body, status) as host:
        result = run(write_gguf(tmp_path / "m.gguf"), "m", "--host", host)
    assert result.exit_code == 1, result.output
    assert "no Ollama server" in result.stderr and host in result.stderr


def test_escape_codes_of_a_server_are_not_obeyed(tmp_path: Path) -> None:
    with answering("\x1b]0;gone\x07\x1b[2Jred\x9b31m", 500) as host:
        result = run(write_gguf(tmp_path / "m.gguf"), "m", "--host", host)
    assert result.exit_code == 1 and "\\x1b[2Jred\\x9b31m" in result.stderr
    assert not set("\x1b\x07\x9b") & set(result.output)


def test_a_port_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moequant.ollama.server.PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        result = run(write_gguf(tmp_path / "m.gguf"), "m", "--host", host)
    assert result.exit_code == 1
    assert host in result.stderr and "said nothing for 0.5 seconds" in result.stderr


def test_only_the_first_question_has_a_time_limit(
    tmp_path: Path, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may hash and convert for longer than it may take to say that it is there."""
    monkeypatch.setattr("moequant.ollama.server.PROBE_SECONDS", 0.5)
    check = server.ollama.check_create
    monkeypatch.setattr(server.ollama, "check_create", lambda r: (time.sleep(1), check(r)))
    assert run(write_gguf(tmp_path / "m.gguf"), "m", "--host", server.host).exit_code == 0
    assert "m" in server.ollama.models


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("m", True), ("m:q4", True), ("me/m", True), ("host.org/me/m:Q4_K_M", True),
        ("localhost:5000/me/m", True), ("", False), ("a b", False), ("m:", False), ("/m", False),
        ("a/b/c/d", False), ("-m", False), ("m:a:b", False), ("a.b/m", False), ("m\n", False),
        ("m" * 81, False), ("me/", False),
    ],
)  # fmt: skip
def test_names_follow_the_grammar(name: str, good: bool) -> None:
    if good:
        assert check_name(name) == name
    else:
        with pytest.raises(UsageError, match="namespace"):
            check_name(name)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"general.type": "imatrix"}, "no language model"),
        ({"general.type": "mmproj"}, "no language model"),
        ({"qwen3moe.expert_bank_version": 1}, "one type per tensor"),
    ],
)
def test_files_ollama_cannot_run_are_refused(
    tmp_path: Path, nobody: str, keys: dict[str, Any], said: str
) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, value in keys.items():
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
        writer.add_key_value(key, value, kind)
    banked = "blk.0.ffn_up_exps.bank0.weight" if "version" in str(keys) else "blk.0.attn_q.weight"
    writer.add_tensor(banked, np.ones((2, 4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = run(path, "m")
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "m.Modelfile").exists()


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model")
    for file in ("m.gguf", "missing.gguf"):
        result = run(tmp_path / file, "m")
        assert result.exit_code == 2 and file in result.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "m.gguf"]


# --- export --ollama -------------------------------------------------------------------------


def test_export_ends_in_ollama(tmp_path: Path, server: Running, monkeypatch: Any) -> None:
    monkeypatch.setenv("OLLAMA_HOST", server.host)
    source = make_checkpoint("qwen3-moe", tmp_path / "c", num_hidden_layers=1)
    file = tmp_path / "m.gguf"
    arguments = ["export", str(source), "-o", str(file), "--quant", "Q8_0", "--no-calibration"]
    bad = CliRunner().invoke(main, [*arguments, "--ollama", "a b"])
    assert bad.exit_code == 2 and not file.exists()
    result = CliRunner().invoke(main, [*arguments, "--ollama", "mine", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ollama"]["created"] is True
    assert server.ollama.faults == []
    made = server.ollama.models["mine"]["parameters"]
    assert (made["temperature"], made["top_k"], made["top_p"]) == (0.6, 20, 0.95)
    assert made["stop"] == ["<|im_end|>"] and made["num_ctx"] == 2048
    again = CliRunner().invoke(main, [*arguments, "--ollama", "mine"])
    assert again.exit_code == 2 and "--force" in again.stderr


@pytest.mark.parametrize(
    ("output", "name", "host"),
    [
        ("a\nb.gguf", "m", None), ("m.gguf", "a b", None), ("m.gguf", "m", "127.0.0.1:99999"),
        (".", "m", None),
    ],
)  # fmt: skip
def test_what_is_known_of_ollama_is_checked_before_the_export(
    tmp_path: Path, monkeypatch: Any, output: str, name: str, host: str | None
) -> None:
    if host is not None:
        monkeypatch.setenv("OLLAMA_HOST", host)
    source = make_checkpoint("qwen3-moe", tmp_path / "c", num_hidden_layers=1)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        main, ["export", str(source), "-o", output, "--no-calibration", "--ollama", name]
    )
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    assert list(tmp_path.iterdir()) == [source]


def test_an_error_of_ollama_leaves_the_json_of_the_export(
    tmp_path: Path, server: Running, monkeypatch: Any
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", server.host)
    server.ollama.refuse = (500, "no \x1b[31mspace")
    source = make_checkpoint("qwen3-moe", tmp_path / "c", num_hidden_layers=1)
    file = tmp_path / "m.gguf"
    result = CliRunner().invoke(
        main, ["export", str(source), "-o", str(file), "--no-calibration", "--ollama", "m",
               "--quant", "Q8_0", "--json"],
    )  # fmt: skip
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["file_bytes"] == file.stat().st_size
    assert "no \\x1b[31mspace (HTTP 500)" in data["ollama"]["error"]
    assert "(HTTP 500)" in result.stderr


def test_a_split_file_is_one_from_line_per_shard(tmp_path: Path, server: Running) -> None:
    """Split by gguf's own writer; every shard is uploaded."""
    base = tmp_path / "whole.gguf"
    writer = gguf.GGUFWriter(base, "qwen3moe", split_max_tensors=1)
    writer.add_type("model")
    for name in ("token_embd.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones((4, 32), np.float32))
    writer.write_header_to_file(base)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(tmp_path.glob("whole-*.gguf"))
    assert len(shards) == 2
    result = run(shards[0], "m", "--host", server.host, "-o", tmp_path / "Modelfile", "--json")
    assert result.exit_code == 0, result.output
    sources = [value for word, value in parse((tmp_path / "Modelfile").read_text())
               if word == "from"]  # fmt: skip
    assert sources == [f"./{shard.name}" for shard in shards]
    assert set(server.ollama.models["m"]["files"]) == {shard.name for shard in shards}
    assert len(server.ollama.blobs) == 2 and server.ollama.faults == []
    assert any("shards" in note for note in json.loads(result.stdout)["notes"])


def test_ctrl_c_leaves_no_half_written_file(
    tmp_path: Path, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the upload: exit code 130, and the Modelfile, which is whole, stands."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moequant.ollama.server._Transport._count", interrupted)
    result = run(write_gguf(tmp_path / "m.gguf"), "m", "--host", server.host)
    assert result.exit_code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.Modelfile", "m.gguf"]
    parse((tmp_path / "m.Modelfile").read_text())
    assert server.ollama.models == {}
