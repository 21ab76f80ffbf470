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
    """The amount of work of an evaluation.

    Args:
        n_settings: combinations of settings.
        groups, targets: number of groups of layers, and of targets.
        texts: number of texts to measure. selection_texts: number of texts to select settings on.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        n_settings: int,
        groups: int,
        targets: int,
        texts: int,
        selection_texts: int = 0,
    ) -> None:
        self.n_settings, self.targets, self.texts, self.selection_texts = n_settings, targets, texts, selection_texts
        self._factors = {
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
        settings, erasures = self.n_settings, self.n_settings * self.targets
        selection = f", and {self.selection_texts:,} to choose settings on" if self.selection_texts else ""
        return (
            f"{format_count(settings, 'setting')}, each for {format_count(self.targets, 'target')}: "
            f"{format_count(erasures, 'erasure')} of {format_count(self.texts, 'text')}{selection}"
        )

    def advice(self) -> str:
        """How to reduce the work: the options that multiply it, those that multiply it most first."""
        factors = sorted(self._factors.items(), key=lambda factor: -factor[1])
        named = ", ".join(f"{option} ({count})" for option, count in factors if count > 1)
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
            left += seconds / share * work.texts / work.selection_texts
        if left >= LONG_SECONDS:
            self._say(
                f"warning: this will take about {format_duration(left)} more ({work}). To shorten it: {work.advice()}. "
                "It can be stopped: the same command resumes it"
            )
        elif left >= SHORT_SECONDS:
            self._say(f"this will take about {format_duration(left)} more")
