"""The look of a method in figures: colour, marker and line style by its name, so that it is the same in every figure.

Defenses that come with certbench have numbers of their own in a fixed list; other names, such as variants with
settings, have one by their hash. The look of a defense in the list depends on nothing else. That of another name does
where two methods of one figure would have one colour, or look the same without colour: the later by name then takes
another.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping

# Append only: a name's place is its look.
KNOWN = (
    *("none", "retrain", "full", "lora", "head", "denoiser", "joint", "coordinator", "two-stage", "prompt", "adapter"),
    *("bitfit", "diffusion", "finetuned-diffusion"),
)
# Okabe and Ito's palette for colour-blind readers, then as many of Tol's muted and vibrant colours as there are more
# names above. Line styles and markers differ too, for print without colour.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#882255", "#999933", "#332288", "#44AA99", "#AA4499", "#661100", "#888888"),
)
STYLES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX*<>"
NUMBERS = 1680  # of hashed names, a multiple of what follows, so that no look is more frequent than others
# Numbers that are equal modulo these look the same without colour: for Matplotlib 10 markers and 4 styles, on a page
# 16 symbols, since dashes distinguish sigmas there.
UNCOLOURED = (20, 16)


def colour(number: int) -> str:
    """Return the colour of a look."""
    return COLOURS[number % len(COLOURS)]


def number(name: str) -> int:
    """Return the number of a method's look, by its name alone."""
    if name in KNOWN:
        return KNOWN.index(name)
    return len(KNOWN) + int(hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest(), 16) % NUMBERS


def numbers(named: Mapping[str, str]) -> dict[str, int]:
    """Return the look of each label in one figure, all different; ``named``: the method's name of each label.

    A label has the look of its name, or, where several have one name, of itself.
    """
    several = Counter(named.values())
    keys = {label: name if several[name] == 1 else label for label, name in named.items()}
    found: dict[str, int] = {}
    for name in sorted(set(keys.values()), key=lambda name: (name not in KNOWN, name)):
        first, taken = number(name), found.values()
        colours = {n % len(COLOURS) for n in taken}
        if name not in KNOWN and len(colours) < len(COLOURS):
            first = next(n for n in itertools.count(first) if n % len(COLOURS) not in colours)
        same_colour = [first + i * len(COLOURS) for i in range(NUMBERS)]
        clear = [n for n in same_colour if all(n % m not in {t % m for t in taken} for m in UNCOLOURED)]
        found[name] = next(n for n in [*clear, *same_colour] if n not in taken)
    return {label: found[key] for label, key in keys.items()}
