"""Ollama: a Modelfile beside a GGUF file, and the model created on a server that answers.

`publish` does both; `create_model` is its second half.
Leaves out: running anything. No Ollama is needed to write a Modelfile.
"""

from moequant.ollama.modelfile import Modelfile
from moequant.ollama.names import check_name
from moequant.ollama.publish import Published, modelfile_path, publish
from moequant.ollama.server import create_model

__all__ = ["Modelfile", "Published", "check_name", "create_model", "modelfile_path", "publish"]
