"""The cells of a table as text, and the sentences below it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from bench.records import paired
from bench.report.rows import Method, Row, Setting
from bench.smoothing import bounds
from bench.text import DASH

POWER = 0.8  # chance at which a difference counts as one that could be shown
CHURN = 0.1  # share of images on which two methods also differ by chance


def label(name: str, names: Sequence[str], row: Row) -> str:
    """Name a row of a table: the method and its number of seeds; seed and hash of the run where two have one name."""
    text = name + (" †" if row.flags else "")
    if names.count(name) == 1:
        return text + (f" ({row.seeds} seeds)" if row.seeds > 1 else "")
    seed = "" if row.seed is None else f" seed {row.seed:.0f}"
    return f"{text}{seed} ({row.run.rpartition('-')[2]})"


def cells(setting: Setting, methods: Sequence[Method]) -> pd.DataFrame:
    """Format a table: percent with 95% intervals; a dash for a radius out of reach and for an unknown value."""
    rows = [m.row for m in methods]
    shown: dict[str, list[str]] = {"defense": [m.label for m in methods]}
    for r in setting.radii:
        title = "smoothed accuracy (r = 0)" if r == 0 else f"certified at r = {r:g}"
        shown[title] = [_accuracy(m, r) if r <= setting.reach else DASH for m in methods]
    shown |= {
        "family": [row.family or DASH for row in rows],
        "trains": [row.trains for row in rows],
        "base, clean": numbers([row.base_clean_accuracy for row in rows], ".1%"),
        "abstained": numbers([row.abstained for row in rows], ".1%"),
        "train (s)": numbers([row.train_seconds for row in rows], ",.1f"),
        "certify (s)": numbers([row.certify_seconds for row in rows], ",.1f"),
        "votes": numbers([row.votes for row in rows], ",.0f"),
        "GFLOPs / vote": numbers([row.flops_per_vote for row in rows], ".4g", 1e9),
        "trained here": numbers([row.trained_here for row in rows], ",.0f"),
        "trained elsewhere": numbers([row.trained_elsewhere for row in rows], ",.0f"),
        "parameters": numbers([row.parameters for row in rows], ",.0f"),
        "extra data": [DASH if setting.imported else row.extra_data or "no" for row in rows],
        "peak memory (MB)": numbers([row.peak_memory for row in rows], ",.0f", 1e6),
        "ACR": numbers([row.acr for row in rows], ".3f"),
    }
    return pd.DataFrame(shown)


def _accuracy(method: Method, radius: float) -> str:
    share = method.row.certified[radius]
    text = f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"
    return f"{text} =" if radius in method.level else text


def numbers(values: Sequence[float | None], form: str, unit: float = 1) -> list[str]:
    """Format numbers in a unit; a dash for one that is not known."""
    return [DASH if v is None else format(v / unit, form) for v in values]


def verdict(setting: Setting, methods: Sequence[Method]) -> str:
    """Say which method certifies the most images, and whether the table may be a result at all."""
    split = {
        "validation": "These are validation images, for choosing settings: not a result.",
        "train": "These are images of the training split, to measure overfitting: not a result.",
    }.get(setting.split, "")
    return " ".join(filter(None, [split, _best(setting, methods)]))


def notes(setting: Setting, methods: Sequence[Method]) -> str:
    """Explain in a few sentences what the table shows and what it cannot show."""
    beyond = bounds.printed_reach(setting.reach)  # rounded up, so that no certificate lies beyond what is printed
    sentences = [
        _settings(methods),
        _margin(setting, methods),
        _shown(methods),
        _marks(methods),
        f"With this many votes no image can be certified beyond r = {beyond} (a dash or no column).",
        "Grid noise: a certificate covers every image of integer pixel values within its radius."
        if setting.noise == "grid"
        else "",
        _target(setting),
        _versions(methods),
        _pictures(setting, methods),
        _trained(methods),
        _imported() if setting.imported else _heads(setting, methods),
        "Preset quick trains briefly: it ranks methods at a small budget, not at the budgets of their papers."
        if setting.preset == "quick"
        else "",
    ]
    return " ".join(filter(None, sentences))


def _best(setting: Setting, methods: Sequence[Method]) -> str:
    """Name the method that certifies the most images at the lowest radius above 0, and those level with it."""
    above = [r for r in setting.within if r > 0]
    if len(methods) == 1 or not above:
        return ""
    radius = above[0]
    best = max(methods, key=lambda m: m.row.certified[radius].value)
    others = [m.label for m in methods if radius in m.level and m is not best]
    rest = f"not significantly different: {', '.join(others)}" if others else "all other rows are significantly worse"
    share = best.row.certified[radius].value
    first = f"At r = {radius:g} {best.label} certifies the most images ({share:.1%}); {rest}."
    return first + _elsewhere(setting, methods, best)


def _elsewhere(setting: Setting, methods: Sequence[Method], best: Method) -> str:
    """Name the methods with more certified images than ``best`` at other radii."""
    leads: dict[str, list[str]] = {}
    for radius in setting.within:
        first = max(methods, key=lambda m: m.row.certified[radius].value)
        if first.row.certified[radius].value > best.row.certified[radius].value:
            leads.setdefault(first.label, []).append(f"{radius:g}")
    found = [f"{label} at r = {', '.join(radii)}" for label, radii in leads.items()]
    return f" The most elsewhere: {'; '.join(found)}." if found else ""


def _settings(methods: Sequence[Method]) -> str:
    """State the settings of training that names leave out."""
    named: dict[str, list[str]] = {}
    for m in methods:
        named.setdefault(m.training, []).append(m.label)
    named.pop("", None)
    found = [f"{', '.join(labels)}: {training}" for training, labels in named.items()]
    return f"Trained with {'; '.join(found)}; all else by the preset." if found else ""


def _margin(setting: Setting, methods: Sequence[Method]) -> str:
    shares = [m.row.certified[r] for m in methods for r in setting.within]
    widest = max((s.high - s.low for s in shares), default=0.0) / 2
    text = f"With {methods[0].row.images:.0f} images the margin of error is up to {100 * widest:.0f} points"
    if all(m.row.seeds == 1 for m in methods):
        return f"{text} (ranges: 95% Clopper-Pearson intervals)."
    spread = max((s.spread for s in shares), default=0.0)
    return (
        f"{text} (ranges: 95% Clopper-Pearson intervals at the mean over seeds, conservative where seeds disagree). "
        "Intervals and tests account for the choice of images, not for the choice of seeds: seeds of one method differ "
        f"by up to {100 * spread:.1f} points."
    )


def _shown(methods: Sequence[Method]) -> str:
    """State the smallest difference between two rows that this many images could show."""
    images, pairs = round(methods[0].row.images), max(1, len(methods) * (len(methods) - 1) // 2)
    level = paired.LEVEL / pairs
    best, usual = (paired.smallest_shown(images, level, POWER, churn) for churn in (0.0, CHURN))
    if best is None:
        return f"So few images cannot show any difference between two rows with {POWER:.0%} probability."
    found = f"at least {100 * best:.1f} points where the better row certifies every image that the other does"
    found += (
        f", and none with {POWER:.0%} probability where {CHURN:.0%} of the images also differ by chance"
        if usual is None
        else f", {100 * usual:.1f} points where {CHURN:.0%} of the images also differ by chance, half either way"
    )
    over = f"5% divided by {pairs} pairs, the strictest step of Holm's correction" if pairs > 1 else "5% level"
    return (
        f"The smallest difference that {images:,} images could show at {POWER:.0%} power, at any one radius: {found} "
        f"(McNemar's exact two-sided test, {over}; one seed a row)."
    )


def _marks(methods: Sequence[Method]) -> str:
    """Explain the mark of the rows level with the best."""
    if len(methods) == 1:
        return ""
    pairs = len(methods) * (len(methods) - 1) // 2
    over = f"all {pairs} pairs of rows; each column is corrected separately" if pairs > 1 else "the one pair"
    several = any(m.row.seeds > 1 for m in methods)
    test = "exact sign-flip (with one seed McNemar) tests" if several else "McNemar's exact tests"
    return (
        f"=: not significantly different from the best in that column ({test} on the same images, "
        f"{paired.LEVEL:.0%} level, Holm's correction over {over})."
    )


def _target(setting: Setting) -> str:
    """Explain what a run of target "correct" does not know."""
    if setting.target != "correct":
        return ""
    return (
        "Target correct: an image whose selected class is wrong cannot count as certified, so it gets no further "
        "votes. It has a prediction but no radius, and the model may abstain on it: 'abstained' is unknown (a dash)."
    )


def _versions(methods: Sequence[Method]) -> str:
    """Say that the noise differs between runs of several versions of grid noise."""
    versions = {r.identity.noise.grid_version for m in methods for r in m.records}
    if len(versions) == 1:
        return ""
    return (
        f"Grid noise is of {len(versions)} versions ({', '.join(sorted(map(str, versions)))}): their distribution is "
        "the same, but runs of different versions share no noise, even with one seed."
    )


def _pictures(setting: Setting, methods: Sequence[Method]) -> str:
    """State what reading changed in the pictures, as the records say."""
    said = [str(r.info.data.get(setting.split, "")) for m in methods for r in m.records]
    # Words alone: records are untrusted, and this line is part of pages.
    form = r"[\d,]+ (?:of its pictures: [\w ,.'-]+|rows of the [\w-]+ part, which has [\d,]+ in the complete data set)"
    found = dict.fromkeys(change for text in said for change in re.findall(form, text))
    return f"As recorded of the {setting.split} images' source: {'; '.join(found)}." if found else ""


def _trained(methods: Sequence[Method]) -> str:
    """Say which rows were trained in bfloat16."""
    rounded = [m.label for m in methods if any("bfloat16" in r.identity.defense.training_arithmetic for r in m.records)]
    who = "all rows" if len(rounded) == len(methods) else ", ".join(rounded)
    return f"Forward passes of training were computed in bfloat16 in {who}." if rounded else ""


def _imported() -> str:
    return (
        "Imported from released logs: sigma, votes and alpha are as stated at import; vote counts are unknown, and "
        "images are known by index only. A dash also means: not in the log. †: the log has defects, listed below."
    )


def _heads(setting: Setting, methods: Sequence[Method]) -> str:
    """Say where the head comes from where the base was trained on other classes, or not at all."""
    if setting.untrained_base:
        return "The base is an architecture without trained weights, so it has no accuracy of its own."
    headless = [m.row.base_clean_accuracy is None for m in methods]
    if not any(headless):
        return ""
    rest = "" if all(headless) else "; the others use a linear probe trained on clean images"
    return f"The base was trained on other classes: with a dash under 'base, clean' the defense has its own head{rest}."
