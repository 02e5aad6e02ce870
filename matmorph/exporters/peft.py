"""LoRA adapters in PEFT's folder format, in and out: `adapter_config.json` and `adapter_model.safetensors`.

PEFT keeps A = down^T [rank, in] and B = up^T [out, rank] of each module under `base_model.model.<module>.lora_A.weight`, and scales by
alpha / r, with `use_rslora` by alpha / sqrt(r); `rank_pattern` and `alpha_pattern` hold what differs from module to module. A Conv1D module
([in, out] weight) is no different but for `fan_in_fan_out`; a 1x1 convolution has factors with axes for its pixels. What LoRA on one module
cannot say is refused by name, in both directions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from matmorph.errors import InputError, did_you_mean
from matmorph.exporters.adapters import two_factors_of
from matmorph.exporters.artifact import json_bytes
from matmorph.exporters.staging import FolderKind, staged_folder
from matmorph.ir.adapter import Adapter
from matmorph.passes.methods.protocol import Methods, Peft, SiteMethod, site_method
from matmorph.runtime.format.plain import ManifestError, from_plain, typed
from matmorph.runtime.format.reading import StoredError, inside, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, eq=False)
class _Module:
    """One module's LoRA as PEFT sees it: A [rank, in], B [out, rank], y += scale B A x."""

    path: str
    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True)
class _Scaling:
    """What adapter_config.json says of the scale; ranks are those of the factors."""

    lora_alpha: float
    alpha_pattern: Mapping[str, float] | None = None
    use_rslora: bool | None = None


# out


