"""A language model of a GGUF file, in float32, with the configurations and the tokenizer that transformers finds in it.

transformers and the package gguf take the blocks apart; nothing is downloaded, and no code lies in such a file. It is read once: what comes
out is a module in memory, and a folder of small files beside it that lives as long as the module.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matmorph.errors import InputError, did_you_mean
from matmorph.models.gguf_header import architecture_of
from matmorph.models.hf_folder import import_or_fail, quiet_loading

HINT = "install it with: pip install 'matmorph[llm]'"
_NO_MODEL = ("general", "tokenizer")
"""What transformers' table of a file's keys lists beside architectures."""


@dataclass(frozen=True, slots=True)
class GgufModel:
    """`tokenizer`: None where transformers makes none of this file, for the reason `fault`. `folder`: has config.json, and the files of the
    tokenizer."""

    module: Any
    tokenizer: Any
    fault: str
    folder: Path


def load_gguf(file: Path, hint: str = HINT) -> GgufModel:
    """hint: what brings the packages, for messages.

    Raises InputError: a package is missing; the file is none, is cut off, or holds an architecture that transformers does not read or that
    is no causal language model; weights of it are missing.
    """
    gguf = import_or_fail("gguf", f"{file}: the package gguf, which reads it, is not installed", hint)
    transformers = import_or_fail("transformers", f"{file}: the package transformers is not installed", hint)
    architecture = _architecture(file, gguf)
    _refuse_unknown(file, architecture, transformers)
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    with quiet_loading(transformers), contextlib.redirect_stderr(io.StringIO()):  # a bar of its own for the file
        try:
            loaded, info = transformers.AutoModelForCausalLM.from_pretrained(**place, output_loading_info=True)
        except Exception as error:
            raise InputError(f"{file}: the {architecture} in it cannot be loaded: {_line(error)}") from error
        tokenizer, fault = _tokenizer(transformers, place)
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"{file}: lacks {len(missing)} weight{'s' if len(missing) > 1 else ''} of {type(loaded).__name__}", missing[:5])
    module = _plain(loaded)
    return GgufModel(module, tokenizer, fault, _companions(module, tokenizer))


def _architecture(file: Path, gguf: Any) -> str:
    """As the file names it, once it has been found whole."""
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    try:
        found = architecture_of(file)
        reader = gguf.GGUFReader(str(file))  # it believes what a header says; that has been walked through by now
        end = max(int(one.data_offset) + int(one.n_bytes) for one in reader.tensors)
        if end > file.stat().st_size:
            raise ValueError(f"its weights end at byte {end}, and it has {file.stat().st_size}")
    except Exception as error:  # of the reader, whatever the damage leads to
        raise InputError(f"{file}: is no whole GGUF file: {_line(error)}", ["if it was downloaded or copied, do that again"]) from error
    if not found:
        raise InputError(f"{file}: names no architecture (general.architecture)")
    return found


def _refuse_unknown(file: Path, architecture: str, transformers: Any) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = [name for name in GGUF_SUPPORTED_ARCHITECTURES if name not in _NO_MODEL]
    spelt = {name.replace("_", "").replace("-", "") for name in known}
    if architecture.replace("_", "").replace("-", "") in spelt:
        return
    raise InputError(
        f"{file}: holds a {architecture}, which transformers {transformers.__version__} does not read{did_you_mean(architecture, known)}",
        [f"it reads {', '.join(sorted(known))}", "give the folder of the model that the file was made from"],
    )


def _tokenizer(transformers: Any, place: dict[str, Any]) -> tuple[Any, str]:
    """(the tokenizer, "") or (None, why there is none): a model is one without it, and what needs one says that the folder has none."""
    try:
        return transformers.AutoTokenizer.from_pretrained(**place), ""
    except Exception as error:  # the makers of tokenizers raise whatever the file leads to
        return None, _line(error)


def _plain(loaded: Any) -> Any:
    """A module of the same tensors that does not think of itself as quantised, which refuses to be moved, saved or cast."""
    import torch

    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        module = type(loaded)(config)
    module.load_state_dict(loaded.state_dict(), assign=True)
    for name, part in module.named_modules():  # tables that no file holds, such as those of a rotation
        theirs = loaded.get_submodule(name)
        part._buffers.update({key: theirs._buffers[key] for key, one in part._buffers.items() if one is not None and one.is_meta})
        meta = [key for key, one in vars(part).items() if isinstance(one, torch.Tensor) and one.is_meta]
        for key in meta:
            setattr(part, key, getattr(theirs, key))
    module.tie_weights()
    return module.float().eval()


def _companions(module: Any, tokenizer: Any) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="matmorph-gguf-"))
    weakref.finalize(module, shutil.rmtree, folder, ignore_errors=True)
    module.config.architectures = [type(module).__name__]
    module.config.save_pretrained(folder)
    module.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
