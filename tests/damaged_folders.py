"""What becomes of the commands when what they read is damaged: `python tests/damaged_folders.py --count 1000`.

A seed damages one file of a small home (folders with training graphs, what merging and a search made of them, a decoder, trained values, an
adapter, a PEFT folder, a checkpoint, data, a program) and runs some of the commands that read it, in this process. Half of the seeds give
the manifests the hashes of the damaged files, so that the readers behind the hashes are met too. A run is fine when it ends with 0, 1 or 2,
or in Python with a `SessionError`, names no internal error, shows no traceback, runs nothing that lay in a file, and leaves nothing half-
written.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pickle
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from adapting import X, compiled, network, trained
from marks import Mark
from safetensors.torch import save_file
from tiny_speaker import folder_with

from matmorph.cli.main import main
from matmorph.runtime import Session, SessionError, Trainer
from matmorph.runtime.format.artifact import file_record
from matmorph.runtime.format.plain import to_plain

Rng = np.random.Generator
MARK = "mark"
"""The folder that a pickle makes when it is run."""


# ---- the home


def build(home: Path) -> None:
    """Everything that the commands read."""
    spec = {"train": {"loss": "mse", "trainable": ["adapters", "2.bias"]}, "export": {"target": ["cpu"], "adapters": "inputs"}}
    (home / "hub").mkdir()
    (home / "hub" / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [2], "head_dim": 8}))
    (home / "hub" / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.5}))
    (home / "hub" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (home / "hub" / "chat_template.jinja").write_text("{{ messages }}")
    found = compiled({"lora": {"rank": 2, "alpha": 6}}, hf_folder=home / "hub", **spec)
    shutil.rmtree(home / "hub")
    found.save(home / "train")
    save_file(trained(found), home / "values.safetensors")
    found.load_trained(home / "values.safetensors").merge().save(home / "merged")
    found.save_adapter(home / "own.onnx_adapter")
    quiet("adapter", "to-peft", home / "train", "--out", home / "peft")
    rng = np.random.default_rng(0)
    np.savez(home / "data.npz", input=rng.standard_normal((8, 24), np.float32), labels=rng.standard_normal((8, 8), np.float32))
    trainer = Trainer(home / "train", "cpu", threads=1)
    trainer.fit([dict(np.load(home / "data.npz"))], checkpoint=home / "run.safetensors", progress=False)
    folder_with(home / "decoder")
    supernet = compiled({"glora": {"rank": 2, "search": True}}, train={"loss": "mse"}, export={"target": ["cpu"]})
    supernet.save(home / "net")
    quiet("train", home / "net", "--data", home / "data.npz", "--out", home / "net.safetensors", "--threads", "1")
    assert quiet("search", home / "net", *_search(home), "--out", home / "found").code == 0
    torch.export.save(torch.export.export(network(), (X,), dynamic_shapes=({0: torch.export.Dim("batch")},)), home / "net.pt2")


def _search(home: Path) -> tuple[Any, ...]:
    small = ("--population", "4", "--mutation", "2", "--crossover", "2", "--top", "2", "--rounds", "1", "--threads", "1")
    return ("--data", home / "data.npz", "--trained", home / "net.safetensors", *small)


def quiet(*words: Any) -> Outcome:
    return run_command(list(map(str, words)))


# ---- damage


def flip(path: Path, rng: Rng) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    for place in rng.integers(0, len(data), int(rng.integers(1, 9))):
        data[place] ^= 1 << int(rng.integers(0, 8))
    path.write_bytes(data)


def cut(path: Path, rng: Rng) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(rng.integers(0, max(1, len(data))))])


def empty(path: Path, rng: Rng) -> None:
    path.write_bytes(b"")


def lose(path: Path, rng: Rng) -> None:
    path.unlink()


def lengthen(path: Path, rng: Rng) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 4096))))


def noise(path: Path, rng: Rng) -> None:
    path.write_bytes(rng.bytes(int(rng.integers(1, 4096))))


def exchange(path: Path, rng: Rng) -> None:
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    if others:
        other = others[int(rng.integers(0, len(others)))]
        here, there = path.read_bytes(), other.read_bytes()
        path.write_bytes(there)
        other.write_bytes(here)


def pickled(path: Path, rng: Rng) -> None:
    path.write_bytes(pickle.dumps({"x": Mark(path.parents[1] / MARK)}))


def folder(path: Path, rng: Rng) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, rng: Rng) -> None:
    path.rename(path.parents[2] / "outside")
    path.symlink_to(path.parents[2] / "outside")


DEEP = object()
VALUES: Sequence[Any] = (
    *(
        None,
        True,
        -8,
        0,
        5,
        10**400,
        1e308,
        "",
        "x",
        "../../x",
        "/etc/hostname",
        "C:/x",
        "a\\b",
        "9**9**9**9",
        "\x1b[31m",
        [],
        {},
        [1, "x"],
    ),
    *({"a": {}}, [[]], "y" * 10_000, 1 << 40, -1.5, DEEP),
)


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def changed_json(text: str, rng: Rng) -> str:
    data = json.loads(text)
    for _ in range(int(rng.integers(1, 3))):
        all_places = list(places(data))
        if not all_places:
            return "[]"
        *above, last = all_places[int(rng.integers(0, len(all_places)))]
        holder = data
        for key in above:
            holder = holder[key]
        value = VALUES[int(rng.integers(0, len(VALUES)))]
        if rng.random() < 0.2:
            del holder[last]
        else:
            holder[last] = "DEEP" if value is DEEP else value
    written = json.dumps(data)
    return written.replace('"DEEP"', "[" * 200_000 + "]" * 200_000).replace("1e+308", "1e999" if rng.random() < 0.5 else "NaN")


def retype_json(path: Path, rng: Rng) -> None:
    path.write_text(changed_json(path.read_text(), rng))


def retype_header(path: Path, rng: Rng) -> None:
    """Of a .safetensors file: its length, then JSON, then the numbers."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = changed_json(data[8 : 8 + size].decode(), rng).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def retype_arrays(path: Path, rng: Rng) -> None:
    """Of an .npz file: one member goes, or becomes another one."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    name = sorted(arrays)[int(rng.integers(0, len(arrays)))]
    array = arrays.pop(name)
    others: Sequence[Any] = (
        None,
        np.zeros((0, 3), np.float32),
        np.asarray("text"),
        np.asarray([Mark(path.parents[1] / MARK)], object),
        array.astype(np.complex64),
        array.reshape(-1)[:1],
        np.full_like(array, 127),
        np.broadcast_to(np.float32(0), (1 << 28,)),
    )
    other = others[int(rng.integers(0, len(others)))]
    if other is not None:
        arrays[name if rng.random() < 0.7 else "input:x:²"] = other
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, value in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(value), allow_pickle=True)


def retype_model(path: Path, rng: Rng) -> None:
    """Of an .onnx file: one thing in it becomes another."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    outside = [tensor for tensor in graph.initializer if tensor.external_data]
    tensor = outside[int(rng.integers(0, len(outside)))] if outside else None
    node = graph.node[int(rng.integers(0, len(graph.node)))]
    kind = int(rng.integers(0, 8))
    if tensor is not None and kind < 5:
        entries = {entry.key: entry for entry in tensor.external_data}
        if kind == 0:
            entries["offset"].value = ("-8", "x", str(1 << 62), "7", "9" * 40)[int(rng.integers(0, 5))]
        if kind == 1:
            entries["location"].value = ("../../x", "/etc/hostname", "C:/x", "", "manifest.json")[int(rng.integers(0, 5))]
        if kind == 2:
            entries["length"].value = ("-1", "x", "0", str(1 << 62))[int(rng.integers(0, 4))]
        if kind == 3:
            tensor.dims[:] = [(-1,), (0,), (1 << 31, 1 << 20), (7, 7)][int(rng.integers(0, 4))]
        if kind == 4:
            tensor.data_type = int(rng.integers(0, 25))
    elif kind == 5:
        node.op_type = "Nothing"
    elif kind == 6:
        node.input[0] = "nowhere"
    else:
        graph.output[0].name = "nothing"
    path.write_bytes(model.SerializeToString())


