"""The page: index.html, self-contained."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jinja2

from rope_lm.analysis import methods, tables
from rope_lm.analysis.comparison import Arm, Comparison, Contrast
from rope_lm.analysis.estimates import fewest_pairs
from rope_lm.analysis.findings import Findings, Section
from rope_lm.analysis.published import FINDINGS, Finding
from rope_lm.analysis.tables import Table

# Captions by kind of figure.
CAPTIONS = {
    "loss": "Validation loss of each arm: the mean over seeds. The band is the 95% interval of that mean.",
    "speedup": "Speed-up of {treatment} over each arm, to that arm's median final loss, with 95% intervals. The grey "
    "band is the noise floor.",
    "profile": "The same speed-up as a function of the target. The single number above corresponds to the right end of "
    "each line; a line ends early if {treatment} does not reach the target on every seed. Bands are 95% intervals; the "
    "grey band is the noise floor.",
    "beyond": "Loss on the same validation text, read in longer and longer pieces that do not overlap. The runs were "
    "trained on the shortest. Thin lines: rotary scaled at evaluation, without training. A line ends where the "
    "encoding has no vectors for further positions.",
    "position": "Loss by position in the longest pieces, which shows whether an encoding gains at early or late "
    "tokens. The vertical line is the trained length.",
    "distance": "Share of attention by distance of the key: the mean over layers, heads and seeds, for queries in the "
    "second half of validation rows. Bins double in width.",
    "heads": "Mean attended distance, one mark per head and seed, by layer.",
}
GRID_CAPTIONS = {
    "tuning": "Final validation loss at each peak learning rate, mean over {seeds} tuning seeds. A ring marks the "
    "best of each arm.",
    "rates": "Speed-up of {treatment} with both arms at one learning rate and, on the right, with each arm at its own "
    "best. It comes from the {seeds} tuning seeds: it shows how the answer depends on the learning rate, and is not a "
    "test.",
}
FACTOR_CAPTIONS = {
    "factor": "Speed-up of {treatment} to each arm's median final loss, with 95% intervals; hollow if it is a bound. "
    "The grey bars are the noise floors."
}


class Chapter(NamedTuple):
    """A part of the page about one setting, grid or factor."""

    title: str
    drawings: list[tuple[str, str]]  # SVG and caption of each figure
    tables: list[Table]
    section: Section | None = None
    sentences: Sequence[tuple[str, str]] = ()  # verdict, and the same in words
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """Everything that page.html shows."""

    findings: Findings
    claims: Table
    matrix: Table
    factors: list[Chapter]
    settings: list[Chapter]
    grids: list[Chapter]
    measured: list[tuple[str, str, str]]  # where, setting, finding: rows below those of `published`
    runs: Table
    published: list[Finding]
    statistics: str
    verdicts: tuple[str, ...] = ("supported", "refuted", "equivalent", "inconclusive")


def render(findings: Findings, drawings: Mapping[str, str]) -> str:
    """Return the page as HTML. `drawings` are the figures as SVG, by name."""

    def drawn(prefix: str, captions: Mapping[str, str], seeds: int = 0) -> list[tuple[str, str]]:
        return [
            (drawings[prefix + kind], caption.format(treatment=findings.treatment, seeds=seeds))
            for kind, caption in captions.items()
            if prefix + kind in drawings
        ]

    page = Page(
        findings=findings,
        claims=tables.claims(findings.claims),
        matrix=tables.matrix(findings),
        factors=[
            Chapter(
                f"{factor.sweep.name}: speed-up against {factor.name}",
                drawn(factor.prefix, FACTOR_CAPTIONS),
                [tables.factor(factor)],
            )
            for factor in findings.factors
        ],
        settings=[
            _chapter(section, drawn(section.prefix, CAPTIONS))
            for section in findings.sections
            if not section.sweep.grid
        ],
        grids=[
            Chapter(
                section.sweep.title,
                drawn(section.prefix, GRID_CAPTIONS, len(section.tunings[0].seeds)),
                [tables.tuning(section.tunings)]
                + ([tables.sensitivity(section.sensitivities, findings.treatment)] if section.sensitivities else []),
            )
            for section in findings.sections
            if section.tunings
        ],
        measured=[_measured(comparison) for comparison in findings.comparisons if comparison.arms],
        runs=tables.runs(findings),
        published=FINDINGS,
        statistics=methods.STATISTICS,
    )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rope_lm.analysis", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(page=page)


def _chapter(section: Section, drawings: list[tuple[str, str]]) -> Chapter:
    comparison = section.comparison
    if not comparison or not comparison.arms:
        return Chapter(section.sweep.title, drawings, [], section)
    return Chapter(
        section.sweep.title,
        drawings,
        [tables.numbers(comparison)],
        section,
        [(contrast.steps.verdict, _sentence(comparison, arm, contrast)) for arm, contrast in comparison.tested],
        [_noise(comparison), _lowest_p(comparison)],
    )


def _sentence(comparison: Comparison, arm: Arm, contrast: Contrast) -> str:
    """Return the verdict on one baseline in words."""
    s, treatment = contrast.steps, comparison.treatment
    end = {
        "supported": f"{treatment} converges faster than {arm.name}",
        "refuted": f"{treatment} converges more slowly than {arm.name}",
        "equivalent": f"{treatment} converges as fast as {arm.name}",
        "inconclusive": f"it is open whether {treatment} converges faster than {arm.name}",
    }[s.verdict]
    common = ", which every seed of both reaches" if s.target == contrast.common.steps.target else ""
    certainty = f" (95% interval {s.low:.2f} to {s.high:.2f}, {s.n} seeds)"
    if math.isnan(s.low):
        certainty = " (without an interval, which takes two seeds that differ)"
    bound = f" Seeds of {arm.name} that did not reach it count with {arm.run.steps:,} steps: this is a lower bound."
    return (
        f"{end}: {s.mean:.2f} times as fast{certainty} to a loss of {s.target:.3f} {comparison.unit}{common}."
        f"{bound if s.bound == 'lower' else ''}"
    )


def _noise(comparison: Comparison) -> str:
    """Return the noise floor in words; "" if there are too few seeds for it."""
    floor = comparison.floor
    if math.isnan(floor.low):
        return ""
    found = f" {floor.positives} of {floor.tested} arms were found faster or slower than themselves."
    return (
        f"The noise floor (the grey band): arms compared with themselves on other seeds (A/A, {floor.pairs} pairs in "
        f"all) give a speed-up between {floor.low:.2f} and {floor.high:.2f} in 95% of comparisons of "
        f"{comparison.pairs} pairs."
        f"{found if floor.tested else ''}"
    )


def _lowest_p(comparison: Comparison) -> str:
    """Return the lowest p that is possible, in words; "" if nothing was tested."""
    if not comparison.tested:
        return ""
    pairs, arms = comparison.pairs, len(comparison.tested)
    lowest = 2.0 ** (1 - pairs)
    corrected = f", nor below {min(1, arms * lowest):.4g} after the correction over {arms} arms" if arms > 1 else ""
    more = f", and each of {arms} takes {fewest_pairs(arms)}" if arms > 1 else ""
    return (
        f"With {pairs} seeds it cannot be below {lowest:.4g}{corrected}, whatever the data: for p below 0.05 one "
        f"comparison takes {fewest_pairs(1)} seeds or more{more}."
    )


def _measured(comparison: Comparison) -> tuple[str, str, str]:
    """Return a comparison as a row of the table of published findings."""
    run = comparison.arms[0].run
    rates = ", ".join(f"{arm.run.learning_rates[0]:g}" for arm in comparison)
    setting = (
        f"{run.objective} language modelling, {run.attention} attention, {run.manifest['parameters']:,} parameters, "
        f"{run.config['data']['name']}, length {run.config['data']['length']}, {run.steps:,} steps, "
        f"{len(run.curves)} seeds, peak learning rates {rates}"
    )
    finals = ", ".join(f"{arm.name} {arm.final.mean:.3f}" for arm in comparison)
    return comparison.sweep.title, setting, f"{comparison.unit}: {finals}"
