"""Notes on options of a command that have no effect, or may be meant differently."""

from __future__ import annotations

from collections.abc import Sequence

from bench.errors import BenchError, note
from bench.runs.plan import SCHEDULE, UNTRAINED, Plan
from bench.smoothing import bounds

LARGE = 2.0  # noise, in pixels of [0, 1], through which no image is recognised


def check_effects(plans: Sequence[Plan]) -> None:
    """Refuse options of a command that have no effect, and print a note on those that may be meant differently.

    Not part of ``make_plans``, since that also reads the arguments of records. Raises BenchError.
    """
    for text in remarks(plans):
        note(text)


def remarks(plans: Sequence[Plan]) -> list[str]:
    """Return the notes of ``check_effects``. Raises BenchError as it does."""
    given, found = plans[0].options, []
    trained = [f"--objective {given.objective}"] if given.objective != "gaussian" else []
    if trained and given.weights:
        raise BenchError(f"{trained[0]} has no effect with --weights, which are trained already; leave one of them out")
    trained += [f"--train-sigma {given.train_sigma:g}"] if given.train_sigma is not None else []
    kinds = {plan.cls.kind(plan.config) for plan in plans}
    # A defense that trains nothing may still be made for a noise level.
    if trained and kinds <= ({"none"} if trained[0].startswith("--train-sigma") else set(UNTRAINED)):
        names = ", ".join(dict.fromkeys(plan.defense for plan in plans))
        raise BenchError(f"{trained[0]} has no effect: {names} trains nothing; leave it out")
    if given.weights:
        found += [f"{option} is only recorded: --weights are trained already" for option in trained]
        unused = [f"--set {k}={v}" for plan in plans for k, v in plan.changed.items() if k in SCHEDULE]
        found += [f"{option} has no effect: --weights are trained already" for option in dict.fromkeys(unused)]
    if given.target == "label" and given.n0 is not None:
        found.append(f"--n0 {given.n0} has no effect: with --target label no votes select the class")
    if given.radii is not None:
        # The noise's error, which is below 1e-12 and not known yet, lowers the reach by as little.
        within = max(plan.procedure.largest_radius(plan.sigma) for plan in plans)
        if beyond := [f"{r:g}" for r in plans[0].radii if r > within]:
            found.append(
                f"--radii {', '.join(beyond)}: a dash in tables, since no image can be certified beyond "
                f"{bounds.printed_reach(within)} with {plans[0].procedure.n:,} votes at alpha {given.alpha:g}"
            )
    levels = [("--sigma", plan.sigma) for plan in plans] + [("--train-sigma", given.train_sigma or 0.0)]
    return found + [large(option, level) for option, level in dict.fromkeys(levels) if level > LARGE]


def large(option: str, level: float) -> str:
    """Hint that a noise level is probably meant in other units."""
    return f"{option} {level:g}: pixels are in [0, 1], so {level:g} of 255 levels are {option} {level / 255:.4g}"