WORDS = (
    "0",
    "-8",
    "9" * 30,
    "x",
    "(",
    ")",
    "*" * 300,
    "float32",
    "int4",
    "aten.nothing.default",
    "%input",
    "#",
    "\n",
    "(" * 2000,
    "[" * 2000,
)


def retype_text(path: Path, rng: Rng) -> None:
    """Of a graph or a spec: words become others, lines go or come twice."""
    lines = path.read_text().splitlines(keepends=True)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(0, len(lines)))
        kind = rng.random()
        if kind < 0.7:
            words = re.split(r"(\W+)", lines[place])
            words[int(rng.integers(0, len(words)))] = WORDS[int(rng.integers(0, len(WORDS)))]
            lines[place] = "".join(words)
        else:
            lines[place] = "" if kind < 0.85 else lines[place] * 2
    path.write_text("".join(lines))


def retype_program(path: Path, rng: Rng) -> None:
    """Of a .pt2 file: one member becomes a pickle that leaves a mark, or its text is changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = sorted(members)[int(rng.integers(0, len(members)))]
    if name.endswith(".json") and rng.random() < 0.7:
        members[name] = changed_json(members[name].decode(), rng).encode()
    else:
        members[name] = pickle.dumps(Mark(path.parent / MARK), protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        for key, data in members.items():
            archive.writestr(key, data)


ANY = (flip, flip, cut, empty, lose, lengthen, noise, exchange, pickled, folder, link)
OWN: Mapping[str, Sequence[Callable[[Path, Rng], None]]] = {
    ".json": (retype_json,) * 12,
    ".safetensors": (retype_header,) * 6,
    ".npz": (retype_arrays,) * 8,
    ".onnx": (retype_model,) * 8,
    ".pt2": (retype_program,) * 12,
    ".ir": (retype_text,) * 12,
    ".yaml": (retype_text,) * 6,
}
"""What a kind of file is damaged by beside what fits any."""


@dataclass(frozen=True)
class Damage:
    """What a seed did."""

    name: str
    how: str
    rehashed: bool


def damage(home: Path, rng: Rng) -> Damage:
    files = sorted(path for path in home.rglob("*") if path.is_file() and path.name != "report.html" and "report" not in path.parts)
    path = files[int(rng.integers(0, len(files)))]
    ways = (*ANY, *OWN.get(path.suffix, ()))
    how = ways[int(rng.integers(0, len(ways)))]
    how(path, rng)
    rehashed = bool(rng.random() < 0.5) and path.name != "manifest.json"
    if rehashed:
        for place in (home / "train", home / "merged", home / "net", home / "decoder"):
            for listing in ("train.json", "manifest.json"):
                rehash(place, listing)
    return Damage(path.relative_to(home).as_posix(), how.__name__, rehashed)


def rehash(place: Path, listing: str) -> None:
    path = place / listing
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        data = json.loads(path.read_text())
        for name in data["files"]:
            if (place / name).is_file():
                data["files"][name] = to_plain(file_record((place / name).read_bytes()))
        path.write_text(json.dumps(data))


# ---- readers


@dataclass(frozen=True)
class Outcome:
    """How a reader ended: its exit code (Python entries: 0, or 2 for an error of theirs), and all it said."""

    code: int
    said: str


def run_command(words: Sequence[str]) -> Outcome:
    out = io.StringIO()
    code: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(words)
        except SystemExit as left:
            code = left.code or 0
    return Outcome(int(code), out.getvalue())


def python(call: Callable[[], Any]) -> Outcome:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            call()
        except SessionError as error:
            return Outcome(2, f"{out.getvalue()}{error}")
        except Exception:
            return Outcome(3, f"{out.getvalue()}{traceback.format_exc()}")
    return Outcome(0, out.getvalue())


def readers(home: Path) -> dict[str, Callable[[], Outcome]]:
    """Everything that reads something of the home, by name; what they write lies in `home/out`."""
    out, train, merged, values = home / "out", home / "train", home / "merged", home / "values.safetensors"
    commands: dict[str, tuple[Any, ...]] = {
        "verify": ("verify", train),
        "verify --json": ("verify", merged, "--json"),
        "verify --target": ("verify", train, "--target", "cuda"),
        "report": ("report", train, "--out", out / "page.html"),
        "report in place": ("report", merged),
        "compare": ("compare", train, merged, "--html", out / "compare.html"),
        "compare --json": ("compare", train, merged, "--json"),
        "diff": ("diff", train),
        "diff --node": ("diff", merged, "--node", "0", "--svg", out / "diff.svg"),
        "merge": ("merge", train, "--out", out / "merged"),
        "merge --trained": ("merge", train, "--trained", values, "--out", out / "merged-values"),
        "merge of an adapter": ("merge", train, "--trained", home / "own.onnx_adapter", "--out", out / "merged-adapter"),
        "merge of a checkpoint": ("merge", train, "--trained", home / "run.safetensors", "--out", out / "merged-run"),
        "adapter save": ("adapter", "save", train, "--out", out / "saved.onnx_adapter"),
        "adapter load": ("adapter", "load", train, home / "own.onnx_adapter"),
        "adapter switch": ("adapter", "switch", train, home / "own.onnx_adapter"),
        "adapter unmerge": ("adapter", "unmerge", train, "--merged", merged, "--out", out / "unmerged.safetensors"),
        "adapter to-peft": ("adapter", "to-peft", train, "--out", out / "peft"),
        "adapter from-peft": ("adapter", "from-peft", train, home / "peft", "--out", out / "from-peft.safetensors"),
        "train": ("train", train, "--data", home / "data.npz", "--out", out / "trained.safetensors", "--threads", "1"),
        "train --resume": (
            "train",
            train,
            "--data",
            home / "data.npz",
            "--resume",
            home / "run.safetensors",
            "--checkpoint",
            out / "c.safetensors",
            "--out",
            out / "resumed.safetensors",
            "--threads",
            "1",
        ),
        "inspect": ("inspect", home / "net.pt2"),
        "generate": ("generate", home / "decoder", *_FEW_TOKENS),
        "generate --raw": ("generate", home / "decoder", "--raw", "--json", *_FEW_TOKENS),
        "evaluate": ("evaluate", home / "decoder", *_SHORT_TEXT),
        "layout": ("layout", train, "--for", "transformers.js", "--out", out / "tree"),
        "layout hf": ("layout", merged, "--for", "hf", "--out", out / "hf"),
        "search": ("search", home / "net", *_search(home), "--out", out / "found"),
        "search --resume": ("search", home / "net", *_search(home), "--out", home / "found", "--resume"),
        "merge of a configuration": (
            *("merge", home / "net", "--trained", home / "net.safetensors"),
            *("--configuration", home / "found" / "search.json", "--out", out / "configured"),
        ),
    }
    skipping = {
        f"{name} --no-verify": (*words, "--no-verify")
        for name, words in commands.items()
        if name.startswith(("merge", "report", "diff", "layout", "generate", "evaluate"))
    }
    feeds = {"input": np.zeros((3, 24), np.float32)}
    batch = {**feeds, "labels": np.zeros((3, 8), np.float32)}
    entries: dict[str, Callable[[], Any]] = {
        "Session": lambda: Session(train, "cpu", threads=1).run(feeds),
        "Session, unverified": lambda: Session(merged, "cpu", threads=1, verify=False).run(feeds),
        "Trainer": lambda: Trainer(train, "cpu", threads=1).step(batch),
        "Trainer, unverified": lambda: Trainer(train, "cpu", threads=1, verify=False).evaluate([batch]),
        "Trainer.resume": lambda: Trainer.resume(train, home / "run.safetensors", "cpu", threads=1).step(batch),
    }
    found: dict[str, Callable[[], Outcome]] = {}
    for name, words in {**commands, **skipping}.items():
        found[name] = lambda words=words: run_command(list(map(str, words)))  # type: ignore[misc]
    for name, call in entries.items():
        found[name] = lambda call=call: python(call)  # type: ignore[misc]
    return found


_FEW_TOKENS = ("--prompt", "abc", "--max-new-tokens", "3", "--provider", "cpu", "--threads", "1")
_SHORT_TEXT = ("--text", __file__, "--window", "8", "--tokens", "64", "--provider", "cpu", "--threads", "1")
_REOPEN = ("merge", "adapter save", "adapter to-peft", "adapter from-peft", "adapter unmerge")
READS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("train/manifest.json", ("verify", "layout", "report", "compare", "diff", *_REOPEN, "adapter", "train", "Session", "Trainer")),
    ("train/train.json", ("verify", *_REOPEN, "train", "search", "Trainer")),
    ("train/report.json", ("report", "compare", *_REOPEN)),
    ("train/run.json", ("report", "compare")),
    ("train/graph.ir", ("diff", *_REOPEN)),
    ("train/source.ir", ("diff",)),
    ("train/spec.yaml", ("report", *_REOPEN)),
    ("train/check.npz", ("verify", "adapter switch", *_REOPEN)),
    ("train/train_check.npz", ("verify",)),
    ("train/config.json", ("verify", "layout", *_REOPEN)),
    ("train/generation_config.json", ("verify", "layout", *_REOPEN)),
    ("train/tokenizer_config.json", ("verify", "layout", *_REOPEN)),
    ("train/chat_template.jinja", ("verify", "layout", *_REOPEN)),
    ("train/model.onnx", ("verify", "layout", "Session", "adapter switch", *_REOPEN)),
    ("train/trainable.safetensors", ("verify", "train", "Trainer", *_REOPEN)),
    ("train/", ("verify", "train", "Trainer", *_REOPEN)),
    ("merged/manifest.json", ("verify --json", "report in place", "compare", "adapter unmerge", "Session, unverified")),
    ("merged/report.json", ("report in place", "compare")),
    ("merged/run.json", ("report in place", "compare")),
    ("merged/graph.ir", ("diff --node",)),
    ("merged/source.ir", ("diff --node",)),
    ("merged/", ("verify --json", "layout hf", "adapter unmerge", "Session, unverified")),
    ("decoder/", ("generate", "evaluate")),
    ("peft/", ("adapter from-peft",)),
    ("values.safetensors", ("merge --trained",)),
    ("own.onnx_adapter", ("adapter load", "adapter switch", "merge of an adapter")),
    ("run.safetensors", ("train --resume", "Trainer.resume", "merge of a checkpoint")),
    ("data.npz", ("train", "search")),
    ("net/train.json", ("search", "merge of a configuration")),
    ("net/", ("search", "merge of a configuration")),
    ("net.safetensors", ("search", "merge of a configuration")),
    ("found/search.json", ("search --resume", "merge of a configuration")),
    ("found/", ("search --resume",)),
    ("net.pt2", ("inspect",)),
)
"""How a damaged file's name begins, and the names of the readers that meet it; the first line that fits."""


