"""`matmorph.runtime.Generator`. Oracle: the definition in numpy (`tiny_decoder`), and transformers' `generate` and logits warpers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tiny_artifact import write_artifact
from tiny_decoder import EOS, NAMES, PAD, POSITIONS, SIZE, VOCAB, WIDTH, greedy, logits_of, write_decoder
from tiny_speaker import told

from matmorph.runtime import AdapterError, ArtifactError, ExecutionError, Generator, InputMismatch, PromptCache, Session
from matmorph.runtime.adapters import save_adapter
from matmorph.runtime.format.adapters import Slots
from matmorph.runtime.sampling import Sampler, Sampling, draw, probabilities

FORMS = ("growing", "shared")
ROWS = [[20, 14, 13, 8], [4, 9, 5, 20, 3, 11, 15], [12]]
"""Prompts whose greedy tokens are no near ties, which `greedy` asserts; the second one ends after a few tokens."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    place = tmp_path_factory.mktemp("decoders")
    return {form: write_decoder(place / form, shared=form == "shared") for form in FORMS}


@pytest.fixture(scope="module")
def generators(folders: Mapping[str, Path]) -> Mapping[str, Generator]:
    return {form: Generator(folder, ["cpu"], threads=1) for form, folder in folders.items()}


def cut(tokens: np.ndarray) -> list[list[int]]:
    """Rows up to their end token; what follows must be pads."""
    found = []
    for row in tokens.tolist():
        end = row.index(EOS) + 1 if EOS in row else len(row)
        assert set(row[end:]) <= {PAD}
        found.append(row[:end])
    return found


# ---- what is generated


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_any_length_answer_as_alone(form: str, generators: Mapping[str, Generator]) -> None:
    expected = [greedy(row, 14) for row in ROWS]
    assert len({len(row) for row in expected}) > 1  # rows end at different steps
    assert cut(generators[form].generate(ROWS, max_new_tokens=14, eos=EOS, pad=PAD)) == expected
    for row, tokens in zip(ROWS, expected, strict=True):
        assert generators[form].generate([row], max_new_tokens=14, eos=EOS).tolist() == [tokens]


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_the_last_place_alone(form: str, tmp_path: Path) -> None:
    generator = Generator(write_decoder(tmp_path / "d", shared=form == "shared", last_only=True), ["cpu"], threads=1)
    how: dict[str, Any] = {"max_new_tokens": 6, "eos": EOS, "pad": PAD}
    rows = ROWS if form == "growing" else [ROWS[0], ROWS[0][::-1]]
    assert cut(generator.generate(rows, **how)) == [greedy(row, 6) for row in rows]
    if form == "shared":
        with pytest.raises(InputMismatch, match="logits of the last place only, where shorter prompts have padding: give one at a time"):
            generator.stream(ROWS, **how)


@pytest.mark.parametrize("form", FORMS)
def test_several_end_tokens_and_none(form: str, generators: Mapping[str, Generator]) -> None:
    free = greedy(ROWS[0], 10, eos=())
    ends = [EOS, free[4]]
    assert generators[form].generate(ROWS[:1], max_new_tokens=10, eos=ends).tolist() == [greedy(ROWS[0], 10, ends)]
    assert generators[form].generate(ROWS[:1], max_new_tokens=10, eos=[]).tolist() == [free]


def test_a_stream_gives_a_token_of_each_row_as_it_comes(generators: Mapping[str, Generator]) -> None:
    expected = generators["growing"].generate(ROWS, max_new_tokens=6, eos=EOS, pad=PAD)
    stream = generators["growing"].stream(ROWS, max_new_tokens=6, eos=EOS, pad=PAD)
    first = next(stream)
    assert first.shape == (3,)
    assert np.array_equal(np.stack([first, *stream], 1), expected)


@pytest.mark.parametrize(("form", "side"), [("growing", "left"), ("growing", "right"), ("shared", "right")])
def test_a_mask_says_where_the_tokens_are(form: str, side: str, generators: Mapping[str, Generator]) -> None:
    ids, mask = np.full((3, 9), 7), np.zeros((3, 9), np.int64)
    for number, row in enumerate(ROWS):
        place = slice(0, len(row)) if side == "right" else slice(9 - len(row), 9)
        ids[number, place], mask[number, place] = row, 1
    found = generators[form].generate(ids, mask, max_new_tokens=8, eos=EOS, pad=PAD)
    assert cut(found) == [greedy(row, 8) for row in ROWS]


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_is_gone_on_with(form: str, generators: Mapping[str, Generator], monkeypatch: pytest.MonkeyPatch) -> None:
    generator, cache = generators[form], PromptCache()
    fed: list[int] = []
    feeds = generator._engine.feeds
    monkeypatch.setattr(generator._engine, "feeds", lambda ids, *rest: (fed.append(ids.shape[1]), feeds(ids, *rest))[1])

    def turn(row: list[int], new: int) -> list[int]:
        fed.clear()
        found: list[int] = generator.generate([row], max_new_tokens=new, eos=EOS, cache=cache)[0].tolist()
        return found

    row = ROWS[0]
    answer = turn(row, 3)
    assert answer == greedy(row, 3)
    assert cache.ids == (*row, *answer[:2])
    longer = [*row, *answer, 9, 8]
    assert turn(longer, 20) == greedy(longer, 20)  # more than the buffer had room for
    assert fed[1] == 3  # behind a check of the whole prompt's shapes: the last token of the answer and the two that are new
    assert turn(row, 3) == answer  # the same prompt again: one token is computed for its logits
    assert fed[1] == 1
    other = [*row[:2], 17, 6, 5]
    assert turn(other, 5) == greedy(other, 5)  # what differs is cut off
    assert fed[1] == 3
    assert turn([12], 4) == greedy([12], 4)


