"""The tuner: it stops drafting that does not pay, comes back to it, and finds the better way and the better length."""

from __future__ import annotations

import random

import pytest

from layerwise.decoding.tuner import HOPE, LONGEST, REST, TIMED, Tuner

STEP = 0.010  # seconds of a plain step in the simulations
MORE = 0.0003  # what each further token adds to a verification
TRUSTS = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05]  # of the tokens of a tree
TIMES = {width: STEP + MORE * (width - 1) for width in range(1, 17)}


def simulate(
    tuner: Tuner, ways: dict[str, tuple[float, float]], rounds: int, seed: int = 0, rest: bool = True
) -> list[tuple[str, int]]:
    """Rounds in which way `name` has acceptance ways[name][0] and drafts a token in ways[name][1] plain steps."""
    rng, chosen = random.Random(seed), []
    for _ in range(rounds):
        name, most, worth = tuner.choose({name: price for name, (_, price) in ways.items()}, 15, rest)
        drafted, trust = 0, 1.0
        if name != "off":
            acceptance, price = ways[name]
            while drafted < most and (not drafted or worth(trust)):
                drafted, trust = drafted + 1, trust * acceptance
            stood = 0
            while stood < drafted and rng.random() < acceptance:
                stood += 1
            tuner.note(name, drafted, stood, drafted * price * STEP, drafted + 1, STEP + MORE * drafted)
        else:
            tuner.note("off", 0, 0.0, 0.0, 1, STEP)
        chosen.append((name, drafted))
    return chosen


def names(chosen: list[tuple[str, int]]) -> list[str]:
    return [name for name, _ in chosen]


def threshold(worth) -> float:
    """The least trust that is worth a token, to 1e-6."""
    low, high = 0.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if worth(middle) else (middle, high)
    return high


def test_a_draft_that_always_fails_is_left_and_tried_again_later() -> None:
    chosen = names(simulate(Tuner(), {"exit": (0.0, 0.3)}, 400))
    first_rest = chosen.index("off", 1)  # the very first round times a plain step
    assert first_rest <= 10
    tries = [at for at, name in enumerate(chosen) if name == "exit" and at > first_rest]
    assert tries, "never tried again"
    assert tries[-1] - tries[-2] >= 5, "no rest"
    assert len(tries) < 0.15 * len(chosen)


def test_a_guess_at_the_acceptance_decides_until_it_is_measured() -> None:
    tuner = Tuner()
    tuner.note("off", 0, 0.0, 0.0, 1, STEP)
    prices = {"likely": 0.002, "unlikely": 0.002}
    assert tuner.choose(prices, 4, hopes={"likely": 0.9, "unlikely": 0.1})[0] == "likely"
    for _ in range(20):
        tuner.note("likely", 2, 0.0, 0.0, 3, STEP + 2 * MORE, hope=0.9)
        tuner.note("unlikely", 2, 2.0, 0.0, 3, STEP + 2 * MORE, hope=0.1)
    assert tuner.choose(prices, 4, hopes={"likely": 0.9, "unlikely": 0.1})[0] == "unlikely"


def test_how_much_of_its_hopes_comes_true_holds_for_all_hopes_of_a_way() -> None:
    tuner, draw = Tuner(), random.Random(1)
    for _ in range(400):
        hope = draw.choice((0.2, 0.9))
        tuner.note("corpus", 1, float(draw.random() < 0.5 * hope), 0.0, 2, STEP, hope)
    assert tuner.ways["corpus"].acceptance(0.9) == pytest.approx(0.45, abs=0.1)
    assert tuner.ways["corpus"].acceptance(0.2) == pytest.approx(0.10, abs=0.03)
    for _ in range(200):
        tuner.note("corpus", 2, 2.0, 0.0, 3, STEP, 0.2)
    assert tuner.ways["corpus"].acceptance(0.9) == 0.99  # a probability still


