"""Ollama: a Modelfile beside a GGUF file, and the model created on a server that answers.

Owns: both; `publish` does one after the other, `check_publish` tells before a file is made what
would stop it. Leaves out: running a model. No Ollama is needed to write a Modelfile.
"""

from moequant.ollama.modelfile import Modelfile
from moequant.ollama.names import check_name
from moequant.ollama.publish import Published, check_publish, modelfile_path, publish
from moequant.ollama.server import create_model, server_address

__all__ = [
    "Modelfile", "Published", "check_name", "check_publish", "create_model", "modelfile_path",
    "publish", "server_address",
]  # fmt: skip