@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_answer_leaves_a_cache_that_can_be_used(form: str, generators: Mapping[str, Generator]) -> None:
    cache = PromptCache()
    stream = generators[form].stream([ROWS[0]], max_new_tokens=9, eos=EOS, cache=cache)
    begun = [int(next(stream)[0]) for _ in range(3)]
    stream.close()
    longer = [*ROWS[0], *begun, 5]
    assert generators[form].generate([longer], max_new_tokens=4, eos=EOS, cache=cache)[0].tolist() == greedy(longer, 4)


def test_threads_share_a_generator(generators: Mapping[str, Generator]) -> None:
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        found[number] = generators["shared"].generate([ROWS[number]], max_new_tokens=9, eos=EOS)[0].tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(3)] == [greedy(row, 9) for row in ROWS]


@pytest.mark.parametrize("form", FORMS)
def test_the_cache_is_not_copied_between_steps(form: str, generators: Mapping[str, Generator], monkeypatch: pytest.MonkeyPatch) -> None:
    """An array of the cache's size may come from numpy at the start only: buffers and empty pasts."""
    moved: list[int] = []
    made, read = onnxruntime.OrtValue.ortvalue_from_numpy, onnxruntime.OrtValue.numpy
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", lambda array, *rest: (moved.append(array.size), made(array, *rest))[1])
    monkeypatch.setattr(onnxruntime.OrtValue, "numpy", lambda self: (moved.append(1), read(self))[1])
    stream = generators[form].stream([ROWS[0]], max_new_tokens=9, eos=[])
    next(stream)
    moved.clear()
    assert len(list(stream)) == 8
    assert moved == []


# ---- adapters


def pair(rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((WIDTH, rank)).astype(np.float32) / 2, rng.standard_normal((rank, WIDTH)).astype(np.float32) / 2


@pytest.mark.parametrize("form", FORMS)
def test_adapters_are_switched_per_call(form: str, tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "d", shared=form == "shared", adapter=True)
    generator = Generator(folder, ["cpu"], threads=1)
    slots = Slots.from_dict(generator.manifest.adapters)
    loaded, expected = {}, {None: [greedy(row, 8) for row in ROWS]}
    for rank, seed in ((2, 1), (5, 3)):
        down, up = pair(rank, seed)
        save_adapter(tmp_path / f"{rank}", {"down": down, "up": up}, slots)
        loaded[rank] = generator.load_adapter(tmp_path / f"{rank}")
        expected[rank] = [greedy(row, 8, bias=down.astype(np.float64) @ up) for row in ROWS]
    assert expected[2] != expected[5] != expected[None] != expected[2]
    cache = PromptCache()
    for rank in (2, None, 5, 2):
        assert cut(generator.generate(ROWS, max_new_tokens=8, eos=EOS, pad=PAD, adapter=loaded.get(rank))) == expected[rank]
        one = generator.generate(ROWS[:1], max_new_tokens=8, eos=EOS, adapter=loaded.get(rank), cache=cache)
        assert one.tolist() == expected[rank][:1]  # what another adapter kept is not gone on with
    save_adapter(tmp_path / "other", {"down": pair(1, 1)[0], "up": pair(1, 1)[1]}, Slots("cd" * 32, slots.slots))
    with pytest.raises(AdapterError, match="made for another base"):
        generator.load_adapter(tmp_path / "other")
    foreign = write_decoder(tmp_path / "foreign", adapter=True, adapters={**slots.to_dict(), "fingerprint": "cd" * 32})
    with pytest.raises(AdapterError, match="made for another base"):
        Generator(foreign, ["cpu"]).generate([[3]], max_new_tokens=1, eos=EOS, adapter=loaded[2])


# ---- draws


SCORES = np.random.default_rng(0).standard_normal((40, 90)) * 3
DISTRIBUTIONS = [(t, k, p) for t in (0.3, 1.0, 2.5) for k in (None, 1, 7, 200) for p in (None, 0.05, 0.6, 0.95, 1.0)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), DISTRIBUTIONS)
def test_what_may_be_drawn_is_what_transformers_allows(temperature: float, top_k: int | None, top_p: float | None) -> None:
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.tensor(SCORES)
    expected = warpers.TemperatureLogitsWarper(temperature)(None, scores)
    expected = expected if top_k is None else warpers.TopKLogitsWarper(top_k)(None, expected)
    expected = expected if top_p is None else warpers.TopPLogitsWarper(top_p)(None, expected)
    shares = torch.softmax(expected, -1).numpy()
    found = np.stack([probabilities(row, Sampling(temperature, top_k, top_p)) for row in SCORES])
    assert np.array_equal(found > 0, shares > 0)
    np.testing.assert_allclose(found, shares, rtol=1e-12, atol=1e-15)  # float64, sums of 90 terms


