"""Rates, remaining times, the pace of reports, and their wording, without a clock or a terminal."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits._table import printable
from fewbits.cli.formatting import NAME_WIDTH, bar_line, duration, log_line
from fewbits.cli.meter import Meter, Pace, Reading
from fewbits.selection.progress import Step

MILLISECONDS = 1000
SLACK = 1 + 1e-9

#: Milliseconds between two steps, and the work done in them.
strides = st.tuples(st.integers(0, 100_000), st.integers(0, 10**12))


@st.composite
def runs(draw, activity="convert"):
    """Draw the steps and times of a finished activity."""
    done, now = draw(st.integers(0, 10**12)), draw(st.integers(0, 10**9))
    at = [(now, done)]
    for passed, more in draw(st.lists(strides, max_size=30)):
        now, done = now + passed, done + more
        at.append((now, done))
    return [(Step(activity, f"t{i}", d, done), t / MILLISECONDS) for i, (t, d) in enumerate(at)]


def readings(run):
    meter = Meter()
    return [meter.read(step, now) for step, now in run]


def reported(run, first, every):
    """The reported readings of a run, with their times."""
    meter, pace = Meter(), Pace(first, every)
    found = []
    for step, now in run:
        reading = meter.read(step, now)
        if pace.is_due(reading, now):
            found.append((reading, now))
    return found


@given(runs())
def test_readings_never_go_back_and_end_with_everything_done(run):
    found = readings(run)
    assert all(a.done <= b.done <= b.total for a, b in pairwise(found))
    assert all(reading.rate is None or reading.rate > 0 for reading in found)
    assert all(reading.seconds_left is None or reading.seconds_left >= 0 for reading in found)
    last = found[-1]
    assert (last.done, last.is_finished, last.seconds_left) == (last.total, True, 0)


@given(runs())
def test_the_rate_is_between_the_least_and_the_largest_rate_of_the_steps(run):
    marks = [(run[0][1], run[0][0].done)]
    for step, now in run:  # from one time at which something has been done to the next
        if step.done > marks[-1][1] and now > marks[-1][0]:
            marks.append((now, step.done))
    rates = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(marks)]
    rate = readings(run)[-1].rate
    assert (rate is None) == (not rates)
    assert rate is None or min(rates) / SLACK <= rate <= max(rates) * SLACK


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=30), st.integers(1, 10**9))
def test_a_steady_speed_is_the_rate_for_any_steps(times, speed):
    steps, now = [(Step("convert", "t", 0, 10**18), 0.0)], 0
    for passed in times:
        now += passed
        steps.append((Step("convert", "t", now * speed, 10**18), now / MILLISECONDS))
    assert readings(steps)[-1].rate == pytest.approx(speed * MILLISECONDS)


@given(runs(), st.integers(0, 10**12))
def test_the_work_of_an_earlier_run_does_not_count(run, before):
    resumed = [(Step("convert", step.name, step.done + before, step.total + before), now) for step, now in run]
    assert [reading.rate for reading in readings(resumed)] == [reading.rate for reading in readings(run)]


@given(runs("convert"), runs("validate"))
def test_every_activity_starts_a_new_measurement(first, second):
    moved = [(step, now + first[-1][1]) for step, now in second]
    assert readings(first + moved)[len(first) :] == readings(moved)


def test_the_rate_is_the_speed_of_the_last_half_minute():
    slow = [(Step("convert", "t", second, 10**9), float(second)) for second in range(60)]
    fast = [(Step("convert", "t", 60 + 100 * second, 10**9), 60.0 + second) for second in range(60)]
    assert 1 < readings(slow + fast[:10])[-1].rate < 100
    assert readings(slow + fast)[-1].rate == pytest.approx(100)


def test_steps_that_go_back_or_beyond_the_total_are_corrected():
    meter = Meter()
    done = [meter.read(Step("convert", "t", done, 10), 0.0) for done in (4, 2, 12)]
    assert [(reading.done, reading.total) for reading in done] == [(4, 10), (4, 10), (12, 12)]


# The pace of reports.


@given(runs(), st.integers(0, 20), st.integers(1, 20))
def test_reports_are_neither_early_nor_frequent_and_the_end_is_reported_at_most_once(run, first, every):
    found = reported(run, first, every)
    assert all(now >= run[0][1] + first for _, now in found)
    assert all(b - a >= every or reading.is_finished for (_, a), (reading, b) in pairwise(found))
    assert sum(reading.is_finished for reading, _ in found) <= 1
    if found:
        assert found[-1][0].is_finished


@given(runs())
def test_without_a_delay_the_first_and_the_last_step_are_reported(run):
    found = [reading for reading, _ in reported(run, 0, 5)]
    assert found[0].name == "t0"
    assert found[-1].done == run[-1][0].done


@given(runs())
def test_a_short_activity_is_not_reported(run):
    longer = run[-1][1] - run[0][1] + 0.001
    assert reported(run, longer, 1) == []


# The wording.

names = st.text(max_size=300) | st.text("ab.[]\x1b\n\r\u202e\ud800é漢", max_size=300)


@st.composite
def any_reading(draw, names=names):
    total = draw(st.integers(0, 10**15))
    done = draw(st.integers(0, total))
    rate = draw(st.none() | st.floats(1e-3, 1e12))
    return Reading(draw(st.sampled_from(["convert", "validate"])), draw(names), done, total, rate)


@given(any_reading(), st.integers(1, 250), st.booleans())
def test_a_line_with_a_bar_fits_the_terminal_and_is_one_line(reading, width, ascii_only):
    line = bar_line(reading, width, ascii_only=ascii_only).plain
    assert len(line) <= width
    assert line.isprintable()
    assert ("100 %" in bar_line(reading, 80).plain[:14]) == reading.is_finished


@given(any_reading(names=st.just("name")), st.integers(8, 300))
def test_the_full_part_of_a_bar_is_the_share_that_is_done(reading, width):
    line = bar_line(reading, width).plain
    done, length = line.count("━"), line.count("━") + line.count("─")
    assert length == 0 or done == length * reading.done // max(reading.total, 1)


@given(any_reading())
def test_a_line_of_a_log_is_one_line(reading):
    line = log_line(reading)
    assert line.isprintable()
    assert len(line) < NAME_WIDTH + 100
    assert line.startswith(reading.activity)


@given(st.text())
def test_a_printable_name_can_be_encoded_and_differs_only_if_it_was_escaped(name):
    shown = printable(name)
    assert shown.isprintable()
    shown.encode()
    assert (shown == name) == name.isprintable()


def test_the_lines_read_as_people_write_them():
    reading = Reading("convert", "model.layers.7.mlp.up_proj.weight", 2_100_000_000, 5_600_000_000, 310e6)
    assert log_line(reading) == "convert 37 %, 2.1 of 5.6 GB, 310 MB/s, 12 s left, model.layers.7.mlp.up_proj.weight"
    assert bar_line(reading, 40).plain == "convert  37 %  2.1 of 5.6 GB  12 s left"
    assert bar_line(reading, 80).plain == (
        "convert  37 %  ━━━─────  2.1 of 5.6 GB  310 MB/s  12 s left  ...up_proj.weight"
    )
    assert bar_line(reading, 100, ascii_only=True).plain == (
        "convert  37 %  ###.......  2.1 of 5.6 GB  310 MB/s  12 s left  model.layers.7.mlp.up_proj.weight"
    )


@pytest.mark.parametrize(
    ("done", "total", "rate", "said"),
    [
        (0, 0, None, "convert 100 %, 0 of 0 B, t"),
        (0, 900, None, "convert 0 %, 0 of 900 B, t"),
        (999_999, 10**6, 5.0, "convert 99 %, 1.0 of 1.0 MB, 5.0 B/s, 1 s left, t"),
        (10**6, 10**6, 4321.0, "convert 100 %, 1.0 of 1.0 MB, 4.3 kB/s, t"),
        (3 * 10**11, 10**12, 10**6, "convert 30 %, 0.3 of 1.0 TB, 1.0 MB/s, 8 d 2 h left, t"),
        (168 * 10**6, 520 * 10**6, 10**6, "convert 32 %, 168 of 520 MB, 1.0 MB/s, 5 min 52 s left, t"),
    ],
)
def test_amounts_rates_and_times_have_units(done, total, rate, said):
    assert log_line(Reading("convert", "t", done, total, rate)) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "1 s"),
        (59, "59 s"),
        (60, "1 min 00 s"),
        (599, "9 min 59 s"),
        (600, "10 min"),
        (3599, "59 min"),
        (9600, "2 h 40 min"),
        (86400 * 3 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_remaining_times_have_two_units_at_most(seconds, said):
    assert duration(seconds) == said
