"""Methods that work on blocks: which blocks a stage's rules claim, what becomes of them, and the narrower graph.

They run beside the methods of single sites: claims are divided, patches are built on the same graph, and applied behind its one splice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from matmorph.errors import SpecError, VerifyError
from matmorph.ir.build import Builder
from matmorph.ir.core import Const, Graph, Node, Origin, Value
from matmorph.ir.infer import Inference
from matmorph.ir.rewiring import rewired, swept
from matmorph.ir.site import Choice, Reject, Site
from matmorph.ir.verify import retype
from matmorph.passes.linalg.whiten import relative_output_error, relative_weight_error
from matmorph.passes.methods.protocol import BlockMethod, Methods, SiteStats, block_method
from matmorph.passes.pruning.axes import HEADS, QK, Counts, V, resized, size_of
from matmorph.passes.pruning.find_blocks import Block
from matmorph.passes.pruning.patch import Patch
from matmorph.passes.rewriting.rewrite import Outcome, Part, aimed
from matmorph.passes.rewriting.sample import sample_of, unseen
from matmorph.passes.selection.survey import Survey
from matmorph.passes.sizes import exported_sizes
from matmorph.specs.schema import MethodUse, Rule, Stage

_INDEX_BYTES = 8


@dataclass(frozen=True, slots=True, eq=False)
class BlockJob:
    """One block that a rule prunes."""

    block: Block
    rule: Rule
    use: MethodUse


@dataclass(frozen=True, slots=True, eq=False)
class Divided:
    """Claims of single sites, blocks, and claimed sites of which no block can be made. `blocks`: all of the graph, where any was asked
    for."""

    claims: tuple[tuple[Site, Rule], ...]
    jobs: tuple[BlockJob, ...] = ()
    refused: tuple[Outcome, ...] = ()
    blocks: tuple[Block, ...] = ()


def of_block(rule: Rule, methods: Methods) -> MethodUse | None:
    """The block method of a rule, which stands alone in its rewrite."""
    use = rule.rewrite[0] if rule.rewrite else None
    return use if use is not None and isinstance(methods.get(use.method), BlockMethod) else None


def divide(survey: Survey, owners: Mapping[Site, Rule | None], methods: Methods) -> Divided:
    """The claims of one stage by what they work on. `owners`: the rule of every site of the survey.

    SpecError: two rules claim parts of one block that one of them prunes; settings that fit no block of their rule.
    """
    claims = tuple((site, rule) for site, rule in owners.items() if rule is not None and rule.rewrite)
    pruned = {site: (rule, use) for site, rule in claims if (use := of_block(rule, methods)) is not None}
    if not pruned:
        return Divided(claims)
    jobs: list[BlockJob] = []
    refused: list[Outcome] = []
    inside: set[Site] = set()
    for block in survey.blocks:
        touched = [site for site in block.sites if site in pruned]
        if not touched:
            continue
        rule, use = pruned[touched[0]]
        _refuse_two_rules(block, rule, owners)
        inside.update(touched)
        missing = next((site for site in block.sites if site not in pruned), None)
        if missing is None:
            jobs.append(BlockJob(block, rule, use))
        else:
            reason = Reject(f"{block.name} is incomplete: rule {rule.name} does not match {missing.path}")
            refused += [Outcome(site, rule, reason) for site in touched]
    alone = Reject("it is part of no attention or MLP block")
    refused += [Outcome(site, rule, alone) for site, (rule, _) in pruned.items() if site not in inside]
    _refuse_impossible(jobs, methods)
    return Divided(tuple(claim for claim in claims if claim[0] not in pruned), tuple(jobs), tuple(refused), survey.blocks)


def _refuse_two_rules(block: Block, rule: Rule, owners: Mapping[Site, Rule | None]) -> None:
    others = {site: other for site in block.sites if (other := owners.get(site)) is not None and other is not rule}
    if not others:
        return
    site, other = next(iter(others.items()))
    own = next(site for site in block.sites if owners.get(site) is rule)
    raise SpecError(
        f"rules {rule.name} and {other.name} claim parts of one block: {own.path} and {site.path}",
        at=other.at,
        details=[f"rule {rule.name} is at {rule.at}", f"{block.name} is pruned as a whole: {', '.join(s.path for s in block.sites)}"],
    )


def _refuse_impossible(jobs: Sequence[BlockJob], methods: Methods) -> None:
    owned: dict[int, list[BlockJob]] = {}
    for job in jobs:
        owned.setdefault(id(job.rule), []).append(job)
    for group in owned.values():
        use = group[0].use
        why = block_method(methods, use.method).impossible([job.block for job in group], use.spec)
        if why is not None:
            raise SpecError(f"rule {group[0].rule.name}: {why}", at=use.at)


def block_needs(jobs: Sequence[BlockJob], methods: Methods) -> list[Site]:
    """Sites whose statistics are read. All that can be pruned, so that output errors are measured wherever there is data."""
    found: dict[Site, None] = {}
    for job in jobs:
        method = block_method(methods, job.use.method)
        if method.check(job.block, job.use.spec) is None:
            found.update(dict.fromkeys(method.reads(job.block, job.use.spec)))
    return list(found)


def fitted_by_blocks(jobs: Sequence[BlockJob], methods: Methods) -> set[Site]:
    """The last matmuls of blocks whose methods fit them to data."""
    return {job.block.consumer for job in jobs if methods[job.use.method].fitted(job.use.spec)}


def rejected(job: BlockJob, reject: Reject) -> list[Outcome]:
    return [Outcome(site, job.rule, reject) for site in job.block.sites]


def _outcomes(job: BlockJob, method: BlockMethod, choice: Choice, notes: Sequence[str], patch: Patch | None = None) -> list[Outcome]:
    """One per site of the block; notes and patch go with the consumer."""
    costs = method.costs(job.block, job.use.spec, choice)
    found = []
    for site in job.block.sites:
        last = site is job.block.consumer
        part = Part(job.use, method.kind, choice, costs[site], tuple(notes) if last else ())
        found.append(Outcome(site, job.rule, None, (part,), cost=costs[site], block=job.block, patch=patch if last else None))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """A consumer as the source has it: what every shot is measured against. `moment`: what its errors are judged in. `features`: those that
    are still there."""

    weight: Tensor
    moment: Tensor | None
    features: Tensor

    @classmethod
    def of(cls, block: Block, stats: Mapping[Site, SiteStats]) -> _Source:
        found = stats.get(block.consumer)
        return cls(block.consumer.weight().detach(), found.judged if found is not None else None, torch.arange(block.width))

    def narrowed(self, features: Tensor) -> _Source:
        return replace(self, features=self.features[features])


@dataclass(frozen=True, slots=True, eq=False)
class PruningSoFar:
    """What the shots so far have made of the blocks of a run, by their consumers' paths. `left`: the choices of the shots to come, by rule
    too. `sources`: consumers as the source has them. `cache`: elements of keys and values per token, before and now. `aside`: parameters
    and bytes that a plan changes outside the sites' weights."""

    left: Mapping[tuple[str, str], tuple[Choice, ...]] = field(default_factory=dict)
    sources: Mapping[str, _Source] = field(default_factory=dict)
    cache: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    aside: tuple[int, int] = (0, 0)

    def seeing(self, blocks: Sequence[Block]) -> PruningSoFar:
        """With the attentions among these blocks, as large as they are unless a shot before has seen them."""
        sizes = {block.consumer.path: _elements(block, {}) for block in blocks if block.heads is not None}
        return replace(self, cache={**{path: (size, size) for path, size in sizes.items()}, **self.cache})

    def shrunk(self, block: Block, counts: Counts) -> PruningSoFar:
        if block.heads is None:
            return self
        before = self.cache.get(block.consumer.path, (_elements(block, {}), 0))[0]
        return replace(self, cache={**self.cache, block.consumer.path: (before, _elements(block, counts))})

    def keeping(self, outcomes: Iterable[Outcome], methods: Methods) -> PruningSoFar:
        """With what came of a shot in the end: a block that was taken back is as large as before."""
        found = self
        for outcome in outcomes:
            if outcome.patch is not None and outcome.reject is None:
                use, block, patch = outcome.parts[0].use, outcome.patch.block, outcome.patch
                found = found.shrunk(block, block_method(methods, use.method).counts(block, use.spec, patch.choice))
                source = found.sources[block.consumer.path].narrowed(patch.features)
                found = replace(found, sources={**found.sources, block.consumer.path: source})
        return found

    def notes(self) -> tuple[str, ...]:
        """Elements of keys and values per token over all attentions whose heads are known, where pruning has changed them."""
        before, after = (sum(pair[k] for pair in self.cache.values()) for k in (0, 1))
        share = f"{after / before:.2%}" if before else ""
        return (f"keys and values (KV cache): {before:,} -> {after:,} elements per token ({share})",) if before != after else ()


