"""Loading specs: every error with its exact text, extends, stages, and the resolved form."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from spec_methods import METHODS, LoraSpec, LowRankSpec, Modes, NoSettings

from matmorph.errors import Position, SpecError
from matmorph.optimizers import Lion
from matmorph.passes.methods import method_table
from matmorph.specs.dump import dump_resolved
from matmorph.specs.load import library_names, library_text, load_spec
from matmorph.specs.schema import Calibration, Export, MethodUse, Optimizer, ParameterSelector, Pays, Rank, Spec, Tolerance, Train

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes files below the current folder, so that a spec is given, and shown, as `specs/a.yaml`."""
    monkeypatch.chdir(tmp_path)

    def files(**texts: str) -> Path:
        for name, text in texts.items():
            path = Path("specs") / f"{name}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path

    return files


def load(text: str, write: Write) -> Spec:
    write(a=text)
    return load_spec("specs/a.yaml", METHODS)


RULES = """\
version: 1
rules:
  - name: mlp
    match: {role: "mlp.*"}
    rewrite:
      low_rank:
        rank: 4
"""
"""A spec to which tests add a line: its last line is line 7, and its settings are indented by eight."""

SETTINGS = "keys here: rank, whiten, damping, solver, multiple_of, min, max"
RANK = "rules[0].rewrite.low_rank.rank"


def rewrite(text: str) -> str:
    """A spec whose rule has this rewrite; it begins at 4:14."""
    return f"version: 1\nrules:\n  - match: {{op: matmul}}\n    rewrite: {text}\n"


