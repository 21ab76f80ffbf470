"""How much work an evaluation is: its size, told before it begins, and an estimate, after the first seconds of it."""

from collections.abc import Callable

from range_store.formatting import format_count, format_duration
from workers.evaluation.measure import MeasureProgress
from workers.evaluation.settings import EvaluationSettings

SEEN_SECONDS = 5.0
"""Seconds of measuring that an estimate is made from."""
TOLD_SECONDS = 60.0
"""An estimate of less is not worth telling."""
LONG_SECONDS = 3600.0
"""An evaluation that takes longer is warned of."""


class Workload:
    """The settings, targets and texts of an evaluation.

    Args:
        groups, targets: how many groups of layers and targets there are.
        texts: how many are measured. choosing: how many settings are chosen on.
    """

    def __init__(
        self, settings: EvaluationSettings, n_settings: int, groups: int, targets: int, texts: int, choosing: int = 0
    ) -> None:
        self.n_settings, self.targets, self.texts, self.choosing = n_settings, targets, texts, choosing
        self._parts = {
            "--layer": groups,
            "--top-fraction": len(settings.top_fractions),
            "--tau": len(settings.taus),
            "--ranking": len(settings.rankings),
            "--positions": len(settings.positions),
            "--replacement": len(settings.replacements),
            "--method": len(settings.methods),
            "--target": targets,
        }

    def __str__(self) -> str:
        chosen = f", and {self.choosing:,} to choose settings on" if self.choosing else ""
        return (
            f"{format_count(self.n_settings, 'setting')}, each for {format_count(self.targets, 'target')}: "
            f"{format_count(self.n_settings * self.targets, 'erasure')} of {format_count(self.texts, 'text')}{chosen}"
        )

    def advice(self) -> str:
        """Options that make it long, those that multiply it most first."""
        parts = sorted(self._parts.items(), key=lambda part: -part[1])
        named = ", ".join(f"{option} ({count})" for option, count in parts if count > 1)
        return f"fewer texts (--max-test-rows, now {self.texts:,})" + (f", or less of {named}" if named else "")


class Estimate:
    """Watches progress, and tells once how long the whole takes.

    Args:
        tell: called with one line.
    """

    def __init__(self, work: Workload, tell: Callable[[str], None]) -> None:
        self._work, self._tell = work, tell
        self._what, self._told = "", False

    def __call__(self, what: str, now: MeasureProgress) -> None:
        """Told of progress; `what` is "choosing settings" first, if settings are chosen, and then "measuring"."""
        if what != self._what:
            self._what, self._first = what, now
        seconds, share = now.seconds - self._first.seconds, now.share - self._first.share
        if self._told or seconds < SEEN_SECONDS or share <= 0:
            return
        self._told = True
        work = self._work
        left = seconds * (1 - now.share) / share
        if what != "measuring":
            left += seconds / share * work.texts / work.choosing
        if left >= LONG_SECONDS:
            self._tell(
                f"warning: this takes about {format_duration(left)} more ({work}). To shorten it: {work.advice()}. "
                "It can be stopped: the same command goes on where it was"
            )
        elif left >= TOLD_SECONDS:
            self._tell(f"this takes about {format_duration(left)} more")