def test_draws_have_the_probabilities() -> None:
    shares = probabilities(SCORES[0][:6], Sampling(2.0))
    rng = np.random.default_rng(1)
    counts = np.bincount([draw(shares, rng) for _ in range(20_000)], minlength=6)
    deviation = np.sqrt(20_000 * shares * (1 - shares))
    assert (np.abs(counts - 20_000 * shares) < 4 * deviation).all()  # one in 2 600 falls outside by chance, and the seed is fixed
    assert {draw(np.array([0.0, 1.0, 0.0]), rng) for _ in range(50)} == {1}


def test_a_seed_decides_the_draws(generators: Mapping[str, Generator]) -> None:
    how: dict[str, Any] = {"max_new_tokens": 8, "eos": [], "temperature": 3.0, "top_k": 9, "top_p": 0.9}
    two = [ROWS[0], ROWS[0]]
    first = generators["growing"].generate(two, seed=4, **how)
    assert np.array_equal(generators["growing"].generate(two, seed=4, **how), first)
    assert np.array_equal(generators["shared"].generate(two[:1], seed=4, **how), first[:1])  # alone and in company
    assert first[0].tolist() != first[1].tolist()
    assert not np.array_equal(generators["growing"].generate(two, seed=5, **how), first)


def test_ties_go_to_the_first_and_odd_logits_are_refused() -> None:
    assert Sampler(Sampling(), 2).next(np.array([[1.0, 3, 3], [3, 1, 3]], np.float32)).tolist() == [1, 0]
    for sampling in (Sampling(), Sampling(1.0)):
        for odd in (np.nan, np.inf):
            with pytest.raises(ExecutionError, match="not finite"):
                Sampler(sampling, 1).next(np.array([[1.0, odd, 0.0]], np.float32))


# ---- bad input


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("ids", "more", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[]], {}, "prompt 0 is empty"),
        ([3, 4], {}, r"one prompt is a list with one list: \[\[1, 2, 3\]\]"),
        ("text", {}, "expected lists of token ids, got str"),
        ([[3, 4.5]], {}, r"ids\[0\]: expected whole numbers"),
        (np.ones((1, 2, 3), np.int64), {}, "of 2 dimension"),
        ([[3, VOCAB]], {}, rf"prompt 0 has the token id {VOCAB}; the model takes 0 to {VOCAB - 1}"),
        ([[3], [-1]], {}, "prompt 1 has the token id -1"),
        ([[3], [4, 5]], {"eos": []}, "prompts of different length need a pad token"),
        ([[3]], {"eos": None}, "the folder names no end token: give eos="),
        ([[3]], {"eos": VOCAB}, f"eos is {VOCAB}, no token id of this model"),
        ([[3]], {"pad": -1}, "pad is -1, no token id"),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[3] * 40], {"max_new_tokens": 9}, f"40 tokens and 9 new ones are 49; the model has positions for {POSITIONS}"),
        ([[3]], {"temperature": -1.0}, "temperature is -1"),
        ([[3]], {"temperature": float("nan")}, "temperature is nan"),
        ([[3]], {"top_k": 3}, "temperature 0 draws nothing: set a temperature"),
        ([[3]], {"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ([[3]], {"temperature": 1.0, "top_p": 0.0}, "top_p is 0"),
        ([[3]], {"seed": -1}, "seed is -1"),
        ([[3], [4]], {"cache": PromptCache()}, "a cache keeps one sequence, and there are 2 prompts"),
        ([[3, 4]], {"mask": [[1]]}, r"mask: expected the shape of ids \(1, 2\), got \(1, 1\)"),
        ([[3, 4]], {"mask": [[1, 2]]}, "mask: expected 1 at tokens and 0 at padding"),
        ([[3, 4, 5]], {"mask": [[1, 0, 1]]}, "row 0 has padding between its tokens"),
        ([[3, 4], [5]], {"mask": [[1, 1], [1, 0]]}, r"with a mask, ids and mask are arrays"),
    ],
)
def test_what_cannot_be_generated_is_refused(form: str, ids: Any, more: dict[str, Any], message: str, generators: Any) -> None:
    with pytest.raises(InputMismatch, match=message):
        generators[form].stream(ids, **{"max_new_tokens": 4, "eos": EOS, **more})


