"""A local Hugging Face folder: the module of `architectures[0]` and example inputs by what its `forward` takes."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matmorph.errors import InputError, did_you_mean
from matmorph.exporters.staging import is_artifact
from matmorph.models.hf_trust import judge_folder, refused_code

if TYPE_CHECKING:
    from matmorph.models.by_reference import Weights

BATCH = 2
SEQUENCE = 16
DEMO_HINT = "install it with: pip install 'matmorph[demo]'"
_FACTORY_HINT = "use a package.module:factory that returns matmorph.Model(module, example_inputs, dynamic_shapes)"


@dataclass(frozen=True, slots=True)
class FolderModel:
    """`module` with example inputs drawn from a fixed seed, and the names of their dynamic `axes`, None where a cache gives them.
    `weights`: where its parameters lie, which are on the meta device then; None where they are in memory."""

    module: Any
    examples: dict[str, Any]
    axes: dict[str, dict[int, str]] | None
    cache: bool
    weights: Weights | None = None


def load_folder(folder: Path, cache: bool = False, by_reference: bool = False) -> FolderModel:
    """The folder's model. cache: a causal language model, which is known by its class, keeps its key/value cache. by_reference: weights
    that lie in safetensors files stay there.

    Raises InputError naming the folder and the fault.
    """
    if is_artifact(folder):
        raise InputError(f"{folder}: was written by compile and is no model to compile: give the folder that it was made from")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise InputError(f"{folder}: not a Hugging Face model folder: it has no config.json")
    config = _read_json(config_file)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise InputError(f"{config_file}: names no class under architectures")
    judge_folder(folder, config)
    cls = _class_of(folder, architectures[0], refused_code(config))
    module, weights = open_pretrained(folder, cls) if by_reference else (_pretrained(folder, cls), None)
    return called(folder, module, cache, weights)


def called(folder: Path, module: Any, cache: bool, weights: Weights | None = None) -> FolderModel:
    """A module of transformers with how it is called. folder: where it came from, for messages. InputError as `load_folder`."""
    name = type(module).__name__
    cached = cache and (_is_causal(name, module) or _is_seq2seq(name, module))
    examples = _examples(folder, module, cached)
    tensors = {name: tensor for name, (tensor, _) in examples.items()}
    return FolderModel(module, tensors, None if cached else {name: axes for name, (_, axes) in examples.items()}, cached, weights)


def _is_causal(architecture: str, module: Any) -> bool:
    """Whether the class writes text token by token and says so by its name, as BERT with a head for words does not."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and bool(getattr(module.config, "is_decoder", True))
    return not getattr(module.config, "is_encoder_decoder", False) and (architecture.endswith("ForCausalLM") or known)


def _is_seq2seq(architecture: str, module: Any) -> bool:
    """Whether the class writes text after what its encoder has read."""
    from transformers.models.auto import modeling_auto as auto

    mappings = (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)
    known = any(architecture in mapping.values() for mapping in mappings)
    return bool(getattr(module.config, "is_encoder_decoder", False)) and known


