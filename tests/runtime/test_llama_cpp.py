"""The pinned llama.cpp: a tampered archive, missing tools and failing builds are one error each."""

import dataclasses
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from moequant.errors import LlamaCppError
from moequant.runtime import llama_cpp as runtime
from moequant.runtime.llama_cpp import LlamaCpp


def archive(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "package-1.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_the_built_tools_run(llama_cpp: LlamaCpp) -> None:
    result = subprocess.run(
        [llama_cpp.tool("llama-quantize"), "--help"], capture_output=True, text=True, check=False
    )
    assert "Q4_K_M" in result.stdout + result.stderr
    assert llama_cpp.library("ggml-base").is_file()
    with pytest.raises(LlamaCppError, match="built without llama-nothing"):
        llama_cpp.tool("llama-nothing")


def test_the_pinned_source_is_the_pinned_commit(llama_cpp: LlamaCpp) -> None:
    text = (llama_cpp.source / "ggml" / "CMakeLists.txt").read_text()
    major, minor, patch = runtime.read_pin().ggml.split(".")
    for name, number in (("MAJOR", major), ("MINOR", minor), ("PATCH", patch)):
        assert f"set(GGML_VERSION_{name} {number})" in text


def test_another_hash_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    path = archive(tmp_path, {"package-1/vendor/llama.cpp/CMakeLists.txt": b"x"})
    with pytest.raises(LlamaCppError, match="sha256 .* is pinned: the archive was tampered with"):
        runtime._verify(path, runtime.read_pin())


def test_only_the_tree_is_unpacked_and_never_outside(tmp_path: Path) -> None:
    inside = {"package-1/vendor/llama.cpp/CMakeLists.txt": b"x", "package-1/setup.py": b"y"}
    target = tmp_path / "source"
    runtime._extract(archive(tmp_path, inside), "vendor/llama.cpp", target)
    assert [path.name for path in target.iterdir()] == ["CMakeLists.txt"]
    evil = {"package-1/vendor/llama.cpp/../../../evil": b"x"}
    with pytest.raises(tarfile.OutsideDestinationError):
        runtime._extract(archive(tmp_path, evil), "vendor/llama.cpp", tmp_path / "other")
    assert not (tmp_path / "evil").exists()


def test_a_package_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = dataclasses.replace(runtime.read_pin(), package="moequant-no-such-package")
    monkeypatch.setattr(runtime, "read_pin", lambda: pin)
    monkeypatch.setenv("MOEQUANT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(LlamaCppError, match="pip could not fetch moequant-no-such-package"):
        runtime.ensure_source()
    assert not list(tmp_path.rglob("source"))


def test_missing_build_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    message = "cmake and ninja, and neither PATH nor .*/bin has them.* pip install cmake ninja"
    with pytest.raises(LlamaCppError, match=message):
        runtime._build(tmp_path, tmp_path / "build", ["x"], lambda _: None)


def test_build_tools_beside_this_python_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a venv that is not activated, where ninja is not on cmake's PATH either."""
    bin_folder = tmp_path / "venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("cmake", "ninja"):
        script = bin_folder / name
        script.write_text(f'#!/bin/sh\necho "$0 $@" >> "{tmp_path}/calls"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.executable", str(bin_folder / "python"))
    runtime._build(tmp_path / "source", tmp_path / "build", ["x"], lambda _: None)
    configured, built = (tmp_path / "calls").read_text().splitlines()
    assert configured.startswith(f"{bin_folder}/cmake -S {tmp_path}/source")
    assert f"-DCMAKE_MAKE_PROGRAM={bin_folder}/ninja" in configured
    assert built == f"{bin_folder}/ninja -C {tmp_path}/build x"


def test_a_failing_build_shows_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text('message(FATAL_ERROR "no such luck")')
    with pytest.raises(LlamaCppError, match=r"(?s)no such luck.*whole log is"):
        runtime._build(tmp_path, tmp_path / "build", ["x"], lambda _: None)
