"""Hugging Face ids: the real client against a Hub on 127.0.0.1, in a process of its own.

huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is imported, hence the
processes; each opens several sources, since importing torch is what takes the time.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moequant.checkpoint import hub
from moequant.errors import CheckpointError, UsageError
from tests.checkpoint.files import SHARDS, tensors_file, two_shards, write_sharded, write_single
from tests.checkpoint.hub_server import COMMIT, Hub, files_in

ROOT = Path(__file__).resolve().parents[2]
INDEX = "model.safetensors.index.json"

OPEN = """
import json, sys
from pathlib import Path
from moequant.checkpoint import open_checkpoint
for arguments in json.loads(sys.argv[1]):
    cache = arguments.pop("cache_dir", None)
    lost = arguments.pop("lost", None)
    if lost:
        (c.path / lost).resolve().unlink()
    try:
        c = open_checkpoint(**arguments, cache_dir=Path(cache) if cache else None)
        sums = {n: c.read(n).sum().item() for n in c.tensors}
        tokenizer = c.file("tokenizer.json")
        result = {"name": c.name, "revision": c.revision, "sums": sums, "path": str(c.path),
                  "tokenizer": tokenizer and tokenizer.read_text()}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print("RESULT", json.dumps(result))
"""


def open_each(home: Path, endpoint: str, *sources: dict[str, Any], offline: bool = False) -> Any:
    """What `open_checkpoint` gave for each of `sources`, in a fresh process, and its stderr.

    A source with "lost" first deletes that file from the snapshot opened last.
    """
    keep = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
    environment = keep | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", OPEN, json.dumps(sources)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line) for line in lines], done.stderr


@dataclass
class Running:
    """The Hub, its address, and a home for the client's cache."""

    hub: Hub
    endpoint: str
    home: Path


def repositories(folder: Path) -> dict[str, dict[str, bytes]]:
    good = files_in(two_shards(folder / "good"))
    truncated = dict(good) | {SHARDS[1]: good[SHARDS[1]][:-1]}
    config = {"config.json": b"{}"}
    return {
        "org/good": good
        | {
            "tokenizer.json": b'{"t": 1}',
            "README.md": b"# good",
            "modeling_x.py": b"raise SystemExit",
            "pytorch_model.bin": b"pickle",
            "consolidated.safetensors": b"the same weights again",
            "original/model-1.safetensors": b"and again",
        },
        "org/single": files_in(write_single(folder / "single", tensors_file({"a": (3,)}))),
        "org/flaky": files_in(
            write_single(folder / "flaky", tensors_file({"big": (5000, 5000)}, dtype="U8"))
        ),
        "org/truncated": truncated,
        "org/pickle": config | {"pytorch_model.bin": b"pickle"},
        "org/ggufs": config | {"model-Q4_K_M.gguf": b"GGUF"},
        "org/gated": good,
        "org/evil": files_in(write_sharded(folder / "evil", {}, {"a": "../../x.safetensors"})),
    }


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    repos = repositories(tmp_path_factory.mktemp("repositories"))
    served = Hub(repos, gated={"org/gated"}, breaks={})
    server = served.serve()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    home = tmp_path_factory.mktemp("home")
    yield Running(served, f"http://127.0.0.1:{server.server_address[1]}", home)
    server.shutdown()
    server.server_close()
    thread.join()


def ids(*names: str) -> list[dict[str, Any]]:
    return [{"source": name} for name in names]


def test_download_then_cache(running: Running) -> None:
    """Downloads what is needed and no more; a second process finds it without the network."""
    sources = ids("org/good", "org/good@main", f"org/good@{COMMIT}", "org/single")
    (good, main, commit, single), stderr = open_each(running.home, running.endpoint, *sources)
    assert good["name"] == "org/good"
    assert good["revision"] == COMMIT
    assert good["tokenizer"] == '{"t": 1}'
    assert good["sums"].keys() == {"a", "b", "c"}
    assert good == main == commit
    assert single["sums"].keys() == {"a"}
    assert running.hub.fetched("org/good") == {
        "config.json",
        INDEX,
        *SHARDS,
        "tokenizer.json",
        "README.md",
    }
    assert "Fetching" in stderr, "huggingface_hub shows its progress"

    asked = len(running.hub.requests)
    sources = [*ids("org/good", "org/single", "org/never"), {"source": "org/good", "offline": True}]
    (again, _, never, flag), _ = open_each(running.home, running.endpoint, *sources, offline=True)
    assert again == flag == good
    assert never["error"] == (
        "CheckpointError: org/never: not complete in the local cache, and the network is switched "
        "off (offline, or HF_HUB_OFFLINE=1); switch it on for one run, or pass a local folder"
    )
    assert len(running.hub.requests) == asked

    nowhere = "http://127.0.0.1:9"  # the discard port: nobody listens
    (cached, unknown), _ = open_each(running.home, nowhere, *ids("org/good", "org/never"))
    assert cached == good
    assert "Hugging Face cannot be reached; check the connection" in unknown["error"]