def test_a_draft_that_failed_is_taken_up_when_it_has_become_good() -> None:
    tuner = Tuner()
    simulate(tuner, {"exit": (0.0, 0.1)}, 100)
    chosen = names(simulate(tuner, {"exit": (0.95, 0.1)}, 300))
    assert chosen[-100:].count("exit") > 95


def test_without_leave_to_rest_something_is_always_drafted() -> None:
    chosen = simulate(Tuner(), {"exit": (0.0, 0.5)}, 60, rest=False)
    assert names(chosen) == ["exit"] * 60
    assert [drafted for _, drafted in chosen[-10:]] == [1] * 10  # as little as there is


@pytest.mark.parametrize(
    "ways",
    [
        {"good": (0.9, 0.1), "bad": (0.2, 0.1)},  # right more often
        {"good": (0.8, 0.05), "bad": (0.8, 0.6)},  # cheaper
        {"good": (0.7, 0.02), "bad": (0.9, 0.9)},  # much cheaper, though wrong more often
    ],
)
def test_the_better_of_two_ways_is_found(ways: dict[str, tuple[float, float]]) -> None:
    for order in (ways, dict(reversed(ways.items()))):
        chosen = names(simulate(Tuner(), order, 300))
        assert chosen[-150:].count("good") > 130


def test_the_better_the_draft_the_longer_it_is() -> None:
    means = []
    for acceptance in (0.3, 0.6, 0.9, 0.99):
        tail = simulate(Tuner(), {"exit": (acceptance, 0.15)}, 300, rest=False)[-150:]
        means.append(sum(drafted for _, drafted in tail) / len(tail))
    assert means == sorted(means) and means[-1] > 3 * means[0]


def test_no_more_than_allowed_and_nothing_where_nothing_is() -> None:
    tuner = Tuner()
    tuner.note("off", 0, 0.0, 0.0, 1, STEP)
    for _ in range(30):
        tuner.note("exit", 4, 4.0, 4 * 0.01 * STEP, 5, STEP)
    for most in (1, 3, 15):
        name, length, _ = tuner.choose({"exit": 0.01}, most)
        assert name == "exit" and 1 <= length <= most
    assert tuner.choose({}, 15)[:2] == ("off", 0)
    assert tuner.choose({}, 15, rest=False)[:2] == ("off", 0)
    assert tuner.choose({"exit": 0.01}, 0)[:2] == ("off", 0)


def test_a_way_that_was_tried_must_promise_a_tenth_more() -> None:
    def tuner_of(stood: float) -> Tuner:
        tuner = Tuner()
        for _ in range(3):
            for width in (1, 2):  # a second token costs nothing more
                tuner.note("off", 0, 0.0, 0.0, width, STEP)
        for _ in range(60):
            tuner.note("exit", 1, stood, 0.2 * STEP, 2, STEP)
        return tuner

    for stood, low, high, expected in ((0.3, 1.03, 1.09, "off"), (0.5, 1.11, 1.2, "exit")):
        tuner = tuner_of(stood)
        assert low < tuner.rates("exit", 1)[0] * tuner.plain < high
        assert tuner.choose({"exit": 0.2}, 1)[0] == expected
    # What promises as little and was never tried is tried.
    fresh = Tuner.timed({1: STEP, 2: STEP})
    assert fresh.choose({"new": 0.5}, 1)[0] == "new" and 1.03 < fresh.rates("new", 1)[0] * fresh.plain < 1.09


def test_one_more_token_is_worth_its_time_only() -> None:
    thresholds = []
    for price in (0.01, 0.1, 0.4):
        tuner = Tuner()
        tuner.note("off", 0, 0.0, 0.0, 1, STEP)
        for width in range(2, 17):
            tuner.note("none", 0, 0.0, 0.0, width, STEP)  # verifying more takes no longer
        for _ in range(50):
            tuner.note("exit", 4, 4.0, 4 * price * STEP, 5, STEP)
        name, _, worth = tuner.choose({"exit": price}, 15, rest=False)
        assert name == "exit" and worth(1.0) and not worth(0.0)
        thresholds.append(threshold(worth))
        # A token more is worth it if what it gives in the time it takes is no less than the best rate.
        best = max(tuner.rates("exit", 15))
        assert thresholds[-1] == pytest.approx(price * STEP * best / tuner.ways["exit"].acceptance(), rel=1e-3)
    assert thresholds == sorted(thresholds) and thresholds[0] < 0.3 < thresholds[-1]