A_BUDGET = "\n  for instance, at the top of the spec: budget: {parameters: 60%, of: matched}"
ERRORS = [
    # keys
    (RULES + "        rnak: 4\n", "specs/a.yaml:8:9: rules[0].rewrite.low_rank.rnak: unknown key; did you mean rank?\n  " + SETTINGS),
    (RULES + "        zzz: 4\n", "specs/a.yaml:8:9: rules[0].rewrite.low_rank.zzz: unknown key\n  " + SETTINGS),
    (RULES + "sed: 1\n", "specs/a.yaml:8:1: sed: unknown key; did you mean seed?\n  keys here: version, name, extends, select, rules, "
                         "stages, budget, tolerance, calibration, export, train, seed, strict"),
    (RULES + "    optionl: true\n", "specs/a.yaml:8:5: rules[0].optionl: unknown key; did you mean optional?\n"
                                    "  keys here: match, rewrite, name, expect, optional, force, pays, untie"),
    (RULES + "export: {opst: 21}\n", "specs/a.yaml:8:10: export.opst: unknown key; did you mean opset?\n"
                                     "  keys here: opset, precision, target, tokens, activations, codebook, adapters, logits, fuse, "
                                     "attention, cache"),
    (RULES + "seed: 1\nseed: 2\n", "specs/a.yaml:9:1: seed: duplicate key; it is already given at specs/a.yaml:8:1"),
    ("rules: []\n", "specs/a.yaml:1:1: version is missing; this is version: 1 of the spec language"),
    ("version: 2\n", "specs/a.yaml:1:10: version: expected 1, got 2"),
    ("version: 1\n", "specs/a.yaml:1:1: rules is missing; a spec has rules, or stages with rules"),
    ("version: 1\nrules: []\n", "specs/a.yaml:2:8: rules: expected a list of at least 1, got an empty list"),
    ("version: 1\nrules: {a: 1}\n", "specs/a.yaml:2:8: rules: expected a list (each a mapping with match, rewrite), got a mapping with a"),
    ("version: 1\nrules:\n", "specs/a.yaml:2:7: rules: expected a list (each a mapping with match, rewrite), got nothing"),
    ("version: 1\nrules: [x]\n", "specs/a.yaml:2:9: rules[0]: expected a mapping with match, rewrite, got x"),
    ("version: 1\nrules:\n  - match: {op: matmul}\n", "specs/a.yaml:3:5: rules[0]: rewrite is missing\n"
     "  rewrite: a method, a list of methods (a replacing one first), any_of, or keep"),
    ("version: 1\nrules:\n  - rewrite: keep\n", "specs/a.yaml:3:5: rules[0]: match is missing\n"
     "  match: conditions that all hold for a site of this rule"),
    ("version: 1\nrules:\n  - match: x\n    rewrite: keep\n",
     "specs/a.yaml:3:12: rules[0].match: expected a mapping of conditions, got x"),
    (RULES + "stages: [{name: s, rules: [{match: {op: matmul}, rewrite: keep}]}]\n",
     "specs/a.yaml:8:1: stages: a spec has rules or stages, not both"),
    # values
    (RULES + "seed: -1\n", "specs/a.yaml:8:7: seed: expected an integer >= 0, got -1"),
    (RULES + "seed: 1.5\n", "specs/a.yaml:8:7: seed: expected an integer >= 0, got 1.5"),
    (RULES + 'seed: "1"\n', 'specs/a.yaml:8:7: seed: expected an integer >= 0, got the text "1"; write it without quotes'),
    (RULES + "seed: 0x10\n", "specs/a.yaml:8:7: seed: expected an integer >= 0, got 0x10"),
    (RULES + f"seed: {2**63}\n", f"specs/a.yaml:8:7: seed: expected an integer >= 0, got {2**63}"),
    (RULES + f"seed: {'9' * 5000}\n", f"specs/a.yaml:8:7: seed: expected an integer >= 0, got {'9' * 57}..."),
    (RULES + "seed: [1]\n", "specs/a.yaml:8:7: seed: expected an integer >= 0, got a list of 1"),
    (RULES + "seed: null\n", "specs/a.yaml:8:7: seed: expected an integer >= 0, got null"),
    (RULES + "strict: yes\n", "specs/a.yaml:8:9: strict: expected true or false, got yes; write true"),
    (RULES + "strict: off\n", "specs/a.yaml:8:9: strict: expected true or false, got off; write false"),
    (RULES + "strict: 1\n", "specs/a.yaml:8:9: strict: expected true or false, got 1"),
    (RULES + "strict: 'true'\n", 'specs/a.yaml:8:9: strict: expected true or false, got the text "true"'),
    (RULES + "name: ''\n", "specs/a.yaml:8:7: name: expected a name on one line, got the text \"\""),
    (RULES + "name: [a]\n", "specs/a.yaml:8:7: name: expected a name on one line, got a list of 1"),
    (RULES + "        damping: 1%\n",
     "specs/a.yaml:8:18: rules[0].rewrite.low_rank.damping: expected a number >= 0 and <= 1, got 1%; write 0.01"),
    (RULES + "        damping: .nan\n", "specs/a.yaml:8:18: rules[0].rewrite.low_rank.damping: expected a number >= 0 and <= 1, got .nan"),
    (RULES + "        damping: 1e999\n",
     "specs/a.yaml:8:18: rules[0].rewrite.low_rank.damping: expected a number >= 0 and <= 1, got 1e999"),
    (RULES + "        solver: exakt\n",
     "specs/a.yaml:8:17: rules[0].rewrite.low_rank.solver: expected one of auto, exact, got exakt; did you mean exact?"),
    (RULES + "    expect: 0\n", "specs/a.yaml:8:13: rules[0].expect: expected an integer >= 1, got 0"),
    (RULES + "    expect:\n", "specs/a.yaml:8:12: rules[0].expect: expected an integer >= 1, got nothing"),
    (RULES + "    pays: {tme: true}\n", "specs/a.yaml:8:12: rules[0].pays.tme: unknown key; did you mean time?\n  keys here: time"),
    (RULES + "calibration: {samples: 0}\n", "specs/a.yaml:8:24: calibration.samples: expected an integer >= 1, got 0"),
    (RULES + "tolerance: {}\n", "specs/a.yaml:8:12: tolerance: give weight_error, output_error or both"),
    (RULES + "tolerance: {weight_error: 0}\n", "specs/a.yaml:8:27: tolerance.weight_error: expected a number > 0, got 0"),
    (RULES + "tolerance: 0.1\n", "specs/a.yaml:8:12: tolerance: expected a mapping, got 0.1"),
    (RULES + "tolerance: {weight_error: 1, on_exceed: rollback}\n",
     "specs/a.yaml:8:41: tolerance.on_exceed: expected one of fail, roll_back, got rollback; did you mean roll_back?"),
    (RULES + "export: {precision: fp8}\n",
     "specs/a.yaml:8:21: export.precision: expected one of fp32, fp16, bf16, keep, got fp8; did you mean fp32?"),
    (RULES + "export: {target: [cuda, tpu]}\n",
     "specs/a.yaml:8:25: export.target[1]: expected one of cuda, cpu, got tpu; did you mean cpu?"),
    (RULES + "export: {target: []}\n", "specs/a.yaml:8:18: export.target: expected a list of at least 1, got an empty list"),
    (RULES + "export: {target: [cpu, cpu]}\n", "specs/a.yaml:8:9: export: target names a device twice: cpu, cpu"),
    (RULES + "export: {tokens: [0]}\n", "specs/a.yaml:8:19: export.tokens[0]: expected an integer >= 1, got 0"),
    # rank
    (RULES.replace("rank: 4", "rank: 0"), f"specs/a.yaml:7:15: {RANK}: expected an integer >= 1, got 0"),
    (RULES.replace("rank: 4", "rank: -3"), f"specs/a.yaml:7:15: {RANK}: expected an integer >= 1, got -3"),
    (RULES.replace("rank: 4", "rank: 1.5"),
     f"specs/a.yaml:7:15: {RANK}: expected an integer >= 1, {{energy: e}}, {{ratio: r}}, {{error: e}} or auto, got 1.5"),
    (RULES.replace("rank: 4", "rank: atuo"),
     f"specs/a.yaml:7:15: {RANK}: expected an integer >= 1, {{energy: e}}, {{ratio: r}}, {{error: e}} or auto, got atuo; "
     "did you mean auto?"),
    (RULES.replace("rank: 4", "rank: {energy: 0}"), f"specs/a.yaml:7:24: {RANK}.energy: expected a number > 0 and <= 1, got 0"),
    (RULES.replace("rank: 4", "rank: {energy: 1.01}"), f"specs/a.yaml:7:24: {RANK}.energy: expected a number > 0 and <= 1, got 1.01"),
    (RULES.replace("rank: 4", "rank: {energy: 95%}"),
     f"specs/a.yaml:7:24: {RANK}.energy: expected a number > 0 and <= 1, got 95%; write 0.95"),
    (RULES.replace("rank: 4", "rank: {error: 1}"), f"specs/a.yaml:7:23: {RANK}.error: expected a number >= 0 and < 1, got 1"),
    (RULES.replace("rank: 4", "rank: {}"), f"specs/a.yaml:7:15: {RANK}: give exactly one of energy, ratio, error, got none"),
    (RULES.replace("rank: 4", "rank: {energy: 1, ratio: 1}"),
     f"specs/a.yaml:7:15: {RANK}: give exactly one of energy, ratio, error, got energy and ratio"),
    (RULES.replace("rank: 4", "rank: {enrgy: 1}"), f"specs/a.yaml:7:16: {RANK}.enrgy: unknown key; did you mean energy?\n"
                                                   "  keys here: energy, ratio, error, multiple_of, min, max"),
    (RULES.replace("rank: 4", "rank: {energy: 1, min: 2}") + "        min: 3\n",
     "specs/a.yaml:8:14: rules[0].rewrite.low_rank.min: given twice: min stands inside rank too"),
    (RULES.replace("rank: 4", "rank: {energy: 1, min: 9}") + "        max: 8\n",
     "specs/a.yaml:8:14: rules[0].rewrite.low_rank.max: max 8 is below min 9"),
    (RULES + "        multiple_of: 8\n", f"specs/a.yaml:7:15: {RANK}: rank 4 disagrees with multiple_of 8 beside it"),
    (RULES.replace("rank: 4", "min: 4"), "specs/a.yaml:7:9: rules[0].rewrite.low_rank: rank is missing\n"
                                         "  rank: inner size of the two factors"),
    # rewrites
    (rewrite("{lowrank: {rank: 1}}"), "specs/a.yaml:4:15: rules[0].rewrite.lowrank: unknown method; did you mean low_rank?\n"
                                      "  methods: low_rank, quantize, lora, prune"),
    (rewrite("kep"), "specs/a.yaml:4:14: rules[0].rewrite: expected a method such as {low_rank: {rank: 64}}, a list of methods, any_of or "
                     "keep, got kep; did you mean keep?"),
    (rewrite("[]"), "specs/a.yaml:4:14: rules[0].rewrite: the list of methods is empty; write keep to leave the matmuls as they are"),
    (rewrite("[keep]"), "specs/a.yaml:4:15: rules[0].rewrite[0]: expected a method such as {low_rank: {rank: 64}}, got keep"),
    (rewrite("{}"), "specs/a.yaml:4:14: rules[0].rewrite: one method per mapping, got none; several go into a list"),
    (rewrite("{lora: {}, quantize: {}}"),
     "specs/a.yaml:4:14: rules[0].rewrite: one method per mapping, got lora, quantize; several go into a list"),
    (rewrite("{low_rank: 4}"), "specs/a.yaml:4:25: rules[0].rewrite.low_rank: expected a mapping with rank, got 4"),
    (rewrite("[{quantize: {}}, {low_rank: {rank: 1}}]"),
     "specs/a.yaml:4:32: rules[0].rewrite[1].low_rank: a rewrite has at most one replacing method (low_rank is of kind replace)"),
    (rewrite("[{lora: {}}, {quantize: {}}]"),
     "specs/a.yaml:4:28: rules[0].rewrite[1].quantize: the replacing method comes first (quantize is of kind replace)"),
    (rewrite("[{prune: {}}, {lora: {}}]"),
     "specs/a.yaml:4:16: rules[0].rewrite[0].prune: a method that works on a block stands alone (prune is of kind block)"),
    (rewrite("{lora: {bits: 3}}"), "specs/a.yaml:4:28: rules[0].rewrite.lora.bits: expected one of 2, 4, 8, got 3"),
    (rewrite("{lora: {levels: otto}}"),
     "specs/a.yaml:4:30: rules[0].rewrite.lora.levels: expected an integer >= 1 or auto, got otto; did you mean auto?"),
    (rewrite("{lora: {span: [1]}}"),
     "specs/a.yaml:4:28: rules[0].rewrite.lora.span: expected a list of 2 (each a number), got a list of 1"),
    (rewrite("{lora: {span: [2, 1]}}"), "specs/a.yaml:4:21: rules[0].rewrite.lora: span 2 .. 1 is empty"),
    (rewrite("{lora: {modes: {in: [2]}}}"), "specs/a.yaml:4:29: rules[0].rewrite.lora.modes: out is missing"),
    (rewrite("{lora: {modes: {in: [2], out: 1}}}"),
     "specs/a.yaml:4:44: rules[0].rewrite.lora.modes.out: expected an integer >= 2, got 1"),
    (rewrite("{any_of: []}"), "specs/a.yaml:4:23: rules[0].rewrite.any_of: expected a list of alternatives, each a method, a list of "
                              "methods or keep, got an empty list"),
    (rewrite("{any_of: [keep], lora: {}}"),
     "specs/a.yaml:4:31: rules[0].rewrite.lora: nothing stands beside any_of; alternatives go into its list"),
    # selections
    (RULES + "select: [a]\n", "specs/a.yaml:8:9: select: expected a mapping of names to conditions, got a list of 1"),
    (RULES + "select: {w: a}\n", "specs/a.yaml:8:13: select.w: expected a mapping of conditions, got a"),
    (RULES + "select: {w: {ops: linear}}\n", "specs/a.yaml:8:14: select.w.ops: unknown key; did you mean op?\n"
     "  keys here: role, path, layer, stack, op, block, in_features, out_features, params, shared, inserted_by, pattern, claim, use, not, "
     "any, all, effective_rank, outlier_ratio"),
    # names
    (RULES + "  - {name: mlp, match: {op: matmul}, rewrite: keep}\n",
     "specs/a.yaml:8:12: rules[1].name: another rule is called mlp already (at specs/a.yaml:3:11)"),
    (RULES.replace("- name: mlp", "- name: rule-2") + "  - {match: {op: matmul}, rewrite: keep}\n",
     "specs/a.yaml:8:5: rules[1]: another rule is called rule-2 already (at specs/a.yaml:3:11)"),
    (RULES.replace("name: mlp", "name: "), "specs/a.yaml:3:10: rules[0].name: expected a name on one line, got nothing"),
    # parts of the language that are read, and refused
    (RULES + "budget: {bytes: 40%}\n", "specs/a.yaml:8:1: budget: nothing to decide: no rule says auto or any_of"),
    (RULES + "budget: {bytes: 40 percent}\n", "specs/a.yaml:8:17: budget.bytes: expected a percentage such as 40%, or a size such as "
                                              "120MB, 64KiB or 250_000, got 40 percent"),
    (RULES + "budget: {macs: 3MB}\n",
     "specs/a.yaml:8:16: budget.macs: expected a percentage such as 40%, or a count such as 3M, 100k or 250_000, got 3MB"),
    (RULES + "budget: {macs: 140%}\n", "specs/a.yaml:8:16: budget.macs: expected a percentage > 0% and <= 100%, got 140%"),
    (RULES + "budget: {macs: 0.5}\n", "specs/a.yaml:8:16: budget.macs: expected a whole number >= 1, got 0.5"),
    (RULES + "budget: {of: model}\n", "specs/a.yaml:8:9: budget: give parameters, bytes, macs or several of them"),
    (RULES + "budget: {macs: 3M, of: all}\n", "specs/a.yaml:8:24: budget.of: expected one of matched, model, got all"),
    (RULES + "train: {loss: crossentropy}\n",
     "specs/a.yaml:8:15: train.loss: expected one of cross_entropy, causal_lm, mse, cosine, distill, got crossentropy; "
     "did you mean cross_entropy?"),
    (RULES + "train: {output: logits}\n", "specs/a.yaml:8:8: train: loss is missing\n  loss: loss of the training graph"),
    (RULES + "train: {loss: mse, optimizer: {adam: {lr: 1}}}\n",
     "specs/a.yaml:8:32: train.optimizer.adam: unknown key; did you mean adamw?\n  keys here: adamw, sgd, adam_atan2, lion"),
    (RULES + "train: {loss: mse, optimizer: {}}\n",
     "specs/a.yaml:8:31: train.optimizer: give one optimizer (adamw, sgd, adam_atan2, lion), got none"),
    (RULES + "train: {loss: mse, optimizer: {adamw: {lr: 1}, lion: {lr: 1}}}\n",
     "specs/a.yaml:8:31: train.optimizer: give one optimizer (adamw, sgd, adam_atan2, lion), got adamw and lion"),
    (RULES + "train: {loss: mse, optimizer: {sgd: {lr: 1, nesterov: true}}}\n",
     "specs/a.yaml:8:37: train.optimizer.sgd: nesterov needs a momentum > 0"),
    (RULES + "train: {loss: mse, trainable: []}\n", "specs/a.yaml:8:31: train.trainable: expected a list of at least 1, got an empty list"),
    (RULES + "train: {loss: mse, frozen: [a, {b: c}]}\n",
     "specs/a.yaml:8:32: train.frozen[1]: expected adapters, factors, all, or a glob over parameter names, got a mapping with b"),
    (RULES + "train: {loss: mse, optimizer: {adamw: {lr: 0}}}\n",
     "specs/a.yaml:8:44: train.optimizer.adamw.lr: expected a number > 0, got 0"),
    (RULES + "calibration: {sensitivity: fisher}\n", "specs/a.yaml:8:28: calibration.sensitivity: fisher is made of gradients of a loss, "
     "and the spec has none\n  for instance: train: {loss: cross_entropy}"),
    (RULES + "calibration: {sensitivity: fish}\n",
     "specs/a.yaml:8:28: calibration.sensitivity: expected one of none, output, kl, fisher, got fish; did you mean fisher?"),
    (RULES + "export: {codebook: pack}\n",
     "specs/a.yaml:8:20: export.codebook: expected one of rebuild, packed, got pack; did you mean packed?"),
    (RULES + "export: {activations: int4}\n",
     "specs/a.yaml:8:23: export.activations: expected one of fp32, int8, got int4; did you mean int8?"),
    (RULES.replace("rank: 4", "rank: auto"), f"specs/a.yaml:7:15: {RANK}: auto needs a budget to be decided by{A_BUDGET}"),
    (rewrite("{any_of: [{low_rank: {rank: 1}}, [{lora: {}}], keep]}"),
     f"specs/a.yaml:4:15: rules[0].rewrite.any_of: any_of needs a budget to be decided by{A_BUDGET}"),
    (rewrite("{any_of: [{low_rank: {rank: auto}}, keep]}"),
     f"specs/a.yaml:4:15: rules[0].rewrite.any_of: any_of needs a budget to be decided by{A_BUDGET}"),
    (rewrite("{any_of: [{low_rank: {rank: 0}}, keep]}"),
     "specs/a.yaml:4:42: rules[0].rewrite.any_of[0].low_rank.rank: expected an integer >= 1, got 0"),
    (RULES.replace('role: "mlp.*"', "block: mpl"),
     "specs/a.yaml:4:20: rules[0].match.block: unknown block 'mpl'; did you mean mlp?"),
    (RULES.replace("rank: 4", "rank: auto") + "seed: x\n", "specs/a.yaml:8:7: seed: expected an integer >= 0, got x"),  # errors go first
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=range(len(ERRORS)))
def test_error(text: str, message: str, write: Write) -> None:
    with pytest.raises(SpecError) as caught:
        load(text, write)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


