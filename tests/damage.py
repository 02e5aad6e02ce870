"""Damage on purpose, counted: compiles that are killed and interrupted at any moment, and specs with any change.

    python tests/damage.py --kills 100 --interrupts 50 --specs 10000

A compile is a forked child, so that torch is imported once. What must hold: an artefact that was there is whole afterwards, under its name
or where the next run brings it back from; a folder that appears is whole; nothing half-written outlasts the next run; one line is said.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

MODEL = """
import torch
import matmorph as mm

def make():
    torch.manual_seed(0)
    return mm.Model(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)), (torch.ones(3, 8),))
"""
SPEC = "version: 1\nrules:\n  - match: {op: linear}\n    rewrite: {low_rank: {rank: 2}}\n"


@dataclass
class Child:
    """A command line in a process of its own, its stderr in a file."""

    pid: int
    said: Path

    def wait(self) -> int:
        """The exit code, minus the signal where one ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def errors(self) -> str:
        return self.said.read_text(encoding="utf-8")


def start(work: Callable[[], object], folder: Path) -> Child:
    """Forks; the child does the work in `folder` and ends as `work` says (SystemExit)."""
    said = folder / "stderr.txt"
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the command line itself runs
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return Child(pid, said)
    code = 70
    try:
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        null = os.open(os.devnull, os.O_RDWR)
        errors = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(errors, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


@dataclass
class Counts:
    """What happened, and what must not have."""

    codes: Counter[int] = field(default_factory=Counter)
    tracebacks: int = 0
    internal: int = 0
    lines: int = 0
    lost: int = 0
    half: int = 0
    left: int = 0

    @property
    def clean(self) -> bool:
        return not (self.tracebacks or self.internal or self.lost or self.half or self.left or self.lines)

    def __str__(self) -> str:
        codes = ", ".join(f"{number} x exit {code}" for code, number in sorted(self.codes.items()))
        return (
            f"{codes}; {self.tracebacks} tracebacks, {self.internal} internal errors, {self.lines} with more than one line, "
            f"{self.lost} lost folders, {self.half} half-written folders, {self.left} leftovers after the next run"
        )


def whole(folder: Path) -> bool:
    """Whether every file is as the manifest says."""
    from matmorph.runtime.check import check

    return folder.is_dir() and not [problem for problem in check(folder, ["cpu"]).problems]


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".out")]


def compile_once(out: str, force: bool, rank: int) -> None:
    """The command line itself."""
    from matmorph.__main__ import run

    Path("spec.yaml").write_text(SPEC.replace("rank: 2", f"rank: {rank}"), encoding="utf-8")
    arguments = ["compile", "made:make", "--spec", "spec.yaml", "--out", out, *(["--force"] if force else [])]
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        run(arguments)
    except KeyboardInterrupt:  # before it began
        sys.exit(130)


def ended(number: int, signal_number: int, seed: int, folder: Path, within: float) -> Counts:
    """Compiles that get the signal at a random moment, in turn over an artefact that is there and to a new name, until it has ended
    `number` of them; others were done before."""
    draw = random.Random(seed)
    counts = Counts()
    (folder / "made.py").write_text(MODEL, encoding="utf-8")
    start(lambda: compile_once("out", False, 1), folder).wait()
    for turn in range(5 * number):
        if sum(times for code, times in counts.codes.items() if code) >= number:
            break
        fresh = turn % 2 == 1
        child = start(lambda: compile_once("out-new" if fresh else "out", not fresh, 1 + turn % 3), folder)  # noqa: B023 - runs at once
        time.sleep(draw.uniform(0, within))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal_number)
        counts.codes[child.wait()] += 1
        said = child.errors()
        counts.tracebacks += "Traceback" in said
        counts.internal += "internal error" in said
        counts.lines += len(said.splitlines()) > 1
        if fresh:
            counts.half += (folder / "out-new").exists() and not whole(folder / "out-new")
            os.system(f"rm -rf {folder}/out-new")
        aside = [folder / name for name in leftovers(folder) if name.endswith(".old")]
        counts.lost += not (whole(folder / "out") or any(map(whole, aside)))
    for out, force in (("out", True), ("out-new", False)):
        start(lambda: compile_once(out, force, 1), folder).wait()  # noqa: B023
        counts.left += not whole(folder / out)
    counts.left += len(leftovers(folder))
    return counts


# ---- specs


def mutate(text: str, draw: random.Random) -> bytes:
    """The spec with one to four changes: bytes, keys, types, depth, anchors, numbers, characters."""
    data = text.encode()
    for _ in range(draw.randint(1, 4)):
        data = draw.choice(MUTATIONS)(data, draw)
    return data


