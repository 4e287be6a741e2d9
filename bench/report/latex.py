"""A report as LaTeX: ``table`` environments that need only booktabs and fit into a column of a two-column paper."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from bench.errors import shown
from bench.io.files import digest
from bench.report import attacked
from bench.report.envelopes import Envelope
from bench.report.published import heading as published_heading
from bench.report.rows import Method
from bench.report.shift import Cell, Shift
from bench.report.tables import Report, Table

PREAMBLE = (
    "% needs \\usepackage{booktabs}\n"
    "\\providecommand{\\certified}[2]{\\begin{tabular}[t]{@{}r@{}}#1\\\\[-1pt]{\\tiny #2}\\end{tabular}}\n"
)
LINE = "\\\\"  # ends a line
# Widths in points: a page's column (article, two columns), a value above its interval (\scriptsize and \tiny), a value
# with the sigma that was chosen, and the gap between two cells.
COLUMN, VALUE, CHOSEN, GAP = 229, 34, 46, 5
_ESCAPES = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"},
    **{
        "<": "\\textless{}",
        ">": "\\textgreater{}",
        "|": "\\textbar{}",
        "[": "{[}",
    },  # [ would be an argument of \\
    **{"=": "=\\allowbreak{}"},  # of settings in the name of a method
    **{"†": "$^\\dagger$", "—": "--"},
}


def render(report: Report) -> str:
    """Write all tables, best-sigma curves and splits compared as LaTeX."""
    parts = [*map(_table, report.tables), *map(_envelope, report.envelopes), *map(_shift, report.shifts)]
    return "\n".join([PREAMBLE, *parts])


def _table(table: Table) -> str:
    """Write the columns that a paper has room for."""
    setting, cells = table.setting, table.cells
    best = {r: _best(table, r) for r in setting.within} if len(table.methods) > 1 else {}
    accuracies = {
        f"{r:g}": [_accuracy(m, r, best.get(r, frozenset())) if r <= setting.reach else "--" for m in table.methods]
        for r in setting.radii
    }
    costs = {
        f"\\shortstack[r]{{{title}}}": [*map(_escape, cells[column])]
        for column, title in (
            ("base, clean", "base,\\\\clean"),
            ("trained here", "trained\\\\here"),
            ("GFLOPs / vote", "GFLOPs\\\\a vote"),
        )
    }
    seconds = zip(cells["train (s)"], cells["certify (s)"], strict=True)
    costs["\\shortstack[r]{train,\\\\certify (s)}"] = [
        f"\\certified{{{_escape(train)}}}{{{_escape(certify)}}}" for train, certify in seconds
    ]
    title = "certified accuracy in \\% at radius"
    blocks = [(title, pd.DataFrame(accuracies)), ("", pd.DataFrame(costs))]
    grid = _grid([_escape(m.label) for m in table.methods], blocks)
    notes = table.notes.replace("=: not", "Bold: the best, or not")
    said = _comment(setting.heading) + _comment(table.verdict) + _comment(notes)
    caption = f"{_escape(setting.heading)}. Certified accuracy above its 95\\% interval"
    caption += "; bold: the best of a column, and what does not differ significantly from it." if best else "."
    written = [said + _float(grid, caption, setting.key)]
    if len(table.published):
        heading = published_heading(setting)
        written.append(_comment(heading) + _float(_published(table), _escape(heading), f"{setting.key}-published"))
    if table.attacks.shown:
        written.append(_attacks(table))
    return "\n".join(written)


def _best(table: Table, radius: float) -> frozenset[str]:
    """Return the labels of the rows with the highest certified accuracy at a radius; none where there is no other."""
    values = {m.label: m.row.certified[radius].value for m in table.methods}
    top = max(values.values())
    return frozenset(label for label, value in values.items() if value == top > min(values.values()))


def _float(inner: str, caption: str, key: str) -> str:
    """Wrap a tabular into a floating table with a caption and a label; ``key`` identifies it among all tables."""
    return (
        f"\\begin{{table}}[t]\n\\centering\n\\caption{{{caption}}}\n\\label{{tab:{key[:8]}{key[64:]}}}\n{inner}"
        "\\end{table}\n"
    )


def _attacks(table: Table) -> str:
    """Write certified and attacked accuracy at each radius, and the budgets of the attacks below."""
    shown, columns = table.attacks.shown, {}
    radii = sorted({r for one in shown for r in one.radii})
    for radius in radii:
        for title in ("certified", "attacked"):
            cells = []
            for one in shown:
                attack = one.attack
                rate = attack.attacked_accuracy(radius) if title == "attacked" else attack.certified(one.record, radius)
                value = _interval(f"{100 * rate.value:.1f}", rate.low, rate.high)
                cells.append(value if radius in one.radii else "--")
            columns[f"\\shortstack[r]{{r = {radius:g}\\\\{title}}}"] = cells
    grid = _grid([_escape(one.label) for one in shown], [("accuracy in \\%", pd.DataFrame(columns))])
    inner = f"{grid}{{\\scriptsize {_escape(attacked.budgets(shown))}\\par}}\n"
    caption = f"{_escape(table.setting.heading)}. Certified and attacked accuracy, above their 95\\% intervals."
    return _comment(table.attacks.note) + _float(inner, caption, f"{table.setting.key}-attacks")


def _accuracy(method: Method, radius: float, best: frozenset[str]) -> str:
    share = method.row.certified[radius]
    value = f"{100 * share.value:.1f}"
    if radius in method.level or method.label in best:
        value = f"\\textbf{{{value}}}"
    return _interval(value, share.low, share.high)


def _published(table: Table) -> str:
    facts = table.published.map(_escape).set_axis([*map(_escape, table.published)], axis=1)
    numbers = facts.shape[1] - 2
    text = f"p{{{(0.96 - 0.105 * numbers) / 2:.2f}\\columnwidth}}"
    body = facts.to_latex(index=False, escape=False, column_format=f"@{{}}{text}{'r' * numbers}{text}@{{}}")
    return f"{{\\tiny\\setlength{{\\tabcolsep}}{{2pt}}%\n{body}}}\n"


def _envelope(envelope: Envelope) -> str:
    note = _comment(envelope.note)
    if not envelope.curves:
        return note
    cells: dict[str, list[str]] = {"among": [", ".join(f"{s:g}" for s in c.sigmas) for c in envelope.curves]}
    for radius in envelope.radii:
        points = [curve.at(radius) for curve in envelope.curves]
        cells[f"{radius:g}"] = [
            _interval(f"{100 * p.value:.1f} ({p.sigma:g})", p.low, p.high) if p else "--" for p in points
        ]
    title = "certified in \\% at radius (sigma chosen)"
    names = [_escape(curve.label) for curve in envelope.curves]
    grid = _grid(names, [(title, pd.DataFrame(cells))], CHOSEN)
    caption = f"{_escape(envelope.heading)}, above its 95\\% interval."
    return _comment(envelope.heading) + note + _float(grid, caption, f"{envelope.section}-sigmas")


def _shift(shift: Shift) -> str:
    blocks = []
    for radius in shift.radii:
        cells = {
            f"\\shortstack[r]{{{_escape(split).replace('-', '-' + LINE)}}}": [
                _unpaired(row.at(split, radius)) for row in shift.rows
            ]
            for split in shift.images
        }
        blocks.append((f"certified accuracy in \\% at radius {radius:g}", pd.DataFrame(cells)))
    names = [_escape(row.label) for row in shift.rows]
    caption = f"{_escape(shift.title)}. Certified accuracy above its 95\\% interval; *: differs significantly from "
    caption += f"{_escape(shift.reference)}."
    return _comment(shift.title) + _comment(shift.note) + _float(_grid(names, blocks), caption, digest(shift.title))


def _unpaired(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    mark = "*" if cell.difference and cell.difference.significant else ""
    return _interval(f"{100 * cell.value:.1f}{mark}", cell.low, cell.high)


def _escape(text: object) -> str:
    """Escape untrusted text of a record."""
    return "".join(_ESCAPES.get(c, c) for c in shown(" ".join(str(text).split())))


def _comment(text: str) -> str:
    """Write a line that LaTeX skips; none for no text."""
    return f"% {shown(' '.join(text.split()))}\n" if text else ""


def _interval(value: str, low: float, high: float) -> str:
    """Set a value above its interval, in percent."""
    return f"\\certified{{{value}}}{{[{100 * low:.1f}, {100 * high:.1f}]}}"


def _grid(names: Sequence[str], blocks: Sequence[tuple[str, pd.DataFrame]], value: int = VALUE) -> str:
    """Write a table of blocks (title, columns) below each other, each with a row a name; cells are LaTeX already.

    A block with more columns of ``value`` points than fit side by side is cut into several.
    """
    at_once = int(0.88 * COLUMN / (value + GAP))
    cut = [
        (title if start == 0 else "", cells.iloc[:, start : start + at_once])
        for title, cells in blocks
        for start in range(0, cells.shape[1], at_once)
    ]
    width = max(cells.shape[1] for _, cells in cut)
    share = 1 - width * (value + GAP) / COLUMN
    lines = [f"\\begin{{tabular}}{{@{{}}p{{{min(share, 0.3):.2f}\\columnwidth}}{'r' * width}@{{}}}}"]
    for number, (title, cells) in enumerate(cut):
        lines.append("\\midrule" if number else "\\toprule")
        end = "\\\\[1pt]" if number else "\\\\"
        if title:
            lines.append(f"& \\multicolumn{{{cells.shape[1]}}}{{c}}{{{title}}} \\\\[1pt]")
        empty = [""] * (width - cells.shape[1])
        lines.append(" & ".join(["" if number else "defense", *map(str, cells), *empty]) + f" {end}")
        lines.append("\\midrule")
        lines += [
            " & ".join([name, *row, *empty]) + f" {end}"
            for name, row in zip(names, cells.itertuples(index=False), strict=True)
        ]
    inner = "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])
    return f"{{\\scriptsize\\setlength{{\\tabcolsep}}{{{GAP / 2:g}pt}}%\n{inner}}}\n"