def plan_blocks(
    graph: Graph, divided: Divided, so_far: PruningSoFar, methods: Methods, precision: str
) -> tuple[tuple[Outcome, ...], PruningSoFar]:
    """What would become of the blocks, from shapes alone."""
    pruned = so_far.seeing(divided.blocks)
    sizes = exported_sizes(graph, precision) if divided.jobs else {}
    found = [*divided.refused]
    for job in divided.jobs:
        method, spec = block_method(methods, job.use.method), job.use.spec
        reject = method.check(job.block, spec)
        if reject is not None:
            found += rejected(job, reject)
            continue
        [choice, *_] = method.choices(job.block, spec)
        counts = method.counts(job.block, spec, choice)
        parameters, size = _aside(job.block, counts, sizes)
        pruned = replace(pruned.shrunk(job.block, counts), aside=(pruned.aside[0] + parameters, pruned.aside[1] + size))
        found += _outcomes(job, method, choice, choice.notes)
    return tuple(found), pruned


def build_blocks(
    graph: Graph, divided: Divided, stats: Mapping[Site, SiteStats], so_far: PruningSoFar, methods: Methods
) -> tuple[tuple[Outcome, ...], PruningSoFar]:
    """Outcomes with patches for one shot, of which `keeping` then hears which stay. SpecError: a method that needs calibration data where
    there is none."""
    pruned = so_far.seeing(divided.blocks)
    builder = block_builder(graph)
    found = [*divided.refused]
    for job in divided.jobs:
        outcomes, pruned = build_block(builder, job, stats, pruned, methods)
        found += outcomes
    return tuple(found), pruned


