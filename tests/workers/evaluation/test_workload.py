"""How long an evaluation will take is said after its first seconds."""

from range_store.formatting import format_count, format_duration
from workers.evaluation.settings import EvaluationSettings
from workers.evaluation.workload import Estimate, Workload
from workers.fitting.progress import Progress

SWEEP = EvaluationSettings(rankings=("max", "probe"), top_fractions=(0.1, 0.2, 0.3), taus=(1.0, 2.5), layers="all")


def estimates(work: Workload, *seen: tuple[str, float, float]) -> list[str]:
    """What an estimate says after progress of (phase, seconds, share)."""
    lines: list[str] = []
    estimate = Estimate(work, lines.append)
    for phase, seconds, share in seen:
        estimate(Progress(phase, 0, 100, seconds, 0, share))
    return lines


def test_the_size_is_told_in_words() -> None:
    assert str(Workload(SWEEP, 1680, 12, 4, 7600)) == (
        "1,680 settings, each for 4 targets: 6,720 erasures of 7,600 texts"
    )
    assert str(Workload(SWEEP, 1, 1, 1, 1, 1)).startswith("1 setting, each for 1 target: 1 erasure of 1 text, and 1 to")


def test_the_first_seconds_tell_how_long_the_rest_takes() -> None:
    work = Workload(SWEEP, 36, 12, 4, 1000)
    assert estimates(work, ("measuring", 1, 0.001), ("measuring", 5.9, 0.0069)) == []
    assert estimates(work, ("measuring", 1, 0.001), ("measuring", 11, 0.011), ("measuring", 20, 0.02)) == [
        "this will take about 16 min more"
    ]
    assert estimates(work, ("measuring", 0, 0.0), ("measuring", 6, 0.5)) == [], "six seconds are not worth a line"
    assert estimates(work, ("measuring", 0, 0.5), ("measuring", 10, 0.51)) == ["this will take about 8 min more"], (
        "resumed"
    )


def test_beyond_an_hour_what_to_cut_is_named_by_its_weight() -> None:
    (line,) = estimates(Workload(SWEEP, 36, 12, 4, 1000), ("measuring", 0, 0.0), ("measuring", 6, 0.001))
    assert line.startswith("warning: this will take about 1 h 40 min more (36 settings")
    options = "--layer (12), --target (4), --top-fraction (3), --tau (2), --ranking (2), --method (2)"
    assert f"fewer texts (--max-test-rows, now 1,000), or less of {options}" in line
    assert "the same command resumes it" in line


def test_choosing_settings_foretells_the_measuring_too() -> None:
    work = Workload(SWEEP, 36, 12, 4, texts=900, selection_texts=100)
    assert estimates(work, ("choosing settings", 0, 0.0), ("choosing settings", 10, 0.5), ("measuring", 20, 0.5)) == [
        "this will take about 3 min more"
    ]
    assert estimates(work, ("choosing settings", 0, 0.0), ("choosing settings", 4, 1.0), ("measuring", 4, 0.0),
                ("measuring", 14, 0.1)) == ["this will take about 2 min more"]  # fmt: skip


def test_numbers_and_times_read_as_people_write_them() -> None:
    assert [format_count(number, "text") for number in (0, 1, 1680)] == ["0 texts", "1 text", "1,680 texts"]
    assert format_count(2, "class", "classes") == "2 classes"
    times = [(0.4, "0 s"), (59, "59 s"), (90, "2 min"), (3599, "1 h"), (3600, "1 h"), (12_000, "3 h 20 min")]
    assert [format_duration(seconds) for seconds, _ in times] == [said for _, said in times]
    assert format_duration(5 * 86_400) == "5 days"
