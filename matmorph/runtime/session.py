"""`Session`: runs the model of an artefact folder on ONNX Runtime, numpy in, numpy out."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from matmorph.runtime.adapters import LoadedAdapter, load_adapter, read_slots
from matmorph.runtime.decoder import MASK
from matmorph.runtime.errors import AdapterError, ArtifactError, ExecutionError, ProviderError, first_line
from matmorph.runtime.feeds import Array, check_feeds
from matmorph.runtime.format.artifact import MODEL, Manifest, TensorInfo
from matmorph.runtime.format.printable import printable
from matmorph.runtime.manifest import checked_model, open_folder
from matmorph.runtime.parts import PartName, part_of
from matmorph.runtime.prompts import refuse_left_padding
from matmorph.runtime.providers import Provider, name_of, requested
from matmorph.runtime.targets import TARGETS
from matmorph.runtime.targets.target import Target


def to_stderr(line: str) -> None:
    """The default `log`: one plain line on stderr."""
    print(printable(line), file=sys.stderr)


class Session:
    """The model of one artefact folder, loaded. Any number of threads may call `run` on it.

    `providers`: None takes CUDA when it truly loads, else CPU and says so through `log`. A list ("cpu", "cuda", ONNX Runtime's own names,
    or pairs of name and options) is taken as it stands. `threads`: CPU threads of one operator (None: ONNX Runtime decides).
    `optimize=False` switches graph optimisations off. `session_options` replaces both. `verify=False`: sizes and hashes of the model and
    its data are not held against the manifest before they are loaded. `part`: of a model with an encoder and a cache, the encoder or the
    decoder alone.

    Raises ArtifactError (folder, manifest or model, a file that changed), ProviderError (a provider that was asked for did not load).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        providers: str | Sequence[Provider] | None = None,
        *,
        threads: int | None = None,
        optimize: bool = True,
        session_options: onnxruntime.SessionOptions | None = None,
        log: Callable[[str], None] = to_stderr,
        verify: bool = True,
        part: PartName | None = None,
    ) -> None:
        whole, stored = open_folder(folder, verify)
        self._manifest, name = (whole, MODEL) if part is None else part_of(whole, part, str(folder))
        for info in self._manifest.inputs:
            check_dtype(info)
        path = checked_model(stored, name)
        self._folder = Path(folder)
        self._adapter: LoadedAdapter | None = None
        self._mine = threading.local()
        options = session_settings(threads, optimize, session_options)
        if self._manifest.adapters is not None and session_options is None:
            options.log_severity_level = 3  # a warning for each input that has a default
        self._session = load_session(path, providers, options, log)
        _check_names(path, self._manifest, self._session)

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Name, dtype and shape of each input, in the order of the source model's call."""
        return self._manifest.inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Name, dtype and shape of each output, in the order in which `run` returns them."""
        return self._manifest.outputs

    @property
    def manifest(self) -> Manifest:
        """Everything that manifest.json says."""
        return self._manifest

    @property
    def provider(self) -> str:
        """The execution provider that loaded and comes first, as ONNX Runtime calls it."""
        return str(self._session.get_providers()[0])

    @property
    def inference(self) -> onnxruntime.InferenceSession:
        """ONNX Runtime's own session, for who binds memory to it; nothing is checked on that way."""
        return self._session

    def load_adapter(self, path: str | os.PathLike[str]) -> LoadedAdapter:
        """An `.onnx_adapter` file, checked against this model. Raises AdapterError: no adapter, another base, other sizes."""
        return load_adapter(path, read_slots(self._manifest.adapters, str(self._folder)))

    def switch(self, adapter: LoadedAdapter | None) -> None:
        """What `run` computes with from now on, in every thread; None = the model as it was exported. Threads that want different
        adapters name theirs in `run(adapter=...)`."""
        self._mine.adapter = self._adapter = self.checked_adapter(adapter)

    def run(self, feeds: Mapping[str, Any], *, adapter: LoadedAdapter | None = None) -> dict[str, Array]:
        """Outputs by name, in the manifest's order, for numpy arrays by input name. `adapter`: for this run, in place of the one that
        `switch` chose.

        Raises InputMismatch before anything runs (see `feeds` for the rules), AdapterError for an adapter of another model and where
        another thread has switched since this one did, ExecutionError when ONNX Runtime refuses.
        """
        arrays = check_feeds(self._manifest, feeds)
        if self._manifest.cache is not None and self._manifest.cache.padding == "right" and MASK in arrays:
            refuse_left_padding(arrays[MASK])
        names = [info.name for info in self._manifest.outputs]
        chosen = self._switched() if adapter is None else self.checked_adapter(adapter)
        try:
            results = self._session.run(names, arrays, _run_options(chosen))
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
            raise ExecutionError(f"{self.provider}: {first_line(error)}") from error
        return dict(zip(names, results, strict=True))

    def _switched(self) -> LoadedAdapter | None:
        """What `switch` chose. A thread that has switched must not get what another one has chosen since, in silence."""
        found = self._adapter
        if getattr(self._mine, "adapter", found) is not found:
            raise AdapterError("another thread has switched the adapter since this one did: name the adapter with run(..., adapter=...)")
        return found

    def checked_adapter(self, adapter: LoadedAdapter | None) -> LoadedAdapter | None:
        """The same. Raises AdapterError for one of another model."""
        if adapter is not None and adapter.model_version != read_slots(self._manifest.adapters, str(self._folder)).model_version:
            raise AdapterError(f"{adapter.path}: made for another base; load it with load_adapter of this session")
        return adapter