def _byte(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return draw.choice((data[:at] + data[at + 1 :], data[:at] + bytes([draw.randrange(256)]) + data[at:], data[:at] + b"\n" + data[at:]))


def _swap_words(data: bytes, draw: random.Random) -> bytes:
    import re

    words = list(re.finditer(rb"[\w.%]+", data))
    if len(words) < 2:
        return data
    one, other = sorted(draw.sample(words, 2), key=lambda found: found.start())
    return data[: one.start()] + other[0] + data[one.end() : other.start()] + one[0] + data[other.end() :]


def _value(data: bytes, draw: random.Random) -> bytes:
    """A value of another type, or out of all bounds."""
    import re

    values = list(re.finditer(rb"(?<=: )[^\n,{}\[\]]+", data))
    if not values:
        return data
    found = draw.choice(values)
    return data[: found.start()] + draw.choice(VALUES) + data[found.end() :]


def _line(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    line = lines[at]
    lines[at : at + 1] = draw.choice(([], [line, line], [b"  " + line], [line.lstrip()], [b"- " + line], [b"\t" + line]))
    return b"\n".join(lines)


def _nested(data: bytes, draw: random.Random) -> bytes:
    depth = draw.choice((3, 70, 3000))
    opening, closing = draw.choice(((b"[", b"]"), (b"{not: ", b"}"), (b"{any_of: [", b"]}")))
    return _placed(data, opening * depth + b"x" + closing * draw.choice((depth, depth - 1)), draw)


def _alias(data: bytes, draw: random.Random) -> bytes:
    bomb = b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c, *%c]\n" % (k + 1, k + 1, k, k, k) for k in range(97, 97 + 20))
    return draw.choice((data.replace(b": ", b": &q ", 1) + b"\nx: *q\n", data + bomb, _placed(data, b"*nothing", draw), b"&r " + data))


def _placed(data: bytes, piece: bytes, draw: random.Random) -> bytes:
    at = draw.choice([k for k in range(len(data) + 1) if k == len(data) or data[k : k + 1] in b"\n ,:"])
    return data[:at] + b" " + piece + data[at:]


def _unicode(data: bytes, draw: random.Random) -> bytes:
    piece = draw.choice(("\u202e", "\ufeff", "\x1b[31m", "é", "\u2028", "\U0001d7d9", "\x00", "\ud7ff", "ß" * 100)).encode()
    return draw.choice((_placed(data, piece, draw), piece + data, data.decode("utf-8", "replace").encode("utf-16")))


VALUES = (
    *(b"null true -1 0 1e400 .nan 10000000000000000000000000 0x10 1_0 ~ [] {} auto 1..2 3..1 **.** re:( re:(a+)+$ {q,v} ''".split()),
    b'"' + b"9" * 5000 + b'"',
    b"9" * 5000,
    b"-" + b"9" * 400 + b"." + b"9" * 400,
    b"x" * 300_000,
    b"!!python/object/apply:os.system [echo]",
    b"[1, [2, [3]]]",
    b"{energy: 0.9, ratio: 0.5}",
    b"|\n   g = matmul(x)\n   h = g(",
)
MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_byte, _byte, _swap_words, _swap_words, _value, _value, _value, _line, _line),
    *(_nested, _alias, _unicode),
)

SLOW_S = 2.0
"""Of the process: a spec is read in hundredths of a second, one of 10 000 values in less than this."""


@dataclass
class SpecCounts:
    """Outcomes of loads."""

    fine: int = 0
    refused: int = 0
    placeless: list[str] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    longest: float = 0.0

    @property
    def clean(self) -> bool:
        return not (self.placeless or self.raised or self.slow)

    def __str__(self) -> str:
        return (
            f"{self.fine} specs, {self.refused} refused with a position, {len(self.placeless)} without one, "
            f"{len(self.raised)} other errors, {len(self.slow)} above {SLOW_S:g} s (longest {self.longest:.2f} s)"
        )


def fuzz_specs(numbers: Iterable[int], folder: Path) -> SpecCounts:
    """Mutated library specs, each from its own seed, loaded from a file."""
    from matmorph.errors import SpecError
    from matmorph.spec import load_spec
    from matmorph.specs.load import library_names, library_text

    texts = [library_text(name) for name in library_names()]
    counts, file = SpecCounts(), folder / "mutated.yaml"
    for number in numbers:
        draw = random.Random(number)
        file.write_bytes(mutate(draw.choice(texts), draw))
        began = time.process_time()  # the machine may do something else
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                load_spec(file)
            counts.fine += 1
        except SpecError as error:
            counts.refused += 1
            if error.at is None or len(str(error)) > 4000:
                counts.placeless.append(f"seed {number}: {str(error)[:200]}")
        except BaseException as error:
            counts.raised.append(f"seed {number}: {type(error).__name__}: {str(error)[:200]}")
        seconds = time.process_time() - began
        counts.longest = max(counts.longest, seconds)
        if seconds > SLOW_S:
            counts.slow.append(f"seed {number}: {seconds:.1f} s")
    return counts


def prepared(folder: Path) -> float:
    """Imports what a compile imports, so that no child has to; a little more than the seconds that one takes then."""
    import importlib

    (folder / "made.py").write_text(MODEL, encoding="utf-8")

    def listed() -> None:
        try:
            compile_once("first", False, 1)
        finally:
            (folder / "modules").write_text("\n".join(sys.modules), encoding="utf-8")

    start(listed, folder).wait()
    for name in (folder / "modules").read_text(encoding="utf-8").splitlines():
        if name not in ("__main__", "made"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    began = time.perf_counter()
    start(lambda: compile_once("timed", False, 1), folder).wait()
    return 1.1 * (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills, interrupts and mutated specs, counted.")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--interrupts", type=int, default=0)
    parser.add_argument("--specs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    clean = True
    with tempfile.TemporaryDirectory() as place:
        if given.kills or given.interrupts:
            within = prepared(Path(place))
        for name, number, what in (("kills", given.kills, signal.SIGKILL), ("interrupts", given.interrupts, signal.SIGINT)):
            if number:
                folder = Path(place) / name
                folder.mkdir()
                counts = ended(number, what, given.seed, folder, within)
                print(f"{number} {name} within {within:.1f} s: {counts}", flush=True)
                clean &= counts.clean
        if given.specs:
            found = fuzz_specs(range(given.seed, given.seed + given.specs), Path(place))
            print(f"{given.specs} mutated specs: {found}", flush=True)
            for line in (*found.placeless, *found.raised, *found.slow):
                print(f"  {line}")
            clean &= found.clean
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
