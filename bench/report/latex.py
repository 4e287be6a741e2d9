"""Tables as LaTeX that needs booktabs alone and fits into a column of a two-column paper."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

PREAMBLE = (
    "% needs \\usepackage{booktabs}\n"
    "\\providecommand{\\certified}[2]{\\begin{tabular}[t]{@{}r@{}}#1\\\\[-1pt]{\\tiny #2}\\end{tabular}}\n"
)
# Points: of a column (article, two columns), of a value above its interval (\scriptsize and \tiny), of one with the
# sigma that was chosen, and of what is between two.
COLUMN, VALUE, CHOSEN, BETWEEN = 229, 34, 46, 5
_ESCAPES = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"},
    **{"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", "[": "{[}"},  # a [ at a row's begin is no text
    **{"=": "=\\allowbreak{}"},  # of settings in the name of a method
    **{"†": "$^\\dagger$", "—": "--"},
}


def escape(text: object) -> str:
    """Text of a record, which anyone may have written, as LaTeX that prints it."""
    return "".join(_ESCAPES.get(c, c) for c in " ".join(str(text).split()))


def comment(text: str) -> str:
    """A line that LaTeX skips."""
    return f"% {' '.join(text.split())}\n"


def interval(value: float, low: float, high: float, best: bool = False, more: str = "") -> str:
    """An accuracy in percent above its interval; ``best`` in bold."""
    first = f"\\textbf{{{100 * value:.1f}}}" if best else f"{100 * value:.1f}"
    return f"\\certified{{{first}{more}}}{{[{100 * low:.1f}, {100 * high:.1f}]}}"


def table(names: Sequence[str], blocks: Sequence[tuple[str, pd.DataFrame]], value: int = VALUE) -> str:
    """One table with a row for each name in each block of columns, whose cells and titles are LaTeX already.

    A block has a heading over its columns, empty for none, and is cut where more columns of ``value`` points stand side
    by side than fit.
    """
    at_once = int(0.88 * COLUMN / (value + BETWEEN))
    cut = [
        (title if start == 0 else "", cells.iloc[:, start : start + at_once])
        for title, cells in blocks
        for start in range(0, cells.shape[1], at_once)
    ]
    width = max(cells.shape[1] for _, cells in cut)
    share = 1 - width * (value + BETWEEN) / COLUMN
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
    return f"{{\\scriptsize\\setlength{{\\tabcolsep}}{{{BETWEEN / 2:g}pt}}%\n{inner}}}\n"
