"""cuBLAS's headers, where the CUDA toolkit that is installed comes without them.

Owns: fetching them once, from NVIDIA's package on PyPI into the user's cache. Leaves out: cuBLAS
itself, which only linking and running need: of the package nothing but the headers is kept.
"""

import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from moequant.errors import LlamaCppError
from moequant.runtime.build import preprocessed
from moequant.runtime.fetch import check_space, locked, pip_download
from moequant.runtime.pin import Report, cache_directory

# the cuBLAS of CUDA 13.0.2, as the package `cuda-toolkit` of that version has it; the wheel for
# x86-64 on every platform, since the headers are the same
PACKAGE, VERSION, CUDA = "nvidia-cublas", "13.1.0.3", 13
SHA256 = "ee8722c1f0145ab246bccb9e452153b5e0515fd094c3678df50b2a0888b8b171"
WHEEL = ("--only-binary", ":all:", "--platform", "manylinux_2_27_x86_64")
WHEEL_BYTES = 423_000_000
HEADER = "cublas_v2.h"


def cublas_headers(nvcc: str, cuda: int, report: Report) -> Path | None:
    """The folder of `cublas_v2.h` for this nvcc of CUDA version `cuda`; None if it has its own.

    Raises:
        LlamaCppError: nvcc does not work, it is of another CUDA than the package, or the package
            could not be fetched.
    """
    if _has_own(nvcc):
        return None
    if cuda != CUDA:
        raise LlamaCppError(
            f"{nvcc} is of CUDA {cuda} and comes without {HEADER}, and moequant fetches that only "
            f"for CUDA {CUDA}: install cuBLAS's development files (Debian, Ubuntu: "
            "libcublas-dev-VERSION)."
        )
    folder = cache_directory() / f"cublas-{VERSION}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock"), report):
            if not folder.is_dir():
                _fetch(folder, report)
    except (OSError, zipfile.BadZipFile) as error:
        raise LlamaCppError(f"{folder} could not be made: {error}") from error
    return folder


def _has_own(nvcc: str) -> bool:
    # not by failing to include it: an nvcc that fails at everything would seem to be without
    return preprocessed(nvcc, f"#if __has_include(<{HEADER}>)\nfound\n#endif\n") == "found"


def _fetch(folder: Path, report: Report) -> None:
    check_space(folder.parent, WHEEL_BYTES, "fetching cuBLAS's headers")
    report(f"fetching {PACKAGE}=={VERSION} ({WHEEL_BYTES / 1e6:.0f} MB) for cuBLAS's headers; only "
           "they are kept")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="partial-", dir=folder.parent) as temporary:
        wheel = pip_download(PACKAGE, VERSION, SHA256, Path(temporary), WHEEL)
        made = Path(temporary) / "include"
        made.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                path = PurePosixPath(name)
                if path.parent.name == "include" and path.suffix == ".h":
                    (made / path.name).write_bytes(archive.read(name))
        if not (made / HEADER).is_file():
            raise LlamaCppError(f"{wheel.name} holds no include/{HEADER}.")
        made.rename(folder)