def _run_options(adapter: LoadedAdapter | None) -> onnxruntime.RunOptions | None:
    if adapter is None:
        return None
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter.handle)
    return options


def load_session(
    path: Path,
    providers: str | Sequence[Provider] | None,
    options: onnxruntime.SessionOptions,
    log: Callable[[str], None],
) -> onnxruntime.InferenceSession:
    """The model of one file, on the first of `TARGETS` that truly loads when `providers` is None. Raises ArtifactError, ProviderError."""
    if not path.is_file():
        raise ArtifactError(f"{path}: missing")
    return _automatic(path, options, log) if providers is None else _explicit(path, options, requested(providers))


def session_settings(threads: int | None, optimize: bool, given: onnxruntime.SessionOptions | None = None) -> onnxruntime.SessionOptions:
    """Options for `threads` CPU threads of one operator; `given` in place of both."""
    if given is not None:
        if threads is not None or not optimize:
            raise ValueError("session_options replaces threads and optimize: set them there")
        return given
    options = onnxruntime.SessionOptions()
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be 1 or more, got {threads}")
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _automatic(path: Path, options: onnxruntime.SessionOptions, log: Callable[[str], None]) -> onnxruntime.InferenceSession:
    """Never a silent change of mind: the line says what stands in the way of each target that comes before the one that runs."""
    *preferred, last = TARGETS.values()
    obstacles: list[str] = []
    for target in preferred:
        made = _tried(path, options, target, last)
        if not isinstance(made, str):
            break
        obstacles.append(f"no {target.title} ({made})")
    else:
        target, made = last, _create(path, options, [last.provider])
    if obstacles:
        log(f"running on {target.title}: {', '.join(obstacles)}")
    return made


def _tried(path: Path, options: onnxruntime.SessionOptions, target: Target, last: Target) -> onnxruntime.InferenceSession | str:
    """A session on the target, `last` beside it for what it has no kernel for; else what stands in its way."""
    obstacle = target.obstacle()
    if obstacle is not None:
        return obstacle
    try:
        session = _create(path, options, list(dict.fromkeys((target.provider, last.provider))))
    except ArtifactError:
        # Either the model is broken, then the last target says so again, or this one is: its own message has been printed by now.
        return "a session could not be created on it"
    return session if target.provider in session.get_providers() else "ONNX Runtime did not load it"


def _explicit(path: Path, options: onnxruntime.SessionOptions, providers: Sequence[Provider]) -> onnxruntime.InferenceSession:
    session = _create(path, options, providers)
    loaded = session.get_providers()
    for name in map(name_of, providers):
        if name not in loaded:
            raise ProviderError(f"{name} was asked for and did not load; loaded: {', '.join(loaded)}")
    return session


def _create(path: Path, options: onnxruntime.SessionOptions, providers: Sequence[Provider]) -> onnxruntime.InferenceSession:
    """No fallback inside ONNX Runtime: it would change the provider in the middle of a run, with a print (decision R2)."""
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers), enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
        raise ArtifactError(f"{path}: ONNX Runtime cannot load it on {name_of(providers[0])}: {first_line(error)}") from error


# What both numpy and ONNX Runtime hold. Not np.dtype(name): that one knows more names once some other package has registered them.
_DTYPES = frozenset(["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"])


def check_dtype(info: TensorInfo) -> None:
    """Raises ArtifactError for a type that numpy does not have."""
    if info.dtype not in _DTYPES:
        raise ArtifactError(f"input {info.name} has type {info.dtype}, which numpy cannot hold")


def _check_names(path: Path, manifest: Manifest, session: onnxruntime.InferenceSession) -> None:
    pairs = (("inputs", manifest.inputs, session.get_inputs()), ("outputs", manifest.outputs, session.get_outputs()))
    for what, listed, found in pairs:
        expected, actual = sorted(info.name for info in listed), sorted(arg.name for arg in found)
        if expected != actual:
            raise ArtifactError(f"{path}: its {what} are {', '.join(actual)}, the manifest says {', '.join(expected)}")
