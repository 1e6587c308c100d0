"""Rules that produce findings: small functions, each with a value, a threshold and advice.

A rule takes the summary of one stage and yields at most one `Finding`, which names all layers that it applies
to. To add a rule, add a function to `RULES` of its module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from moe_trace.data.compiled_graph import BY_COMPILER
from moe_trace.data.schema import Stage
from moe_trace.read.findings import load, ranks, time
from moe_trace.read.findings.finding import Evidence, Finding, Rule

RUN_RULES: tuple[Rule, ...] = (*ranks.RUN_RULES, time.weights_bind, time.uncounted_flops)
"""Rules about the run as a whole, regardless of its stages."""
RULES: tuple[Rule, ...] = (*load.RULES, *ranks.RULES, *time.RULES, *RUN_RULES)


def find(evidence: Evidence) -> tuple[Finding, ...]:
    """Return all findings, worst first: errors, then by the time lost, then those without a known time."""
    found = _apply_rules(RULES, evidence)
    by_compiler = evidence.phases is not None and evidence.phases.provenance is not None
    return ranked(_with_provenance(finding) if by_compiler else finding for finding in found)


def _apply_rules(rules: Iterable[Rule], evidence: Evidence) -> list[Finding]:
    return [replace(finding, rule=rule.__name__) for rule in rules for finding in rule(evidence)]


def _with_provenance(finding: Finding) -> Finding:
    """Append the source of times inside compiled code to a finding about time."""
    if finding.severity != "time":
        return finding
    return replace(finding, sentence=f"{finding.sentence.removesuffix('.')}, {BY_COMPILER}.")


def find_apart(whole: Evidence, stages: Mapping[Stage, Iterable[Finding]]) -> tuple[Finding, ...]:
    """Combine the findings of several stages, each marked with its stage, and those about the run once."""
    names = {rule.__name__ for rule in RUN_RULES}
    found = _apply_rules(RUN_RULES, whole)
    for stage, findings in stages.items():
        found += [
            replace(finding, stage=stage, sentence=f"{stage.capitalize()}: {finding.sentence}")
            for finding in findings
            if finding.rule not in names
        ]
    return ranked(found)


def ranked(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sort findings worst first; equal costs stay in the order of the rules."""
    order = ("wrong", "time", "note")
    return tuple(sorted(findings, key=lambda f: (order.index(f.severity), -(f.cost_us or 0.0))))
