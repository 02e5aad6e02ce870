"""Mutants themselves, on a package of a few lines: what an edit changes, what it says where it no longer fits, that files may move."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from definitions import NotOneDefinition, home, homes, imports, modules
from mutating import Mutant, killer, mutated, unmutated

FILES = {
    "__init__.py": "",
    "costs.py": "TABLE = {'a': 1, 'b': 2}\n\n\ndef price(n, *, twice=False):\n    total = n + n\n    return total * (2 if twice else 1)\n",
    "rooms/__init__.py": "OPEN = 1\n",
    "rooms/shop.py": (
        "from birds.costs import TABLE, price\nfrom birds.rooms import OPEN, words\n\n\nclass Shop:\n    limit = 5\n\n"
        "    def sell(self, n):\n        if (n >\n                self.limit):\n            raise ValueError(words.told('too \"many\"'))\n"
        "        return price(n, twice=True) + TABLE['a']\n"
    ),
    "rooms/words.py": "def told(text):\n    return text.title()\n\n\ndef price():\n    return 'cheap'\n\n\nseen = True\n",
    "street.py": "from birds.rooms.shop import Shop\n\n\ndef walk(n):\n    return Shop().sell(n)\n\n\nseen = True\n",
}


@pytest.fixture
def birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of four modules; gone afterwards, with all that was read of it."""
    for name, text in FILES.items():
        (tmp_path / "birds" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "birds" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "birds"
    for name in [name for name in sys.modules if name.partition(".")[0] == "birds"]:
        del sys.modules[name]
    for read in (homes, imports, modules):
        read.cache_clear()


def walked(mutant: Mutant, n: int = 3) -> int:
    with mutated(mutant, "birds") as m:
        return m.walk(n)


@pytest.mark.parametrize(("mutant", "value"), [
    (Mutant("costs.price", "n+n", "n"), 7),
    (Mutant("Shop.sell", "twice = True", "twice=False"), 7),
    (Mutant("Shop.sell", "n > self.limit", "False"), 13),  # over two lines, in brackets
    (Mutant("Shop.sell", "return price(n, twice=True) + TABLE[\"a\"]", "return n"), 3),
    (Mutant("costs.price", "total = n + n\nreturn total * (2 if twice else 1)", "return 1"), 2),
    (Mutant("costs.price", "total = n + n", "total = n"), 7),
    (Mutant("costs.price", "twice", "not twice", nth=1), 7),
    (Mutant("Shop.sell", "n", "0", nth=2), 1),
    (Mutant("Shop.sell", "n", "0", nth=1), 13),
    (Mutant("price", "n + n", "n"), 7),  # another module has a price too, in which nothing reads like it
    (Mutant("costs.TABLE", "1", "10"), 22),
    (Mutant("Shop.limit", "5", "3"), 13),
    (Mutant("Shop", "TABLE['a']", "0"), 12),
])  # fmt: skip
@pytest.mark.usefixtures("birds")
def test_an_edit_changes_what_imports_it(mutant: Mutant, value: int) -> None:
    assert walked(Mutant("walk", "n", "n"), 3) == 13
    assert walked(mutant) == value
    assert walked(Mutant("walk", "n", "n"), 3) == 13


@pytest.mark.parametrize(("mutant", "message"), [
    (Mutant("Shop.sell", "n < self.limit", "False"), r"no longer fits: of 'n < self\.limit', Shop\.sell has none"),
    (Mutant("costs.price", "n", "1"), r"of 'n', costs\.price has 2 in birds\.costs"),
    (Mutant("costs.price", "n", "1", nth=3), r"costs\.price has 2 in birds\.costs"),
    (Mutant("costs.price", "n", "1", nth=0), r"costs\.price has 2 in birds\.costs"),
    (Mutant("price", "'cheap'", "1", nth=2), r"price has 1 in birds\.rooms\.words"),
    (Mutant("seen", "True", "False"), r"seen has 1 in birds\.rooms\.words and 1 in birds\.street"),
    (Mutant("Shop.sell", "n + n", "n"), r"Shop\.sell has none"),  # it stands in another definition
    (Mutant("costs.price", "thrice=True", "thrice=False"), "has none"),
    (Mutant("costs.price", "pass", "return 0"), "has none"),
])  # fmt: skip
@pytest.mark.usefixtures("birds")
def test_a_mutant_that_no_longer_fits_says_so(mutant: Mutant, message: str) -> None:
    with pytest.raises(AssertionError, match=message), mutated(mutant, "birds"):
        pass


@pytest.mark.parametrize(("name", "message"), [
    ("price", r"birds has 2 definitions called price: birds\.costs, birds\.rooms\.words"),
    ("sell", "birds has no definition called sell"),
    ("Shop.buy", "has no definition called Shop"),
    ("birds.price", "has 2 definitions"),
])  # fmt: skip
@pytest.mark.usefixtures("birds")
def test_a_name_is_that_of_one_definition(name: str, message: str) -> None:
    with pytest.raises(NotOneDefinition, match=message):
        home(name, "birds")


def named(*names: str) -> list[ModuleType]:
    return [importlib.import_module(f"birds.{name}") for name in names]


@pytest.mark.usefixtures("birds")
def test_only_what_depends_on_the_mutant_is_loaded_anew_and_the_real_ones_are_back() -> None:
    names = ("costs", "rooms.shop", "rooms.words", "street")
    real = named(*names)
    with mutated(Mutant("Shop.limit", "5", "3"), "birds") as m:
        assert [one is other for one, other in zip(named(*names), real, strict=True)] == [True, False, True, True]
        assert m.Shop is not real[1].Shop
        assert m.told is real[2].told
        assert named("street") == real[3:]  # nobody has asked for it yet
        assert m.walk is not real[3].walk
        assert named("street")[0].walk is m.walk
        assert m["words.price"]() == "cheap"
        m.put("words.price", lambda: "dear")
        assert m["words.price"]() == real[2].price() == "dear"
        with pytest.raises(AttributeError):
            m.walk = None
        from birds import rooms

        assert rooms.shop.Shop is m.Shop
    assert named(*names) == real
    assert real[2].price() == "cheap"
    assert sys.modules["birds.rooms"].shop is real[1]


@pytest.mark.usefixtures("birds")
def test_a_module_that_was_first_imported_with_a_mutant_does_not_stay() -> None:
    named("costs")
    with mutated(Mutant("costs.TABLE", "1", "10"), "birds"):
        assert named("street")[0].walk(3) == 22
    assert "birds.street" not in sys.modules
    for name in [name for name in sys.modules if name.startswith("birds.rooms")]:
        del sys.modules[name]
    with mutated(Mutant("OPEN", "1", "2"), "birds"):
        assert named("rooms.shop")[0].OPEN == named("rooms")[0].OPEN == 2
    assert {"birds.rooms", "birds.rooms.shop"}.isdisjoint(sys.modules)
    assert named("street")[0].walk(3) == 13


def test_a_definition_that_moved_is_still_found(birds: Path) -> None:
    mutants = (Mutant("Shop.sell", "n > self.limit", "False"), Mutant("shop.Shop.limit", "5", "3"))
    (birds / "rooms" / "shop").mkdir()
    (birds / "rooms" / "shop.py").rename(birds / "rooms" / "shop" / "selling.py")
    (birds / "street.py").write_text(FILES["street.py"].replace("rooms.shop", "rooms.shop.selling"))
    assert [walked(mutant, 2) for mutant in mutants] == [9, 9]
    assert walked(mutants[0], 6) == 25
    assert home("Shop", "birds") == ("birds.rooms.shop.selling", "Shop")


@pytest.mark.usefixtures("birds")
def test_a_check_that_fails_kills() -> None:
    def same_price(m: object) -> None:
        assert m.walk(3) == 13  # type: ignore[attr-defined]

    def too_many(m: object) -> None:
        with pytest.raises(ValueError, match='Too "Many"'):
            m.walk(6)  # type: ignore[attr-defined]

    mutants = (Mutant("costs.price", "n + n", "n"), Mutant("Shop.limit", "5", "7"), Mutant("told", "text.title()", "text"))
    checks = (same_price, too_many)
    assert [killer(mutated(mutant, "birds"), checks) for mutant in mutants] == ["same_price", "too_many", "too_many"]
    assert killer(mutated(Mutant("Shop.limit", "5", "4"), "birds"), checks) is None
    assert killer(unmutated(mutants, "birds"), checks) is None


def test_unmutated_code_is_loaded_anew() -> None:
    from matmorph.passes.linalg.modes import Modes, factors

    with unmutated([Mutant("modes.factors", "1 if ones else 2", "1")]) as m:
        assert m.Modes is not Modes
        assert m["modes.factors"](4096, 3) == factors(4096, 3) == (16, 16, 16)
