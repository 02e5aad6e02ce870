"""A `.pt2` file read as an ExportedProgram, without running anything that lies in it.

torch's own loader unpickles whatever `weights_only` refuses, loads compiled libraries, evaluates the expressions of sizes as Python and
imports modules that a file names. Here the members are read one by one: tensors from raw bytes or by `torch.load(weights_only=True)` and in
no other way, the program's text only after `judge_program` has passed it. The deserializer is handed objects, never bytes, so that it has
nothing to fall back from (decision V1).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass
from torch.export import ExportedProgram
from torch.export.pt2_archive import _package as package
from torch.export.pt2_archive import constants as names

from matmorph.errors import InputError
from matmorph.models.exported_text import judge_payloads, judge_program

_MODEL = "model"
_ZIP_OF_2_7 = {
    "program": "serialized_exported_program.json",
    "state": ("serialized_state_dict.pt", "serialized_state_dict.json"),
    "constants": ("serialized_constants.pt", "serialized_constants.json"),
    "examples": ("serialized_example_inputs.pt",),
}
"""Members of the plain zip that torch wrote up to 2.7."""

Read = Callable[[str], bytes]


def load_program(path: Path) -> ExportedProgram:
    """The program of a file that `torch.export.save` wrote.

    Raises InputError that names the file, and the member at fault: damage, another kind of file, a pickle that holds more than tensors and
    plain values, a compiled library, a text that would be run.
    """
    try:
        return _of_archive(path) if _is_archive(path) else _of_old_zip(path)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", error.details) from error
    except RecursionError as error:
        raise InputError(f"{path}: not a program saved by torch.export.save: nested too deep") from error
    except Exception as error:  # torch's readers raise whatever the damage leads to
        raise InputError(f"{path}: not a program saved by torch.export.save: {_first_line(error)}") from error


def _is_archive(path: Path) -> bool:
    """Whether this is the archive that torch writes since 2.8, else a plain zip. InputError for what is no zip at all."""
    if not zipfile.is_zipfile(path):
        raise InputError("not a program saved by torch.export.save: no zip archive")
    with zipfile.ZipFile(path) as archive:
        return _ZIP_OF_2_7["program"] not in archive.namelist()


# ---- the archive since 2.8


def _of_archive(path: Path) -> ExportedProgram:
    reader = package.PT2ArchiveReader(str(path))
    members = reader.get_file_names()
    _refuse_members(members)
    program = names.MODELS_FILENAME_FORMAT.format(_MODEL)
    if program not in members:
        raise InputError(f"not a program saved by torch.export.save: {program} is missing")
    examples = names.SAMPLE_INPUTS_FILENAME_FORMAT.format(_MODEL)
    state = _tensors(reader, members, names.WEIGHTS_DIR, names.WEIGHTS_CONFIG_FILENAME_FORMAT, package._load_state_dict)
    constants = _tensors(reader, members, names.CONSTANTS_DIR, names.CONSTANTS_CONFIG_FILENAME_FORMAT, package._load_constants)
    inputs = _plain_values(reader.read_bytes(examples), examples) if examples in members else None
    return _program(_json(reader.read_bytes(program), program), program, state, constants, inputs)


def _refuse_members(members: list[str]) -> None:
    """What only makes sense to run: compiled models, and objects that unpickle themselves."""
    for member in members:
        name = member.rpartition("/")[2]
        if member.startswith(names.AOTINDUCTOR_DIR):
            raise InputError(f"{member}: a compiled model, which would have to be run to be read")
        if name.startswith((names.CUSTOM_OBJ_FILENAME_PREFIX, names.OPAQUE_OBJ_FILENAME_PREFIX)):
            raise InputError(f"{member}: an object of a class of its own, which is not unpickled")
        if member.startswith(names.MODELS_DIR) and member != names.MODELS_FILENAME_FORMAT.format(_MODEL):
            raise InputError(f"{member}: a second program; of one file one is read, and it is called {_MODEL}")


def _tensors(reader: Any, members: list[str], folder: str, config: str, load: Callable[[Any, str], Any]) -> Mapping[str, Any]:
    """Weights or constants by name. `load`: torch's own, which builds them from raw bytes where no payload is pickled."""
    single = f"{folder}{_MODEL}.pt"
    if single in members:  # written by 2.8
        return _table(_plain_values(reader.read_bytes(single), single), single)
    listed = config.format(_MODEL)
    if listed not in members:
        raise InputError(f"{listed} is missing")
    judge_payloads(_json(reader.read_bytes(listed), listed), listed, folder, members)
    return _table(load(reader, _MODEL), listed)


# ---- the zip up to 2.7


def _of_old_zip(path: Path) -> ExportedProgram:
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
        twice = next((name for name in members if members.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{twice}: lies in the archive twice")
        packed = next((one.filename for one in archive.infolist() if one.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None:
            raise InputError(f"{packed}: is compressed, which torch never wrote")

        def loaded(part: str) -> tuple[Any, str]:
            name = next((one for one in _ZIP_OF_2_7[part] if one in members), None)
            if name is None:
                raise InputError(f"not a program saved by torch.export.save: {_ZIP_OF_2_7[part][0]} is missing")
            return _plain_values(archive.read(name), name), name

        program = str(_ZIP_OF_2_7["program"])
        state, constants, (inputs, _) = _table(*loaded("state")), _table(*loaded("constants")), loaded("examples")
        return _program(_json(archive.read(program), program), program, state, constants, inputs)


# ---- both


def _program(data: Any, member: str, state: Mapping[str, Any], constants: Mapping[str, Any], inputs: Any) -> ExportedProgram:
    judged = judge_program(data, member)
    if inputs is not None and not isinstance(inputs, tuple | dict):
        raise InputError(f"the example inputs are a {type(inputs).__name__}, not arguments")
    program = _dict_to_dataclass(schema.ExportedProgram, judged)  # type: ignore[no-untyped-call] # torch's own
    return ExportedProgramDeserializer().deserialize(program, state, constants, inputs)  # type: ignore[arg-type] # it takes a dict


def _plain_values(data: bytes, member: str) -> Any:
    """What `torch.load(weights_only=True)` gives, {} for no bytes. InputError for what it refuses."""
    if not data:
        return {}
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{member}: holds more than tensors and plain values, and nothing else is unpickled: {_first_line(error)}",
            ["use a package.module:factory that returns matmorph.Model(program, example_inputs)"],
        ) from error


def _table(found: Any, member: str) -> Mapping[str, Any]:
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{member}: holds a {type(found).__name__}, not tensors by name")
    return found


def _json(data: bytes, member: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{member}: not JSON: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