def test_refusals(running: Running) -> None:
    """Each in one sentence, and before a weight is downloaded."""
    expected = {
        "org/pickle": "org/pickle: the weights are pickle files (pytorch_model.bin)",
        "org/ggufs": "org/ggufs: holds GGUF (model-Q4_K_M.gguf)",
        "org/gated": "accept its terms on the model's page, then log in with `hf auth login`",
        "org/absent": "no such folder here, and no such model on Hugging Face",
        "org/good@v9": "org/good@v9: the repository has no such revision",
        "org/evil": f"org/evil: {INDEX}: shard ../../x.safetensors is outside",
        "org/truncated": f"{SHARDS[1]}: truncated: the header describes 40 bytes of data",
    }
    results, _ = open_each(running.home, running.endpoint, *ids(*expected))
    for (source, message), result in zip(expected.items(), results, strict=True):
        assert message in result.get("error", ""), source
        assert result["error"].startswith("CheckpointError: ")
    for repo in ("org/pickle", "org/ggufs", "org/evil"):
        assert running.hub.fetched(repo) <= {"config.json", INDEX}


def test_a_broken_connection_is_resumed(running: Running) -> None:
    """The server hangs up in the middle; the client asks for the rest, and the bytes are right.

    The client writes pieces of 10 MB, so half of the file must be more than one.
    """
    content = running.hub.repos["org/flaky"]["model.safetensors"]
    running.hub.breaks["model.safetensors"] = 1
    (flaky,), _ = open_each(running.home, running.endpoint, *ids("org/flaky"))
    assert flaky["sums"] == {"big": sum(content[-25_000_000:])}
    path = f"/org/flaky/resolve/{COMMIT}/model.safetensors"
    ranges = [r for method, asked, r in running.hub.requests if (method, asked) == ("GET", path)]
    assert len(ranges) == 2
    assert ranges[0] == ""
    assert 0 < int(ranges[1].removeprefix("bytes=").partition("-")[0]) < len(content)


def test_a_shard_gone_from_the_cache(running: Running) -> None:
    """Offline this is an error that says so; online the one shard is fetched again."""
    good = {"source": "org/good", "cache_dir": str(running.home / "another cache")}
    steps = [good, good | {"offline": True, "lost": SHARDS[1]}, good]
    asked = len(running.hub.requests)
    (first, offline, again), _ = open_each(running.home, running.endpoint, *steps)
    assert str(running.home / "another cache") in first["path"]
    assert "org/good: not complete in the local cache" in offline["error"]
    assert again == first
    got = [path for method, path, _ in running.hub.requests[asked:] if method == "GET"]
    times = {shard: sum(path.endswith(shard) for path in got) for shard in SHARDS}
    assert times == {SHARDS[0]: 1, SHARDS[1]: 2}


@pytest.mark.parametrize(
    ("source", "revision", "expected"),
    [
        ("org/name", None, ("org/name", None)),
        ("org/name", "v1", ("org/name", "v1")),
        ("org/name@refs/pr/1", None, ("org/name", "refs/pr/1")),
        ("org/name@v1", "v1", ("org/name", "v1")),
        ("Org-1/na.me_2@0.1", None, ("Org-1/na.me_2", "0.1")),
    ],
)
def test_ids(source: str, revision: str | None, expected: tuple[str, str | None]) -> None:
    assert not hub.looks_like_path(source)
    assert hub.parse_id(source, revision) == expected


def test_two_revisions() -> None:
    with pytest.raises(UsageError, match="names revision v1, but v2 was asked for"):
        hub.parse_id("org/name@v1", "v2")


@pytest.mark.parametrize("source", ["name", "org/", "/name", "org/na me", "org/..", "a/b/c", "@v1"])
def test_no_ids(source: str) -> None:
    with pytest.raises(CheckpointError, match="not a Hugging Face id"):
        hub.parse_id(source, None)


@pytest.mark.parametrize(
    "source", ["./a/b", "../a", "~/a", "/a/b", "a/b/c", "a/", "a\\b", "a/b.gguf", "m.safetensors"]
)
def test_paths(source: str) -> None:
    assert hub.looks_like_path(source)