def test_before_a_plain_step_was_timed_all_guesses_are_in_seconds() -> None:
    tuner = Tuner()
    for _ in range(5):
        tuner.note("slow", 3, 0.0, 3 * 0.9 * STEP, 4, STEP)
    assert 0.5 * STEP < tuner.plain == tuner.round_seconds(1) < STEP
    assert tuner.choose({"slow": 0.9, "new": 0.01}, 15, rest=False)[0] == "new"
    assert tuner.choose({"slow": 0.9}, 15)[0] == "off"


def test_a_plain_step_is_timed_first_unless_it_was_beforehand() -> None:
    for tuner, plain in ((Tuner(), 1), (Tuner.timed(TIMES), 0)):
        assert names(simulate(tuner, {"exit": (0.99, 0.01)}, 300)) == ["off"] * plain + ["exit"] * (300 - plain)


def test_times_measured_beforehand_choose_the_length_in_the_first_round() -> None:
    steps = {width: STEP * (1.0 if width < 6 else 1.5) for width in range(1, 17)}
    for times, expected in ((steps, 4), (TIMES, 6)):
        assert Tuner.timed(times).choose({"tree": 0.0}, 15, hopes={"tree": TRUSTS})[:2] == ("tree", expected)


def test_chance_in_single_rounds_does_not_undo_what_was_measured() -> None:
    """A dozen rounds, of noisy times, at the width that is best: another one is not chosen for them."""
    steps = {width: STEP * (1.2 if width < 7 else 1.7) for width in range(2, 17)} | {1: STEP}
    for seed in range(20):
        rng, tuner = random.Random(seed), Tuner.timed(steps)
        for _ in range(12):
            name, length, _ = tuner.choose({"tree": 0.0}, 15, hopes={"tree": TRUSTS})
            assert (name, length) == ("tree", 5)
            seconds = steps[length + 1] * rng.lognormvariate(0.0, 0.1)
            tuner.note("tree", length, sum(TRUSTS[:length]), 0.0, length + 1, seconds, TRUSTS)


def test_a_machine_that_slows_down_slows_all_widths() -> None:
    tuner = Tuner.timed(TIMES)
    for _ in range(100):
        tuner.note("off", 0, 0.0, 0.0, 6, 1.5 * TIMES[6])
    for width in TIMES:
        assert tuner.round_seconds(width) == pytest.approx(1.5 * TIMES[width], rel=0.25)
    before = tuner.round_seconds(6)
    tuner.note("off", 0, 0.0, 0.0, 6, 100.0)  # something else was running
    assert tuner.round_seconds(6) < before * (1 + 2 * LONGEST / TIMED)


def test_what_is_too_unlikely_to_pay_is_known_before_a_tree_is_grown() -> None:
    rng, skipped = random.Random(1), 0
    for seed in range(200):
        seconds = sorted(STEP * rng.uniform(1, 3) for _ in range(15))
        tuner = Tuner.timed({1: STEP} | dict(enumerate(seconds, 2)))
        for _ in range(seed % 5):
            tuner.note("tree", 4, 0.0, 0.0, 5, seconds[3], [0.5] * 4)
        least, first = tuner.least("tree", 15), rng.random()
        trusts = [first * 0.95**depth for depth in range(15)]  # hardly less likely than the first
        chosen = tuner.choose({"tree": 0.0}, 15, hopes={"tree": trusts})[0]
        assert chosen == "off" or first >= least
        skipped += first < least
    assert 50 < skipped < 190