def import_or_fail(module: str, message: str, hint: str = DEMO_HINT) -> Any:
    """An optional package, or InputError with what brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(message, [str(error), hint]) from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or InputError with the path and the place of the fault."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds a {type(data).__name__}, not an object")
    return data


def load_pretrained(folder: Path, architecture: str, elsewhere: str = "") -> Any:
    """`transformers.<architecture>.from_pretrained(folder)`, local files only, none of its code, in eval mode, in the stored dtype.
    `elsewhere`: for the message, where the class would come from if transformers lacks it.

    A weight that the files do not hold would be initialised at random: that is an InputError here.
    """
    return _pretrained(folder, _class_of(folder, architecture, elsewhere))


def open_pretrained(folder: Path, cls: Any, config: Any = None) -> tuple[Any, Weights | None]:
    """The same with the parameters on the meta device, and where in the safetensors files they lie; loaded whole, and None, where there are
    no such files or the model's configuration asks for more than to read them. config: of a model that differs from the folder's.

    InputError as `load_pretrained`, and before anything is computed for a file that is missing, cut off, or has a tensor of another shape
    or kind than the model.
    """
    from matmorph.models.by_reference import emptied, mapped_tensors
    from matmorph.models.shards import stored_tensors

    with _told(folder, cls):
        config = cls.config_class.from_pretrained(str(folder), local_files_only=True) if config is None else config
    elsewhere = any(getattr(config, name, None) is not None for name in _NOT_AS_STORED) or bool(getattr(type(config), "extra_files", ()))
    stored = None if elsewhere else stored_tensors(folder)
    if stored is None:
        return _pretrained(folder, cls), None
    tensors = mapped_tensors(stored)
    module = _pretrained(folder, cls, config=config, state_dict=dict(tensors), ignore_mismatched_sizes=True)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in stored and parameter.is_floating_point() and not stored[name].dtype.is_floating_point:
            raise InputError(f"{stored[name].path}: {name} is {_spelled(stored[name].dtype)}, and {cls.__name__} computes with it")
    return module, emptied(module, folder, stored, tensors)


_NOT_AS_STORED = ("quantization_config", "transformers_weights")
"""Settings of a configuration with which transformers reads weights in ways of its own."""


def _class_of(folder: Path, architecture: str, elsewhere: str = "") -> Any:
    transformers = import_or_fail("transformers", f"{folder}: the package transformers is not installed")
    cls = getattr(transformers, architecture, None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        hint = did_you_mean(architecture, dir(transformers))
        raise InputError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} has no {architecture}{elsewhere or hint}", [_FACTORY_HINT]
        )
    return cls


def _pretrained(folder: Path, cls: Any, **given: Any) -> Any:
    """given: a configuration and tensors in the place of the folder's."""
    place = None if given else str(folder)
    with _told(folder, cls):
        module, info = cls.from_pretrained(
            place, local_files_only=True, trust_remote_code=False, weights_only=True, output_loading_info=True, **given
        )
    _refuse_other_shapes(folder, cls, info)
    missing = sorted(info["missing_keys"])
    if missing:
        details = [*missing[:5], *([f"and {len(missing) - 5} more"] if len(missing) > 5 else [])]
        raise InputError(f"{folder}: the files lack {len(missing)} weight{'s' if len(missing) > 1 else ''} of {cls.__name__}", details)
    return module.eval()


def _refuse_other_shapes(folder: Path, cls: Any, info: Mapping[str, Any]) -> None:
    found = sorted((name, list(stored), list(wanted)) for name, stored, wanted in info.get("mismatched_keys", ()))
    if found:
        details = [f"{name}: {stored} in the files, {wanted} in the model" for name, stored, wanted in found[:5]]
        raise InputError(f"{folder}: {len(found)} weight{'s' if len(found) > 1 else ''} of {cls.__name__} have another shape", details)


def _spelled(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _told(folder: Path, cls: Any) -> Iterator[None]:
    """Whatever transformers raises, as InputError in one line; nothing of what it says beside."""
    with quiet_loading(import_or_fail("transformers", f"{folder}: the package transformers is not installed")):
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"{folder}: {cls.__name__} cannot be loaded: {line.replace(str(folder), 'the folder')}") from error


@contextmanager
def quiet_loading(transformers: Any) -> Iterator[None]:
    """No progress bar and no advice on stderr while loading; both settings are put back."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ---- example inputs


@dataclass(frozen=True, slots=True)
class _Draw:
    """What the makers below read: the model's configurations and a seeded generator. `cached`: tokens are a text and what follows."""

    config: Any
    text: Any
    generator: Any
    cached: bool

    def first(self, *names: str) -> Any:
        """The first of `names` that the config, its vision part or its text part has; None without one."""
        places = (self.config, getattr(self.config, "vision_config", None), self.text)
        found = (getattr(place, name, None) for name in names for place in places)
        return next((value for value in found if value is not None), None)


Example = tuple[Any, dict[int, str]]
"""A tensor and the names of its dynamic axes."""


def _token_ids(draw: _Draw, axis: str, length: int) -> Example:
    import torch

    vocabulary = draw.first("vocab_size") or 0
    if vocabulary < 2:
        raise InputError("the configuration has no vocab_size to draw example tokens from", [_FACTORY_HINT])
    low = min(3, vocabulary - 1)  # the first ids are special tokens in most vocabularies
    ids = torch.randint(low, vocabulary, (BATCH, length), generator=draw.generator)
    return ids, {0: "batch", 1: axis}