def test_padding_on_the_wrong_side_is_refused(folders: Mapping[str, Path], generators: Mapping[str, Generator]) -> None:
    ids, mask = np.array([[3, 4], [0, 5]]), np.array([[1, 1], [0, 1]])
    with pytest.raises(InputMismatch, match="row 1 of the mask begins with padding; this model takes padding behind the tokens"):
        generators["shared"].generate(ids, mask, max_new_tokens=2, eos=EOS)
    past = {name: np.zeros((2, 2, 0, SIZE), np.float32) for name in NAMES[0]}
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.array([[0, 1], [0, 0]]), **past}
    with pytest.raises(InputMismatch, match="row 1 of the mask begins with padding"):
        generators["shared"].session.run(feeds)
    answer = Session(folders["growing"], ["cpu"]).run(feeds)["logits"]
    np.testing.assert_allclose(answer[1, 1], logits_of([5])[0], rtol=1e-4)  # float32 sums of 16 terms; any side is right there


def test_a_cache_belongs_to_its_generator(generators: Mapping[str, Generator]) -> None:
    cache = PromptCache()
    generators["growing"].generate([[3, 4]], max_new_tokens=2, eos=EOS, cache=cache)
    with pytest.raises(InputMismatch, match="filled by another generator"):
        generators["shared"].generate([[3, 4]], max_new_tokens=2, eos=EOS, cache=cache)


def test_a_model_without_a_cache_does_not_generate(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="keeps no key/value cache; compile it with one"):
        Generator(write_artifact(tmp_path / "plain"), ["cpu"])


CACHE = {"padding": "any", "share_buffer": False, "max_length": None, "bytes_per_token": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": {**CACHE, "slots": [{"past": "past.kay", "present": NAMES[1][0], "axis": 2}]}}, "takes past.key, past.value too"),
        (
            {"cache": {**CACHE, "slots": [{"past": p, "present": "logits", "axis": 2} for p in NAMES[0]]}},
            "logits: .* cannot go where past.key",
        ),
        ({"cache": {**CACHE, "slots": [{"past": p, "present": n, "axis": 9} for p, n in zip(*NAMES, strict=True)]}}, "has no axis 9"),
        ({"cache": {**CACHE, "slots": [{"past": p, "present": n, "axis": 3} for p, n in zip(*NAMES, strict=True)]}}, "cannot go where"),
        ({"cache": {**CACHE, "slots": [{"past": p, "present": "new", "axis": 2} for p in NAMES[0]]}}, "the cache's new is no output"),
        ({"cache": {**CACHE, "slots": [], "padding": "left"}}, "padding: unexpected value 'left'"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        Generator(write_decoder(tmp_path / "d", **changes), ["cpu"])


# ---- end and pad tokens of the folder


@pytest.mark.parametrize(
    ("files", "eos", "pad"),
    [
        ({}, None, None),
        ({"config.json": {"eos_token_id": 5}}, (5,), None),
        ({"config.json": {"eos_token_id": 5, "pad_token_id": 1}, "generation_config.json": {"eos_token_id": [6, 7]}}, (6, 7), 1),
        ({"config.json": {"text_config": {"eos_token_id": 4}, "pad_token_id": -1}}, (4,), None),
        ({"genai_config.json": {"model": {"eos_token_id": [9], "pad_token_id": 0}}, "config.json": {"eos_token_id": None}}, (9,), 0),
    ],
)
def test_end_and_pad_tokens_are_the_folders(files: dict[str, Any], eos: Any, pad: int | None, tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "d")
    told(folder, files)
    special = Generator(folder, ["cpu"]).special
    assert (special.eos, special.pad) == (eos, pad)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos_token_id": "2"}', "generation_config.json: eos_token_id: unexpected value '2'"),
        ("[]", "generation_config.json: the file: unexpected value"),
        ("{", "generation_config.json: cannot be read"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(text: str, message: str, tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "d")
    told(folder, {"generation_config.json": text})
    with pytest.raises(ArtifactError, match=message):
        Generator(folder, ["cpu"])


def test_a_changed_configuration_is_refused(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "d")
    told(folder, {"config.json": {"eos_token_id": 5}})
    (folder / "config.json").write_text('{"eos_token_id": 6}')
    with pytest.raises(ArtifactError, match=r"config.json: was changed"):
        Generator(folder, ["cpu"])
    assert Generator(folder, ["cpu"], verify=False).special.eos == (6,)