def _is_peft(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    return CONFIG in names and names <= {CONFIG, WEIGHTS, "README.md"}


PEFT_FOLDER = FolderKind("a PEFT adapter", _is_peft)


def write_peft(
    folder: str | os.PathLike[str],
    adapters: Sequence[Adapter],
    values: Mapping[str, Any],
    methods: Methods,
    *,
    initial: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    prefix: str = "",
    force: bool = False,
) -> Path:
    """Writes the two files for PEFT to load beside the source model. `values`: trained factors by dotted name. `initial`: those that
    training started from, needed where the base lacks them (`init` from the weight): the difference has twice the rank. `prefix`: leading
    part of our paths that PEFT's model does not have ("encoder." where it wraps that submodule). `base_model`: its name or folder. `force`:
    replace such a folder that is there.

    InputError: adapters that LoRA on one module cannot say, a path without the prefix, a place that cannot be written.
    """
    if not adapters:
        raise InputError("nothing to write: the model has no adapters")
    _refuse_shared_sites(adapters)
    modules = [_module(adapter, site_method(methods, adapter.method), values, initial, prefix) for adapter in adapters]
    tensors: dict[str, Tensor] = {}
    for adapter, module in zip(adapters, modules, strict=True):
        pixels = (1, 1) if adapter.form == "conv1x1" else ()
        for part, matrix in (("lora_A", module.a), ("lora_B", module.b)):
            tensors[f"{_PREFIX}{module.path}.{part}.weight"] = matrix.reshape(*matrix.shape, *pixels).contiguous()
    config = _config(adapters, modules, base_model)
    with staged_folder(Path(folder), force, PEFT_FOLDER) as staging:
        (staging / CONFIG).write_bytes(json_bytes(config))
        (staging / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    return Path(folder)


def _refuse_shared_sites(adapters: Sequence[Adapter]) -> None:
    sites = [adapter.site for adapter in adapters]
    twice = next((site for site in sites if sites.count(site) > 1), None)
    if twice is not None:
        raise InputError(f"{twice}: has two adapters, PEFT's folder holds one per module")


def _module(adapter: Adapter, method: SiteMethod, values: Mapping[str, Any], initial: Mapping[str, Any] | None, prefix: str) -> _Module:
    refused = None if method.peft is None else method.peft.refused
    reasons = (
        (adapter.batch is not None, f"a stack of {adapter.batch} experts, for which PEFT has no module"),
        ("[" in adapter.site, "rows of a larger weight, for which PEFT has no module"),
        (refused is not None, refused or ""),
        (not adapter.site.startswith(prefix), f"its path does not begin with {prefix}"),
    )
    for fails, reason in reasons:
        if fails:
            raise InputError(f"{adapter.site}: {reason}")
    down, up = _factors(adapter, method, values)
    if adapter.base == "own":
        if initial is None:
            raise InputError(f"{adapter.site}: its base lacks what the factors started with, so the starting values are needed too")
        first, second = _factors(adapter, method, initial)
        down, up = torch.cat([down, first], dim=1), torch.cat([up, -second], dim=0)
    return _Module(adapter.site.removeprefix(prefix), down.T, up.T, adapter.scale)


def _factors(adapter: Adapter, method: SiteMethod, values: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(down, up) without the scale, of any method that has two factors."""
    missing = [name for name in adapter.consts.values() if name not in values]
    if missing:
        raise InputError(f"the values lack {missing[0]} of the adapter at {adapter.site}")
    tensors = {short: torch.as_tensor(values[name]).detach().cpu() for short, name in adapter.consts.items()}
    return two_factors_of(replace(adapter, scale=1.0), tensors, method)


def _config(adapters: Sequence[Adapter], modules: Sequence[_Module], base_model: str | None) -> dict[str, Any]:
    rslora = all(adapter.details.get("rslora", False) for adapter in adapters)
    alphas = [_tidy(module.scale * (sqrt(module.rank) if rslora else module.rank)) for module in modules]
    r, alpha = modules[0].rank, alphas[0]
    pattern = [re.escape(module.path) for module in modules]
    plain = all("." in module.path for module in modules)  # PEFT matches a list by the end of a path, which must not fit others
    return {
        "peft_type": Peft.type,
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": rslora,
        "use_dora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": all(adapter.form == "addmm" for adapter in adapters),
        "target_modules": [module.path for module in modules] if plain else f"({'|'.join(pattern)})",
        "modules_to_save": None,
        "rank_pattern": {f"^{key}": module.rank for key, module in zip(pattern, modules, strict=True) if module.rank != r},
        "alpha_pattern": {f"^{key}": one for key, one in zip(pattern, alphas, strict=True) if one != alpha},
    }


def _tidy(alpha: float) -> float | int:
    """As it was before it was divided by the rank: a whole number where it is one but for rounding."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha


# in


def read_peft(folder: str | os.PathLike[str], adapters: Sequence[Adapter], methods: Methods, *, prefix: str = "") -> dict[str, Tensor]:
    """Factors by our dotted names, their scale made that of the compiled model, from a folder that PEFT saved. The ranks are PEFT's.

    InputError: another method than plain LoRA (named), modules that no rule adapts, a missing or damaged file.
    """
    config, tensors = _read(Path(folder))
    _refuse_config(Path(folder), config)
    scaling = _scaling(Path(folder), config)
    known = {name: method.peft for name, method in methods.items() if isinstance(method, SiteMethod)}
    sites = {adapter.site: adapter for adapter in adapters if (peft := known.get(adapter.method)) is not None and peft.takes_in}
    found: dict[str, Tensor] = {}
    for path, (a, b) in _pairs(Path(folder), tensors).items():
        adapter = sites.get(prefix + path)
        if adapter is None:
            near = did_you_mean(prefix + path, sites)
            raise InputError(f"{folder}: adapts {path}, and this model has no LoRA there{near}", [f"{len(sites)} matmuls have one"])
        if adapter.base == "own":
            raise InputError(
                f"{adapter.site}: starts from a part of the weight (init: pissa | olora | milora), PEFT's factors do not", [_KAIMING]
            )
        down, up = _matrix(folder, path, a), _matrix(folder, path, b)
        if not down.shape[0] or down.shape[0] != up.shape[1]:
            raise InputError(f"{Path(folder) / WEIGHTS}: the factors of {path} are {list(down.shape)} and {list(up.shape)}: of no rank")
        scale = _scale_of(scaling, path, int(down.shape[0]))
        found[adapter.consts["down"]] = down.T.contiguous()
        found[adapter.consts["up"]] = (up.T * (scale / adapter.scale)).contiguous()
    return found


_KAIMING = "compile with init: kaiming to take them in"


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: no {CONFIG} in it, so it is no PEFT adapter")
    try:
        config = read_json(inside(folder, CONFIG), lambda data: typed(data, dict, "the settings"))
        inside(folder, WEIGHTS)
    except StoredError as error:
        raise InputError(str(error)) from error
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise InputError(
            f"{folder}: no {WEIGHTS} in it"
            + (", only a pickle, which is not read: save it with safe_serialization=True" if pickled else "")
        )
    try:
        return config, load_file(folder / WEIGHTS)
    except Exception as error:  # of a header that is damaged, or a type that torch lacks
        raise InputError(f"{folder / WEIGHTS}: cannot be read: {error}") from error


_REFUSED: Mapping[str, Callable[[Any], bool]] = {
    "use_dora": bool,
    "use_qalora": bool,
    "lora_bias": bool,
    "bias": lambda value: value not in (None, "none"),
    "modules_to_save": bool,
    "target_parameters": bool,
    "trainable_token_indices": bool,
    "layer_replication": bool,
    "alora_invocation_tokens": bool,
    "use_bdlora": bool,
    "arrow_config": bool,
    "kasa_config": bool,
    "monteclora_config": bool,
    "velora_config": bool,
    "init_lora_weights": lambda value: isinstance(value, str) and value.lower() not in ("gaussian", "orthogonal", "eva"),
}
"""Settings under which the factors mean more than W + scale B A: which values of each."""


def _refuse_config(folder: Path, config: Any) -> None:
    where = folder / CONFIG
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != Peft.type:
        raise InputError(f"{where}: peft_type is {kind}, only {Peft.type} can be taken in")
    for key, refused in _REFUSED.items():
        if refused(config.get(key)):
            raise InputError(f"{where}: {key}: {json.dumps(config[key])} is more than LoRA factors beside a weight, and cannot be taken in")
    if "r" not in config or "lora_alpha" not in config:
        raise InputError(f"{where}: r or lora_alpha is missing")


def _scaling(folder: Path, config: Mapping[str, Any]) -> _Scaling:
    where = folder / CONFIG
    try:
        found = from_plain(_Scaling, config)
        for pattern in found.alpha_pattern or {}:
            re.compile(pattern)
    except ManifestError as error:
        raise InputError(f"{where}: {error}") from error
    except (re.error, RecursionError) as error:
        raise InputError(f"{where}: alpha_pattern: {pattern!r:.80} is no regular expression: {error}") from error
    return found


def _pairs(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module path."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise InputError(f"{folder / WEIGHTS}: {name} is no factor of a LoRA, and cannot be taken in")
        halves.setdefault(match[1], {})[match[2]] = tensor
    half = next((path for path, parts in halves.items() if len(parts) != 2), None)
    if half is not None or not halves:
        raise InputError(f"{folder / WEIGHTS}: " + (f"{half} has one factor of two" if half else "holds no factors"))
    return {path: (parts["A"], parts["B"]) for path, parts in halves.items()}


def _matrix(folder: Any, path: str, factor: Tensor) -> Tensor:
    """[rows, columns]; a convolution's kernel of one pixel has no more than that."""
    if factor.ndim < 2 or not factor.is_floating_point():
        raise InputError(f"{folder}: {path} has a factor that is no matrix of floats: {factor.dtype}{list(factor.shape)}")
    if set(factor.shape[2:]) - {1}:
        raise InputError(f"{folder}: {path} has factors of {list(factor.shape)}: convolutions with larger kernels cannot be taken in")
    return factor.reshape(factor.shape[:2])


def _scale_of(scaling: _Scaling, path: str, rank: int) -> float:
    alpha = _of_pattern(scaling.alpha_pattern or {}, path, scaling.lora_alpha)
    return alpha / (sqrt(rank) if scaling.use_rslora else rank)


def _of_pattern(pattern: Mapping[str, float], path: str, default: float) -> float:
    """As PEFT looks it up: a key is a regular expression for the end of a path."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)
