"""A released log in Cohen et al.'s format: twelve images at step 10, ten certified, one wrong, one abstained."""

from __future__ import annotations

import math

from scipy import stats

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
COUNTS = [780, 800, 900, 950, 990, 1000, 999, 998, 790, 850, 920]


def radius(count: int, n: int = 1000, alpha: float = 0.001, sigma: float = 0.25) -> float:
    """Cohen et al.'s radius in scipy's words, not ours."""
    return float(sigma * stats.norm.ppf(stats.beta.ppf(alpha, count, n - count + 1)))


def down(value: float) -> str:
    return f"{math.floor(value * 1e6) / 1e6:.6f}"


ROWS = [[str(10 * i), str(i % 10), str(i % 10), down(radius(c)), "1", "0:00:15.42"] for i, c in enumerate(COUNTS)]
ROWS[1][2], ROWS[1][4] = "7", "0"
ROWS.append(["110", "1", "-1", "0.0", "0", "15.4"])


def text(rows: list[list[str]], header: str = HEADER) -> str:
    return "\n".join([header, *("\t".join(r) for r in rows)]) + "\n"


def change(row: int, column: int, value: str) -> str:
    rows = [list(r) for r in ROWS]
    rows[row][column] = value
    return text(rows)
