"""`tolerance:` and `strict:` on outcomes made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from matmorph.errors import CheckError, Position, SpecError
from matmorph.ir.site import Reject
from matmorph.passes.rewriting.rewrite import Outcome
from matmorph.passes.rewriting.tolerance import hold, refuse_rejects, refuse_unmeasured
from matmorph.specs.schema import Tolerance

AT = Position("s.yaml", 9, 12)
RULE: Any = SimpleNamespace(name="blocks", at=Position("s.yaml", 4, 5))


def outcome(path: str, weight: float | None = None, output: float | None = None, reject: str | None = None) -> Outcome:
    site: Any = SimpleNamespace(path=path, applications=(None,))
    return Outcome(site, RULE, Reject(reject) if reject else None, weight_error=weight, output_error=output)


FOUND = (
    outcome("a", 0.10, 0.02),
    outcome("b", 0.30, 0.01),
    outcome("c", 0.25, 0.20),
    outcome("d", reject="does not pay"),
)


def test_no_tolerance_holds_everything() -> None:
    assert hold(FOUND, None) == (FOUND, ())


def test_a_limit_that_holds_changes_nothing() -> None:
    """An error equal to its limit holds."""
    assert hold(FOUND, Tolerance(weight_error=0.30, output_error=0.20)) == (FOUND, ())


def test_fail_names_the_worst_and_the_others() -> None:
    with pytest.raises(CheckError) as caught:
        hold(FOUND, Tolerance(weight_error=0.2, at=AT))
    assert caught.value.exit_code == 1
    assert caught.value.message == "b: weight_error 0.3 exceeds 0.2"
    assert caught.value.details == (
        "c: weight_error 0.25 exceeds 0.2",
        "limit at s.yaml:9:12",
        "on_exceed: roll_back leaves such sites dense",
    )


def test_the_worst_is_the_one_that_exceeds_its_limit_most() -> None:
    """c exceeds its output limit 4 times, b its weight limit 1.5 times."""
    with pytest.raises(CheckError) as caught:
        hold(FOUND, Tolerance(weight_error=0.2, output_error=0.05))
    assert caught.value.message == "c: output_error 0.2 exceeds 0.05"
    assert caught.value.details == ("b: weight_error 0.3 exceeds 0.2",)


def test_a_long_list_is_cut() -> None:
    many = [outcome(f"s{index}", weight=1 + index / 10) for index in range(10)]
    with pytest.raises(CheckError) as caught:
        hold(many, Tolerance(weight_error=0.5))
    assert caught.value.message.startswith("s9: ")
    assert [line.split(":")[0] for line in caught.value.details] == ["s8", "s7", "s6", "s5", "s4", "and 4 more"]


def test_roll_back_rejects_with_the_reason_and_keeps_the_rest() -> None:
    kept, notes = hold(FOUND, Tolerance(weight_error=0.2, output_error=0.05, on_exceed="roll_back"))
    assert kept[0] is FOUND[0]
    assert kept[3] is FOUND[3]
    assert [found.reject.reason for found in kept if found.reject] == [
        "rolled back: weight_error 0.3 exceeds 0.2",
        "rolled back: output_error 0.2 exceeds 0.05",
        "does not pay",
    ]
    assert all(found.weight_error is None and found.nodes is None and not found.consts for found in kept[1:])
    assert notes == ("c rolled back: output_error 0.2 exceeds 0.05", "b rolled back: weight_error 0.3 exceeds 0.2"), "the worst first"


def test_an_error_that_nothing_measured() -> None:
    with pytest.raises(SpecError) as caught:
        hold([outcome("a", weight=0.1)], Tolerance(output_error=0.1, at=AT))
    assert caught.value.headline() == "s.yaml:9:12: tolerance.output_error: output_error of a was not measured"


def test_a_limit_on_output_errors_needs_data() -> None:
    refuse_unmeasured(None)
    refuse_unmeasured(Tolerance(weight_error=0.1))
    with pytest.raises(SpecError) as caught:
        refuse_unmeasured(Tolerance(output_error=0.1, at=AT))
    assert caught.value.headline().startswith("s.yaml:9:12: tolerance.output_error: a limit on output errors needs calibration data")


def test_strict_turns_rejects_into_errors() -> None:
    refuse_rejects(FOUND, strict=False)
    refuse_rejects(FOUND[:3], strict=True)
    with pytest.raises(SpecError) as caught:
        refuse_rejects([*FOUND, outcome("e", reject="too small")], strict=True)
    assert caught.value.headline() == "s.yaml:4:5: strict: rule blocks cannot rewrite d: does not pay"
    assert caught.value.details == ("e: too small",)
    assert caught.value.exit_code == 2