EVERYTHING = """\
version: 1
name: 123
select:
  wide: {params: ">= 100k"}
rules:
  - name: gated
    match:
      use: wide
      pattern: |
        g = matmul(x)
        d = matmul(silu(g))
      claim: [g]
    expect: 010
    optional: true
    rewrite:
      - low_rank: {rank: {ratio: 0.5, min: 2}, multiple_of: 8, max: 1_000, damping: 1e-3, solver: exact}
      - lora: {rank: 2, levels: 7, label: true, modes: {in: [2, 3], out: 4}, span: [-1, .5]}
    force: true
    pays: {time: true}
    untie: true
  - match: {op: matmul}
    rewrite: keep
  - {match: {role: head}, rewrite: {quantize: {}}}
tolerance: {weight_error: 0.2, output_error: 5e-2, on_exceed: roll_back}
calibration: {samples: 1_000}
export: {opset: 20, precision: keep, target: cpu, tokens: [1]}
train: {loss: causal_lm, output: logits, optimizer: {lion: {lr: 1e-5}}, trainable: [factors, "head.**"], frozen: "**.bias"}
seed: 7
strict: true
"""


def test_everything(write: Write) -> None:
    spec = load(EVERYTHING, write)
    first, second, third = spec.rules
    assert (spec.version, spec.name, spec.seed, spec.strict, spec.file) == (1, "123", 7, True, "specs/a.yaml")
    assert [stage.name for stage in spec.stages] == [None]
    assert (first.name, first.expect, first.optional, first.force, first.pays, first.untie) == ("gated", 10, True, True, Pays(True), True)
    low_rank = LowRankSpec(Rank("ratio", 0.5, multiple_of=8, min=2, max=1000), damping=1e-3, solver="exact")
    lora = LoraSpec(rank=2, levels=7, label="true", modes=Modes((2, 3), (4,)), span=(-1.0, 0.5))
    assert first.rewrite == (MethodUse("low_rank", low_rank), MethodUse("lora", lora))
    assert [use.at for use in first.rewrite] == [Position("specs/a.yaml", 16, 9), Position("specs/a.yaml", 17, 9)]
    assert first.at == Position("specs/a.yaml", 6, 5)
    assert (second.name, second.rewrite, second.expect, second.optional) == ("rule-2", (), None, False)
    assert third.rewrite == (MethodUse("quantize", NoSettings()),)
    assert spec.tolerance == spec.stages[0].tolerance == Tolerance(0.2, 0.05, "roll_back")
    assert spec.calibration == spec.stages[0].calibration == Calibration(1000)
    assert spec.export == Export(opset=20, precision="keep", target=("cpu",), tokens=(1,))
    trainable, frozen = (ParameterSelector("factors"), ParameterSelector("head.**")), (ParameterSelector("**.bias"),)
    assert spec.train == Train("causal_lm", "logits", -100, Optimizer(lion=Lion(1e-5)), trainable, frozen)
    assert spec.train is not None
    assert (str(spec.train.at), str(spec.train.frozen[0].at)) == ("specs/a.yaml:27:8", "specs/a.yaml:27:114")


