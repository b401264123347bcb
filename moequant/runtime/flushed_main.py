"""Runs the main function of a llama.cpp tool in this process, and waits for its log.

Owns: just that; it is started as a program, with the folder of the libraries and the tool's own
arguments, and imports nothing but Python's own. Leaves out: reading the output.

llama.cpp's logger prints in a thread of its own that a tool does not wait for: its last lines, the
statistics, are lost when the process ends first, with exit code 0. `common_log_flush` is what its
header has for that. The names are C++ ones, as GCC and Clang spell them.
"""

import ctypes
import signal
import sys
from pathlib import Path


def main(library: Path, common: Path, *arguments: str) -> int:
    """The exit code of llama-perplexity's main function, in `library`, once its log is printed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would wait for the tool's end
    tool, log = ctypes.CDLL(str(library)), ctypes.CDLL(str(common))
    argv = [b"llama-perplexity", *(argument.encode() for argument in arguments), None]
    code: int = tool["_Z16llama_perplexityiPPc"](
        len(argv) - 1, (ctypes.c_char_p * len(argv))(*argv)
    )
    logger = log["_Z15common_log_mainv"]
    logger.restype = ctypes.c_void_p
    log["_Z16common_log_flushP10common_log"](ctypes.c_void_p(logger()))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
