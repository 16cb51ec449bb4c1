from __future__ import annotations

from qface.progress import Lines, displayed, stage, track


def test_without_a_terminal_each_minute_brings_one_line() -> None:
    now, lines = [0.0], list[str]()
    with displayed(Lines(lines.append, lambda: now[0])):
        for _ in track(range(4), "calibrate"):
            now[0] += 40
        with stage("distill", 100, done=50) as advance:
            now[0] += 70
            advance("loss 0.5")
    assert lines == [
        "calibrate: 2/4, 0:01:20 left",
        "calibrate: 4/4, 0:00:00 left",
        "distill: 51/100, 0:57:10 left, loss 0.5",
    ]


def test_nothing_is_shown_unless_somebody_looks() -> None:
    assert list(track("ab", "letters")) == ["a", "b"]