def test_defaults(write: Write) -> None:
    spec = load(RULES, write)
    assert (spec.name, spec.tolerance, spec.calibration, spec.export) == ("a", None, Calibration(), Export())
    assert (spec.seed, spec.strict, spec.rules[0].pays) == (0, False, Pays(None))


@pytest.mark.parametrize(("settings", "rank"), [
    ("rank: 16", Rank("fixed", 16)),
    ("rank: 0_16", Rank("fixed", 16)),
    ("rank: {energy: 1}", Rank("energy", 1.0)),
    ("rank: {error: 0}", Rank("error", 0.0)),
    ("rank: {ratio: 6e-1}", Rank("ratio", 0.6)),
    ("rank: {ratio: .6, multiple_of: 8, min: 2, max: 9}", Rank("ratio", 0.6, 8, 2, 9)),
    ("rank: {ratio: .6}, multiple_of: 8, min: 2, max: 9", Rank("ratio", 0.6, 8, 2, 9)),
    ("rank: {ratio: .6, min: 2}, max: 9", Rank("ratio", 0.6, 1, 2, 9)),
    ("rank: 16, multiple_of: 8, max: 16", Rank("fixed", 16, 8, 1, 16)),
])  # fmt: skip
def test_rank(settings: str, rank: Rank, write: Write) -> None:
    assert load(rewrite(f"{{low_rank: {{{settings}}}}}"), write).rules[0].rewrite[0].spec.rank == rank