def block_builder(graph: Graph) -> Builder:
    """What all patches over one graph are written with."""
    return Builder(graph, inference=Inference(graph.ranges, graph.device))


def build_block(
    builder: Builder, job: BlockJob, stats: Mapping[Site, SiteStats], pruned: PruningSoFar, methods: Methods
) -> tuple[list[Outcome], PruningSoFar]:
    """The same of one block."""
    path = job.block.consumer.path
    method, key = block_method(methods, job.use.method), (job.rule.name, path)
    schedule = _schedule(job, method, pruned.left.get(key))
    if isinstance(schedule, Reject):
        return rejected(job, schedule), pruned
    choice, *later = schedule
    refuse_without_data(job, methods, stats)
    source = pruned.sources.get(path) or _Source.of(job.block, stats)
    found = _built(job, method, choice, source, stats, builder)
    return found, replace(pruned, left={**pruned.left, key: tuple(later)}, sources={**pruned.sources, path: source})


def _schedule(job: BlockJob, method: BlockMethod, left: tuple[Choice, ...] | None) -> tuple[Choice, ...] | Reject:
    """The choice of this shot and those of the shots to come. `left`: what an earlier shot left of them, None in the first."""
    found = left if left is not None else method.check(job.block, job.use.spec) or tuple(method.schedule(job.block, job.use.spec))
    return found or Reject("it was not pruned by the first of its shots")


def _built(
    job: BlockJob, method: BlockMethod, choice: Choice, source: _Source, stats: Mapping[Site, SiteStats], b: Builder
) -> list[Outcome]:
    at = job.rule.at
    b.origin = Origin(rule=job.rule.name, location=f"{at.file}:{at.line}" if at is not None else None)
    own = stats.get(job.block.consumer)
    patch = _aimed_patch(job, method, choice, stats, b)
    notes, errors = _measured(job.block, patch, source, own)
    sample = sample_of(job.block.consumer, own, [(method, job.use)])
    said = () if own is None else own.remarks
    outcomes = _outcomes(job, method, patch.choice, (*patch.choice.notes, *patch.notes, *notes, *said), patch)
    measured = {"weight_error": errors[0], "output_error": None if unseen(sample) else errors[1], "sample": sample}
    return [replace(one, **measured) if one.patch is not None else one for one in outcomes]  # type: ignore[arg-type] # fields of Outcome


def _aimed_patch(job: BlockJob, method: BlockMethod, choice: Choice, stats: Mapping[Site, SiteStats], b: Builder) -> Patch:
    """The patch, its last matmul made of the target where there is one."""
    consumer = job.block.consumer
    own = stats.get(consumer)
    if own is None or own.target is None:
        return method.build(job.block, job.use.spec, choice, stats, b)
    seen = aimed(consumer, own)
    found = method.build(replace(job.block, consumer=seen), job.use.spec, choice, {**stats, seen: own}, b)
    return replace(found, block=job.block)


def _measured(block: Block, patch: Patch, source: _Source, stats: SiteStats | None) -> tuple[tuple[str, ...], tuple[float, float | None]]:
    """Errors of the last matmul against the source's, the removed features as zero columns: sliced, and as it is stored."""
    features = source.features[patch.features]
    w = source.weight if source.weight.dtype == torch.float64 else source.weight.float()
    narrow, sliced = (torch.zeros_like(w) for _ in range(2))
    narrow[:, features] = patch.weight.detach().to(w.dtype).to(w.device)
    sliced[:, features] = w[:, features]
    weight_error = relative_weight_error(w, narrow)
    if source.moment is None:
        return (), (weight_error, None)
    whole = len(source.features) == w.shape[1]  # before any other shot
    errors = stats.output_error if stats is not None and whole else partial(relative_output_error, second_moment=source.moment)
    plain, own = (errors(w, matrix) for matrix in (sliced, narrow))
    note = f"output error of {block.consumer.path}: {plain:.3g} sliced, {own:.3g} as it is stored"
    return (note,), (weight_error, own)


