"""The pinned llama.cpp: a tampered archive, or one that cannot be had, is one error."""

import dataclasses
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from moequant.errors import LlamaCppError
from moequant.runtime import fetch
from moequant.runtime.llama_cpp import LlamaCpp, ensure_source, read_pin


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
    major, minor, patch = read_pin().ggml.split(".")
    for name, number in (("MAJOR", major), ("MINOR", minor), ("PATCH", patch)):
        assert f"set(GGML_VERSION_{name} {number})" in text


def test_another_hash_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    path = archive(tmp_path, {"package-1/vendor/llama.cpp/CMakeLists.txt": b"x"})
    with pytest.raises(LlamaCppError, match="sha256 .* is pinned: the archive was tampered with"):
        fetch._verify(path, read_pin().sha256)


def test_a_tampered_archive_of_the_index_is_neither_run_nor_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip would run its setup.py for the metadata, before anyone could look at its hash."""
    setup = f"open({str(tmp_path / 'was_run')!r}, 'w')\n".encode()
    pin = read_pin()
    name = f"{pin.package.replace('-', '_')}-{pin.version}"
    made = archive(tmp_path, {f"{name}/setup.py": setup, f"{name}/PKG-INFO": b"Name: x\n",
                              f"{name}/{pin.tree}/CMakeLists.txt": b"x"})  # fmt: skip
    (tmp_path / "index").mkdir()
    made.rename(tmp_path / "index" / f"{name}.tar.gz")
    monkeypatch.setenv("MOEQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(LlamaCppError, match=f"another sha256 than the pinned {pin.sha256}"):
        ensure_source()
    assert not (tmp_path / "was_run").exists()
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] in (
        [], ["source.lock"]
    )  # fmt: skip


def test_only_the_tree_is_unpacked_and_never_outside(tmp_path: Path) -> None:
    inside = {"package-1/vendor/llama.cpp/CMakeLists.txt": b"x", "package-1/setup.py": b"y"}
    target = tmp_path / "source"
    fetch._extract(archive(tmp_path, inside), "vendor/llama.cpp", target)
    assert [path.name for path in target.iterdir()] == ["CMakeLists.txt"]
    evil = {"package-1/vendor/llama.cpp/../../../evil": b"x"}
    with pytest.raises(tarfile.OutsideDestinationError):
        fetch._extract(archive(tmp_path, evil), "vendor/llama.cpp", tmp_path / "other")
    assert not (tmp_path / "evil").exists()


def test_a_package_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = dataclasses.replace(read_pin(), package="moequant-no-such-package")
    monkeypatch.setattr(fetch, "read_pin", lambda: pin)
    monkeypatch.setenv("MOEQUANT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(LlamaCppError, match="pip could not fetch moequant-no-such-package"):
        ensure_source()
    assert not list(tmp_path.rglob("source"))