# --------------------------------------------------------------------------------------------------------------------------- sources


def test_library_specs() -> None:
    names = ("low-rank-40", "low-rank-60", "low-rank-60-plain", "low-rank-80")
    quantized = (
        "lora-r8",
        "loftq-nf4",
        "loftq-u2",
        "loftq-u4",
        "mixed-4-2",
        "qlora-nf4",
        "quantize-u4",
        "llm-u3",
        "llm-u4",
        "llm-u4-all",
        "llm-u2-healed",
        "quantize-w8a8",
    )
    llama = ("llama2-7b", "llama3.1-70b", "llama3.1-8b", "llama3.2-1b", "llama3.2-3b")
    trains = ("tt-lora", "tt-mlp", "tt-lora-roberta", *(f"tt-lora-{name}" for name in llama))
    glora = ("bitfit", "channel-scale", "glora", "glora-search", "ssf")
    sparse = ("gmt", "meprop", "sparse-grad")
    budgets = ("any-of-12", "any-of-9", "budget-40", "budget-60", "llm-low-rank-80", "llm-low-rank-80-healed")
    pruned = ("transact-50", "llm-transact-50-healed")
    assert library_names() == tuple(sorted((*names, *quantized, *glora, *sparse, *budgets, *pruned, *trains)))
    for name in budgets:
        spec = load_spec(name, method_table())
        assert spec.rules[0].is_open
        assert spec.calibration.sensitivity == "output"
    for name in names:
        spec = load_spec(name, METHODS)
        assert (spec.name, spec.file, len(spec.rules)) == (name, name, 1)
        settings = spec.rules[0].rewrite[0].spec
        assert settings.rank == Rank("ratio", int(name.split("-")[2]) / 100)
        assert settings.whiten is (not name.endswith("plain"))
        assert spec.calibration.samples == (512 if settings.whiten else 256)
        assert library_text(name).startswith("# yaml-language-server: $schema=schema.json\n#\n# Low-rank factors ")


def test_unknown_library_spec() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec("low-rnk-60", METHODS)
    assert str(caught.value) == (
        "no library spec is called 'low-rnk-60'; did you mean low-rank-60?\n"
        f"  library specs: {', '.join(library_names())}\n"
        "  a file ends in .yaml, or is given with its folder (./NAME)"
    )