@dataclass(frozen=True)
class Result:
    """A reader of a damaged home. `fault`: what should not have happened, None where all is well."""

    seed: int
    damage: Damage
    reader: str
    code: int
    fault: str | None
    said: str
    seconds: float


def one(seed: int, whole: Path, place: Path, readers_each: int = 3) -> list[Result]:
    """Damages a copy of the home `whole` in `place` by the seed, and runs some of its readers."""
    rng = np.random.default_rng(seed)
    home = place / "home"
    shutil.copytree(whole, home)
    (home / "out").mkdir()
    done = damage(home, rng)
    all_readers = readers(home)
    known = next(names for start, names in READS if done.name.startswith(start))
    met = [name for name in all_readers if name.startswith(known)]
    chosen = [met[int(k)] for k in rng.permutation(len(met))[:readers_each]]
    results = []
    for name in chosen:
        began = time.perf_counter()
        outcome = all_readers[name]()
        seconds = time.perf_counter() - began
        results.append(Result(seed, done, name, outcome.code, fault_of(outcome, home), outcome.said, seconds))
    shutil.rmtree(place, ignore_errors=True)
    return results


def fault_of(outcome: Outcome, home: Path) -> str | None:
    if (home / MARK).exists() or (home.parent / MARK).exists():
        return "code was run"
    if outcome.code not in (0, 1, 2):
        return "another error"
    for words in ("internal error", "Traceback"):
        if words in outcome.said:
            return words
    if outcome.code and not outcome.said.strip():
        return "nothing was said"
    left = [path for path in home.rglob("*") if path.name.endswith((".partial", ".old"))]
    return f"left behind: {left[0].name}" if left else None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, metavar="N", help="seeds")
    parser.add_argument("--start", type=int, default=0, metavar="SEED", help="the first one")
    parser.add_argument("--readers", type=int, default=3, metavar="N", help="commands per seed")
    parser.add_argument("--show", action="store_true", help="print what each reader said")
    return parser.parse_args()


def script() -> int:
    options = arguments()
    faults: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="damaged-") as root:
        whole = Path(root) / "whole"
        whole.mkdir()
        build(whole)
        for seed in range(options.start, options.start + options.count):
            for result in one(seed, whole, Path(root) / str(seed), options.readers):
                codes[result.code] += 1
                if result.fault is not None:
                    faults[result.fault.partition(":")[0]] += 1
                if options.show or result.fault is not None or result.seconds > 20:
                    head = f"seed {seed}: {result.damage}: {result.reader}: {result.code} in {result.seconds:.1f} s"
                    print(f"{head}, {result.fault}\n{result.said}", flush=True)
    runs = sum(codes.values())
    print(
        f"{options.count} damaged homes, {runs} readers: " + ", ".join(f"exit {code}: {number}" for code, number in sorted(codes.items()))
    )
    print(
        ", ".join(
            f"{faults[name]} {name}"
            for name in ("Traceback", "internal error", "code was run", "left behind", "nothing was said", "another error")
        )
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(script())