def test_what_is_noted() -> None:
    tuner = Tuner()
    tuner.note("off", 0, 0.0, 0.0, 1, 0.02)
    assert tuner.plain == 0.02 and not tuner.ways  # drafting nothing is no way to draft
    tuner.note("plan:0-5", 4, 2.0, 0.008, 5, 0.03)  # a name that was never offered to choose from
    way = tuner.ways["plan:0-5"]
    assert (way.stood, way.hoped, way.seconds, way.idle) == (2.0, pytest.approx(3 * HOPE), 0.002, 0)
    assert tuner.round_seconds(5) == 0.03 and tuner.plain == 0.02
    before = way.acceptance()
    tuner.note("plan:0-5", 4, 4.0, 0.008, 5, 0.05)
    assert way.acceptance() > before and way.stood > 5 and way.hoped > 6 * HOPE
    assert tuner.round_seconds(5) == pytest.approx(0.04)
    tuner.note("ngram2", 3, 0.0, 0.0001, 4, 0.03)
    assert way.idle == 1 and tuner.ways["ngram2"].acceptance() < way.acceptance()


def test_failures_fade_while_a_way_rests() -> None:
    tuner = Tuner()
    for _ in range(20):
        tuner.note("exit", 2, 0.0, 0.001, 3, STEP)
    failed = tuner.ways["exit"].acceptance()
    fresh = Tuner()
    fresh.choose({"exit": 0.1}, 5)
    hope = fresh.ways["exit"].acceptance()
    for _ in range(int(20 * REST)):
        tuner.note("off", 0, 0.0, 0.0, 1, STEP)
    assert failed < 0.25 and tuner.ways["exit"].acceptance() == pytest.approx(hope, abs=1e-3)


def test_chance_in_the_times_does_not_choose_the_length() -> None:
    tuner = Tuner()
    for width, seconds in ((1, 0.0105), (2, 0.0110), (3, 0.0108), (4, 0.0103), (5, 0.0120)):
        tuner.note("off", 0, 0.0, 0.0, width, seconds)
    times = [tuner.round_seconds(width) for width in range(1, 6)]
    assert times == sorted(times) and times[4] == 0.0120
    assert times[1] == times[2] == times[3] == pytest.approx((0.0110 + 0.0108 + 0.0103) / 3)
    tuner.note("off", 0, 0.0, 0.0, 4, 0.0150)  # measured again: 0.01265 on average
    assert tuner.round_seconds(4) == pytest.approx((0.01265 * 2 + 0.0120) / 3) == tuner.round_seconds(5)


def test_times_between_measured_widths_are_read_off_their_neighbours() -> None:
    tuner = Tuner()
    assert tuner.round_seconds(1) == 1.0  # nothing is known: in units of a step
    tuner.note("off", 0, 0.0, 0.0, 1, 0.010)
    assert 0.010 < tuner.round_seconds(4) < tuner.round_seconds(8)
    tuner.note("off", 0, 0.0, 0.0, 4, 0.012)
    tuner.note("off", 0, 0.0, 0.0, 8, 0.020)
    assert tuner.round_seconds(6) == pytest.approx(0.016)
    assert 0 <= tuner.round_seconds(2) < 0.012 and tuner.round_seconds(12) > 0.020


def test_what_comes_true_is_learnt_of_each_of_a_trees_tokens() -> None:
    """Where a text is copied, the fifth token stands as often as the first, though five draws in a row seldom do."""
    tuner, hope = Tuner.timed({width: 1 + 0.1 * width for width in range(1, 9)}), [0.7**n for n in range(1, 8)]
    lengths = []
    for _ in range(12):
        lengths.append(tuner.choose({"tree": 0.0}, 7, hopes={"tree": hope})[1])
        tuner.note("tree", lengths[-1], [1.0] * lengths[-1], 0.0, lengths[-1] + 1, 1.1 + 0.1 * lengths[-1], hope)
    assert lengths[0] < 7 and lengths[-1] == 7
    for _ in range(40):  # from the third on they fall
        length = tuner.choose({"tree": 0.0}, 7, hopes={"tree": hope})[1]
        stood = [float(number < 2) for number in range(length)]
        tuner.note("tree", length, stood, 0.0, length + 1, 1.1 + 0.1 * length, hope)
    assert length <= 3