@pytest.mark.parametrize(("source", "message"), [
    ("specs/b.yaml", "specs/b.yaml: no such file"),
    ("b.yml", "b.yml: no such file"),
    (Path("low-rank-60"), "low-rank-60: no such file"),
    ("./specs", "./specs: cannot be read: Is a directory"),
    ("a\0.yaml", "'a\\x00.yaml': is no path: embedded null byte"),
    (3, "a spec is a library name, a path or a dict, got int"),
    ([], "a spec is a library name, a path or a dict, got list"),
    ({}, "version is missing; this is version: 1 of the spec language"),
    ({"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"low_rank": {"rnak": 1}}}]},
     "rules[0].rewrite.low_rank.rnak: unknown key; did you mean rank?\n  " + SETTINGS),
    ({"version": "1"}, 'version: expected 1, got the text "1"; write it without quotes'),
    ({"version": 1, "seed": {1}}, "seed: expected str, int, float, bool, None, list or dict, got set"),
    ({"version": 1, "extends": "specs/a.yaml", "rules": [{"match": {"op": "matmul"}, "rewrite": "keep", "name": "mlp", "expect": 1.5}]},
     "rules[0].expect: expected an integer >= 1, got 1.5"),
])  # fmt: skip
def test_error_in_a_source(source: Any, message: str, write: Write) -> None:
    write(a=RULES)
    with pytest.raises(SpecError) as caught:
        load_spec(source, METHODS)
    assert str(caught.value) == message


def test_a_file_that_may_not_be_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write(a=RULES)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(SpecError, match=r"^specs/a\.yaml: cannot be read: Permission denied$"):
        load_spec("specs/a.yaml", METHODS)


def test_a_dict_is_the_same_spec(write: Write) -> None:
    spec = load_spec(yaml.safe_load(RULES), METHODS)
    assert spec.file == "<dict>"
    assert spec.rules[0].at is None
    assert spec.rules == load(RULES, write).rules
    assert load_spec(write() / "specs" / "a.yaml", METHODS) == load("name: a\n" + RULES, write)


# --------------------------------------------------------------------------------------------------------------------------- extends

BASE = """\
version: 1
name: base
select: {wide: {params: ">= 10", in_features: "8"}, tall: {params: "< 10"}}
rules:
  - name: mlp
    match: {role: "mlp.*", layer: 0..5}
    expect: 4
    rewrite: {low_rank: {rank: {ratio: 0.6, multiple_of: 8}, whiten: true}}
  - match: {op: conv1x1}
    rewrite: keep
  - name: rest
    match: {op: matmul}
    rewrite: keep
tolerance: {weight_error: 0.5, on_exceed: roll_back}
calibration: {samples: 99}
seed: 5
"""

TOP = """\
version: 1
extends: base.yaml
select: {wide: {in_features: "16"}}
rules:
  - name: new
    match: {role: head}
    rewrite: keep
  - name: mlp
    match: {layer: 2}
    expect: null
    rewrite: {low_rank: {rank: {energy: 0.9}}}
  - name: rest
    rewrite: {lora: {}}
tolerance: {output_error: 0.1}
seed: 6
"""


def test_extends_merges(write: Write) -> None:
    write(base=BASE)
    spec = load(TOP, write)
    data = spec.resolved
    assert spec.name == "a"
    assert data["select"] == {"wide": {"params": ">= 10", "in_features": "16"}, "tall": {"params": "< 10"}}
    assert [rule["name"] for rule in data["rules"]] == ["mlp", "rule-2", "rest", "new"]
    mlp, _, rest, _ = spec.rules
    assert data["rules"][0]["match"] == {"role": "mlp.*", "layer": 2}
    assert mlp.expect is None  # taken away by null
    assert mlp.rewrite[0].spec == LowRankSpec(Rank("energy", 0.9), whiten=True)  # another kind of rank, the same method
    assert rest.rewrite == (MethodUse("lora", LoraSpec()),)  # another method
    assert spec.tolerance == Tolerance(0.5, 0.1, "roll_back")
    assert (spec.calibration.samples, spec.seed) == (99, 6)


def test_positions_stay_in_the_file_they_came_from(write: Write) -> None:
    write(base=BASE.replace("whiten: true", "whiten: on"))
    with pytest.raises(SpecError) as caught:
        load(TOP, write)
    assert str(caught.value) == ("specs/base.yaml:8:70: rules[0].rewrite.low_rank.whiten: expected true or false, got on; write true")
    write(base=BASE.replace("expect: 4", "expct: 4"))
    with pytest.raises(SpecError) as caught:
        load(TOP, write)
    assert str(caught.value.at) == "specs/base.yaml:7:5"


def test_a_rank_of_the_same_kind_keeps_its_limits(write: Write) -> None:
    write(base=BASE)
    spec = load(TOP.replace("energy: 0.9", "ratio: 0.5"), write)
    assert spec.rules[0].rewrite[0].spec.rank == Rank("ratio", 0.5, multiple_of=8)


def test_extends_a_library_spec_and_several(write: Write) -> None:
    write(base="version: 1\nseed: 3\ncalibration: {samples: 9}\n")
    text = "version: 1\nextends: [low-rank-60, low-rank-40, ./base.yaml]\nrules: [{name: blocks, expect: 36}]\n"
    spec = load(text, write)
    [rule] = spec.rules
    assert rule.rewrite[0].spec == LowRankSpec(Rank("ratio", 0.4), whiten=True)
    assert (rule.expect, spec.seed, spec.calibration.samples) == (36, 3, 9)
    assert rule.rewrite[0].at == Position("low-rank-40", 14, 7)


def test_a_chain_and_a_base_that_is_reached_twice(write: Write) -> None:
    write(base=BASE, left="version: 1\nextends: base.yaml\nseed: 1\n", right="version: 1\nextends: [base.yaml]\nstrict: true\n")
    spec = load("version: 1\nextends: [left.yaml, right.yaml]\n", write)
    assert [rule.name for rule in spec.rules] == ["mlp", "rule-2", "rest"]  # the rule without a name came once
    assert (spec.seed, spec.strict) == (5, True)  # right.yaml brings the seed of base.yaml, and comes later


def test_extends_from_a_dict_is_relative_to_the_current_folder(write: Write) -> None:
    write(base=BASE)
    assert load_spec({"version": 1, "extends": "specs/base.yaml"}, METHODS).seed == 5


EXTENDS_ERRORS = [
    ({"a": "version: 1\nextends: a.yaml\n"}, "specs/a.yaml:2:10: extends: circular extends: specs/a.yaml -> specs/a.yaml"),
    ({"a": "version: 1\nextends: [b.yaml]\n", "b": "version: 1\nextends: [low-rank-60, c.yaml]\n",
      "c": "version: 1\nextends: [../specs/b.yaml]\n"},
     "specs/c.yaml:2:11: extends[0]: circular extends: specs/b.yaml -> specs/c.yaml -> specs/b.yaml"),
    ({"a": "version: 1\nextends: [b.yaml]\n"}, "specs/a.yaml:2:11: extends[0]: specs/b.yaml: no such file"),
    ({"a": "version: 1\nextends: low-rank-61\n"}, "specs/a.yaml:2:10: extends: no library spec is called 'low-rank-61'; did you mean "
     f"low-rank-60?\n  library specs: {', '.join(library_names())}\n"
     "  a file ends in .yaml, or is given with its folder (./NAME)"),
    ({"a": "version: 1\nextends: [low-rank-60, low-rank-60]\n"}, "specs/a.yaml:2:24: extends[1]: low-rank-60 is listed twice"),
    ({"a": "version: 1\nextends: {b: c}\n"}, "specs/a.yaml:2:10: extends: expected a list (each text), got a mapping with b"),
    ({"a": "version: 1\nextends: b.yaml\n", "b": "seed: 1\n"},
     "specs/b.yaml:1:1: version is missing; this is version: 1 of the spec language"),
    ({"a": "version: 1\nextends: b.yaml\n", "b": "version: 1\nseed: [\n"},
     "specs/b.yaml:3:1: YAML syntax: expected the node content, but found 'stream end'"),
    ({"a": "version: 1\nextends: b.yaml\nrules: []\n", "b": "version: 1\nstages: []\n"},
     "specs/a.yaml:3:1: rules: cannot extend a spec that has stages (at specs/b.yaml:2:1)"),
    ({"a": "version: 1\nextends: low-rank-60\nstages: []\n"},
     "specs/a.yaml:3:1: stages: cannot extend a spec that has rules (at low-rank-60:9:1)"),
    ({"a": "version: 1\nextends: b.yaml\n", "b": "version: 1\nseed: 1\n"},
     "specs/a.yaml:1:1: rules is missing; a spec has rules, or stages with rules"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "message"), EXTENDS_ERRORS, ids=range(len(EXTENDS_ERRORS)))
def test_error_in_extends(files: dict[str, str], message: str, write: Write) -> None:
    write(**files)
    with pytest.raises(SpecError) as caught:
        load_spec(os.path.join("specs", "a.yaml"), METHODS)
    assert str(caught.value) == message


def test_a_very_long_chain(write: Write) -> None:
    write(a="version: 1\nextends: s0.yaml\n", **{f"s{i}": f"version: 1\nextends: s{i + 1}.yaml\n" for i in range(80)})
    with pytest.raises(SpecError, match="extends is nested more than 64 files deep"):
        load_spec("specs/a.yaml", METHODS)


def test_rules_do_not_multiply_without_end(write: Write) -> None:
    rule = "rules: [{match: {op: matmul}, rewrite: keep}]\n"
    files = {f"s{i}": f"version: 1\nextends: [l{i}.yaml, r{i}.yaml]\n" + rule for i in range(11)}
    sides = {
        f"{side}{i}": f"version: 1\nextends: s{i + 1}.yaml\nrules: [{{name: mlp, optional: true}}]\n" for side in "lr" for i in range(11)
    }
    write(**files, **sides, s11=RULES)
    assert len(load_spec("specs/s0.yaml", METHODS).rules) == 12  # one of each file, though 2^11 ways lead to the last


# ---------------------------------------------------------------------------------------------------------------------------- stages

STAGES = """\
version: 1
stages:
  - name: factorize
    rules:
      - {name: mlp, match: {role: "mlp.*"}, rewrite: {low_rank: {rank: 4}}}
    calibration: {samples: 8}
  - name: adapt
    rules:
      - {match: {inserted_by: mlp}, rewrite: {lora: {}}}
    tolerance: {output_error: 0.3}
tolerance: {weight_error: 0.2, on_exceed: roll_back}
calibration: {samples: 16}
"""


def test_stages(write: Write) -> None:
    spec = load(STAGES, write)
    first, second = spec.stages
    assert [(stage.name, [rule.name for rule in stage.rules]) for stage in spec.stages] == [("factorize", ["mlp"]), ("adapt", ["rule-2"])]
    assert (first.tolerance, first.calibration) == (spec.tolerance, Calibration(8))
    assert (second.tolerance, second.calibration) == (Tolerance(0.2, 0.3, "roll_back"), Calibration(16))


def test_a_stage_takes_the_tolerance_away(write: Write) -> None:
    spec = load(STAGES.replace("{output_error: 0.3}", "null"), write)
    assert [stage.tolerance for stage in spec.stages] == [spec.tolerance, None]
    assert load_spec(spec.resolved, METHODS) == spec


def test_stages_merge_by_name(write: Write) -> None:
    write(base=STAGES)
    spec = load("version: 1\nextends: base.yaml\nstages: [{name: adapt, rules: [{name: rule-x, match: {op: mm}, rewrite: keep}]}]\n", write)
    assert [[rule.name for rule in stage.rules] for stage in spec.stages] == [["mlp"], ["rule-2", "rule-x"]]


@pytest.mark.parametrize(("old", "new", "message"), [
    ("name: adapt", "name: factorize",
     "specs/a.yaml:7:11: stages[1].name: another stage is called factorize already (at specs/a.yaml:3:11)"),
    ("- name: adapt\n    rules", "- rules", "specs/a.yaml:7:5: stages[1]: name is missing\n  name: name of the stage"),
    ("- {match: {ins", "- {name: mlp, match: {ins",
     "specs/a.yaml:9:16: stages[1].rules[0].name: another rule is called mlp already (at specs/a.yaml:5:16)"),
    ("inserted_by: mlp", "inserted_by: mlq",
     "specs/a.yaml:9:31: stages[1].rules[0].match.inserted_by: no rule of an earlier stage is called 'mlq'; did you mean mlp?"),
    ('role: "mlp.*"', "inserted_by: mlp",
     "specs/a.yaml:5:42: stages[0].rules[0].match.inserted_by: no rule of an earlier stage is called 'mlp'; there is no earlier stage"),
    ("{samples: 8}", "{samples: 8, sensitivity: fisher}",
     "specs/a.yaml:6:44: stages[0].calibration.sensitivity: fisher is made of gradients of a loss, and the spec has none\n"
     "  for instance: train: {loss: cross_entropy}"),
    ("calibration: {samples: 8}", "budget: {bytes: 1GB}",
     "specs/a.yaml:6:5: stages[0].budget: nothing to decide: no rule of this stage says auto or any_of"),
    ("output_error", "ouput_error",
     "specs/a.yaml:10:17: stages[1].tolerance.ouput_error: unknown key; did you mean output_error?\n"
     "  keys here: weight_error, output_error, on_exceed"),
])  # fmt: skip
def test_error_in_stages(old: str, new: str, message: str, write: Write) -> None:
    assert old in STAGES
    with pytest.raises(SpecError) as caught:
        load(STAGES.replace(old, new), write)
    assert str(caught.value) == message


# -------------------------------------------------------------------------------------------------------------------- the resolved form


@pytest.mark.parametrize("text", [RULES, EVERYTHING, STAGES, rewrite("keep")], ids=["rules", "everything", "stages", "keep"])
def test_the_resolved_form_is_the_same_spec(text: str, write: Write) -> None:
    spec = load(text, write)
    dumped = dump_resolved(spec)
    write(again=dumped)
    again = load_spec("specs/again.yaml", METHODS)
    assert again == spec
    assert dump_resolved(again) == dumped
    assert load_spec(spec.resolved, METHODS) == spec


def test_the_resolved_form_for_people(write: Write) -> None:
    write(base=BASE)
    assert (
        dump_resolved(load(TOP, write))
        == """\
# yaml-language-server: $schema=schema.json
# The resolved spec; `matmorph specs schema > schema.json` writes the schema for editors.
version: 1
name: a
select: {wide: {params: '>= 10', in_features: '16'}, tall: {params: < 10}}
rules:
- name: mlp
  match: {role: mlp.*, layer: 2}
  rewrite:
    low_rank: {rank: {energy: 0.9}, whiten: true, damping: 0.0001, solver: auto}
- name: rule-2
  match: {op: conv1x1}
  rewrite: keep
- name: rest
  match: {op: matmul}
  rewrite: {lora: {rank: 8, bits: 4, levels: auto, init: zero, span: [0.0, 1.0]}}
- name: new
  match: {role: head}
  rewrite: keep
tolerance: {weight_error: 0.5, output_error: 0.1, on_exceed: roll_back}
calibration: {samples: 99, sensitivity: none, order: parallel, token_weights: none}
export:
  precision: fp32
  target: [cuda, cpu]
  tokens: [1, 16, 256]
  activations: fp32
  codebook: rebuild
  adapters: inline
  logits: all
  fuse: auto
  attention: auto
  cache: float
seed: 6
strict: false
"""
    )


SHARES = st.floats(min_value=1e-6, max_value=1.0)
RANKS = st.one_of(
    st.integers(1, 10**6),
    st.builds(lambda kind, value: {kind: value}, st.sampled_from(["energy", "ratio"]), SHARES),
    st.builds(lambda value: {"error": value}, st.floats(min_value=0.0, max_value=0.999)),
)
LIMITS = st.fixed_dictionaries({}, optional={"multiple_of": st.integers(1, 64), "min": st.integers(1, 4), "max": st.integers(4, 99)})
NAMES = st.text(min_size=1, max_size=8).filter(lambda text: text.isprintable() and text.strip() != "")


@st.composite
def low_rank_rules(draw: st.DrawFn, name: str) -> dict[str, Any]:
    rank = draw(RANKS)
    settings = {"rank": rank, **(draw(LIMITS) if isinstance(rank, dict) else {}), "whiten": draw(st.booleans())}
    flags = draw(st.fixed_dictionaries({}, optional={"expect": st.integers(1, 99), "optional": st.booleans(), "untie": st.booleans()}))
    path = draw(st.sampled_from(["a.b", "010", "1_000", "1e-4", "true", "x: y", "null", " é ", "# x", "'"]))
    return {"name": name, "match": {"path": path, "layer": draw(st.integers(0, 9))}, "rewrite": {"low_rank": settings}, **flags}


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    optional = {"seed": st.integers(0, 2**40), "tolerance": st.builds(lambda e: {"weight_error": e}, SHARES), "name": NAMES}
    return {"version": 1, "rules": [draw(low_rank_rules(name)) for name in names], **draw(st.fixed_dictionaries({}, optional=optional))}


@given(specs())
def test_any_spec_comes_back(data: dict[str, Any]) -> None:
    spec = load_spec(data, METHODS)
    again = load_text(dump_resolved(spec))
    assert again == spec
    assert again.resolved == spec.resolved
    assert [rule.name for rule in spec.rules] == [rule["name"] for rule in data["rules"]]


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 9)
    | st.floats(0, 2)
    | st.sampled_from(["", "auto", "keep", "mlp.*", "low_rank", "rank", "x"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["low_rank", "any_of", "rank", "op", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(data: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [above, *(place for key, item in inner for place in places(item, (*above, key)))]


@given(st.sampled_from([RULES, EVERYTHING, STAGES, BASE]), st.data(), ANYTHING)
def test_a_wrong_value_anywhere_is_a_spec_error_or_fits(text: str, data: st.DataObject, value: Any) -> None:
    spec: Any = yaml.safe_load(text)
    *above, key = data.draw(st.sampled_from(places(spec)[1:]))
    holder = spec
    for step in above:
        holder = holder[step]
    holder[key] = value
    try:
        outcome: Any = load_spec(spec, METHODS)
    except SpecError as error:
        outcome = error
    assert isinstance(outcome, Spec) or outcome.keypath


def load_text(text: str) -> Spec:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.yaml"
        path.write_text(text, encoding="utf-8")
        return load_spec(path, METHODS)