def _length(draw: _Draw) -> int:
    limit = draw.first("max_position_embeddings", "n_positions", "max_target_positions")
    # Well inside the limit: at the limit itself a trace cannot tell the length from the size of the position table.
    return max(2, min(SEQUENCE, limit // 2)) if isinstance(limit, int) else SEQUENCE


def _input_ids(draw: _Draw) -> Example:
    return _token_ids(draw, "seq", _length(draw))


def _attention_mask(draw: _Draw) -> Example:
    import torch

    length = _length(draw)
    mask = torch.ones(BATCH, length, dtype=torch.int64)
    # The last sample is shorter: padded on the right, as in real batches, or on the left, where texts go on.
    mask[1:, slice(0, length // 4) if draw.cached else slice(length - length // 4, None)] = 0
    return mask, {0: "batch", 1: "seq"}


def _decoder_input_ids(draw: _Draw) -> Example:
    return _token_ids(draw, "target_seq", max(4, _length(draw) // 2))


def _pixel_values(draw: _Draw) -> Example:
    import torch

    size = draw.first("image_size") or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = draw.first("num_channels") or 3
    return torch.randn(BATCH, channels, height, width, generator=draw.generator), {0: "batch"}


def _input_features(draw: _Draw) -> Example:
    import torch

    bins, positions = draw.first("num_mel_bins"), draw.first("max_source_positions")
    if bins is None or positions is None:
        raise InputError("the configuration has no num_mel_bins and max_source_positions to size input_features", [_FACTORY_HINT])
    frames = 2 * positions  # the second convolution of these encoders has stride 2
    return torch.randn(BATCH, bins, frames, generator=draw.generator), {0: "batch"}


def _input_values(draw: _Draw) -> Example:
    import torch

    bins, frames = draw.first("num_mel_bins"), draw.first("max_length")
    shape = (BATCH, 16000) if bins is None or frames is None else (BATCH, frames, bins)  # one second of sound, or a spectrogram
    return torch.randn(*shape, generator=draw.generator), {0: "batch"}


_MAKERS: dict[str, Callable[[_Draw], Example]] = {
    "input_ids": _input_ids,
    "attention_mask": _attention_mask,
    "decoder_input_ids": _decoder_input_ids,
    "pixel_values": _pixel_values,
    "input_features": _input_features,
    "input_values": _input_values,
}


def _examples(folder: Path, module: Any, cached: bool) -> dict[str, Example]:
    """The inputs in the order of forward's parameters."""
    import torch

    config = module.config
    behind = cached and not getattr(config, "is_encoder_decoder", False)
    draw = _Draw(config, config.get_text_config(), torch.Generator().manual_seed(0), behind)
    parameters = inspect.signature(module.forward).parameters
    wanted = _wanted(module, parameters)
    if module.main_input_name not in _MAKERS:
        raise InputError(
            f"{folder}: {type(module).__name__} takes {module.main_input_name}, for which no example input is known", [_FACTORY_HINT]
        )
    try:
        examples = {name: _MAKERS[name](draw) for name in parameters if name in wanted}
    except InputError as error:
        raise InputError(f"{folder}: {error.message}", error.details) from error
    return {name: (_as_stored(tensor, module.dtype), axes) for name, (tensor, axes) in examples.items()}


def _wanted(module: Any, parameters: Any) -> set[str]:
    """The model's main input and what it needs beside it: a mask for tokens, decoder tokens, the image of an image-text pair."""
    config, main = module.config, module.main_input_name
    has_image_tokens = any(getattr(config, name, None) is not None for name in ("image_token_id", "image_token_index"))
    rules = {
        main: True,
        "attention_mask": main == "input_ids",
        "decoder_input_ids": bool(getattr(config, "is_encoder_decoder", False)),
        "pixel_values": not has_image_tokens,  # where images enter as tokens, text alone is a complete call
    }
    return {name for name, wanted in rules.items() if wanted and name in parameters}


def _as_stored(tensor: Any, dtype: Any) -> Any:
    return tensor.to(dtype) if tensor.dtype.is_floating_point else tensor