def _elements(block: Block, counts: Counts) -> int:
    """Elements of keys and values per token, over all applications."""
    heads = block.heads
    if heads is None:
        return 0
    dim = counts[QK] * (2 if heads.pairs else 1) if QK in counts else heads.dim
    return counts.get(HEADS, heads.groups) * (dim + counts.get(V, heads.value_dim)) * len(block.consumer.applications)


def _aside(block: Block, counts: Counts, sizes: Mapping[Const, int]) -> tuple[int, int]:
    """(parameters, bytes) that go from the producers' biases, and that indices of what meets the block from outside bring."""
    parameters = size = 0
    for producer in block.producers:
        bias = producer.site.bias
        if bias is not None:
            change = int(resized(producer.axis, counts)) - producer.site.out_features
            parameters += change
            size += change * (sizes[bias] // bias.numel)
    axes = {side.axis for side in block.sides if resized(side.axis, counts) != size_of(side.axis)}
    return parameters, size + sum(_INDEX_BYTES * int(resized(axis, counts)) for axis in axes)


def refuse_without_data(job: BlockJob, methods: Methods, stats: Mapping[Site, SiteStats]) -> None:
    """SpecError at the method that needs calibration data where there is none."""
    wanted = sorted(statistic.value for statistic in block_method(methods, job.use.method).needs(job.use.spec))
    if wanted and job.block.consumer not in stats:
        raise SpecError(
            f"rule {job.rule.name}: {job.use.method} needs calibration data ({', '.join(wanted)}) and none was given",
            at=job.use.at,
            details=["pass calibration=... to compile, or --calibration FILE on the command line"],
        )


def shots_of(stage: Stage, methods: Methods) -> list[Stage]:
    """The stage once per shot of its block methods: all but the last prune only, everything else happens in the last."""
    pruning = {rule.name: use for rule in stage.rules if (use := of_block(rule, methods)) is not None}
    counts = {name: block_method(methods, use.method).shots(use.spec) for name, use in pruning.items()}
    most = max(counts.values(), default=1)
    found = []
    for left in range(most - 1, 0, -1):
        rules = tuple(rule if counts.get(rule.name, 0) > left else replace(rule, rewrite=()) for rule in stage.rules)
        found.append(replace(stage, rules=rules, tolerance=None))
    return [*found, stage]


# ------------------------------------------------------------------------------------------------------------- the graph


def narrowed(graph: Graph, outcomes: Iterable[Outcome]) -> Graph:
    """The graph with the patches of all outcomes, types inferred anew. VerifyError where a consumer's result would change its type."""
    patches = [outcome.patch for outcome in outcomes if outcome.patch is not None and outcome.reject is None]
    if not patches:
        return graph
    consts: dict[Const, Const] = {}
    nodes: dict[Node, tuple[Node, ...]] = {}
    added: dict[Const, tuple[Const, ...]] = {}
    inputs: dict[Value, Value] = {}
    for patch in patches:
        consts.update(patch.consts)
        inputs.update(patch.inputs)
        nodes.update(patch.nodes)
        added[patch.consts[patch.block.consumer.const]] = patch.added
    change: dict[Any, Value] = {**consts, **inputs}
    written = [rewired(new, change) for node in graph.nodes for new in nodes.get(node, (node,))]
    state = [item for const in graph.state for own in (consts.get(const, const),) for item in (own, *added.get(own, ()))]
    entries = tuple(
        replace(entry, value=inputs.get(entry.value, entry.value)) if entry.value else entry for entry in graph.signature.inputs
    )
    signature = replace(graph.signature, inputs=entries)
    narrow = retype(swept(replace(graph, signature=signature, nodes=tuple(written), state=tuple(state)), graph))
    _refuse_changed_borders(graph, narrow, patches)
    return narrow


def _refuse_changed_borders(before: Graph, after: Graph, patches: Sequence[Patch]) -> None:
    types = {value.name: value.type for node in after.nodes for value in node.outputs}
    for patch in patches:
        for application in patch.block.consumer.applications:
            value = application.output
            if value.name in types and str(types[value.name]) != str(value.type):
                raise VerifyError(f"{patch.block.name}: pruning changed %{value.name} from {value.type} to {types[value.name]}")
