"""How much work an evaluation is: its size in words, and an estimate of its duration after the first seconds."""

from collections.abc import Callable

from range_store.formatting import format_count, format_duration
from workers.evaluation.settings import EvaluationSettings
from workers.fitting.progress import Progress

MEASURED_SECONDS = 5.0
"""Seconds of progress that an estimate is made from."""
SHORT_SECONDS = 60.0
"""Shorter estimates are not reported."""
LONG_SECONDS = 3600.0
"""Longer estimates come with a warning, and with advice on how to make the evaluation shorter."""


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
    """Watches the progress of an evaluation, and says once how long the whole will take.

    Args:
        say: called with one line.
    """

    def __init__(self, work: Workload, say: Callable[[str], None]) -> None:
        self._work, self._say = work, say
        self._first: Progress | None = None
        self._said = False

    def __call__(self, now: Progress) -> None:
        """Take in progress of the phase "choosing settings", if settings are chosen, and then of "measuring"."""
        if self._first is None or self._first.phase != now.phase:
            self._first = now
        seconds, share = now.seconds - self._first.seconds, now.share - self._first.share
        if self._said or seconds < MEASURED_SECONDS or share <= 0:
            return
        self._said = True
        work = self._work
        left = seconds * (1 - now.share) / share
        if now.phase != "measuring":
            left += seconds / share * work.texts / work.choosing
        if left >= LONG_SECONDS:
            self._say(
                f"warning: this will take about {format_duration(left)} more ({work}). To shorten it: {work.advice()}. "
                "It can be stopped: the same command resumes it"
            )
        elif left >= SHORT_SECONDS:
            self._say(f"this will take about {format_duration(left)} more")
