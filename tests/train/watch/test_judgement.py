"""Of ranks that do not move the one is named that the others wait for."""

import dataclasses

import pytest

from train.watch.judgement import Beat, Judge
from train.watch.whereabouts import BETWEEN_STEPS, DATA, FORWARD, LEFT, REDUCE, SAVE, START, Position, Whereabouts

SECONDS, LONG = 10.0, 100.0


class Ranks:
    """What ranks say at each second."""

    def __init__(self, count):
        self.judge = Judge(SECONDS, LONG)
        self.whereabouts = [Whereabouts() for _ in range(count)]
        self.waits = [False] * count
        self.silent = set()
        self.reading = set()
        self.now, self._beats = 0.0, {}
        # Every phase has been left once, in a first step.
        for rank in self.whereabouts:
            rank.begin_step(0)
            for phase in (START, DATA, FORWARD, REDUCE, BETWEEN_STEPS, SAVE):
                rank.enter(phase)
            rank.begin_step(0)

    def pass_seconds(self, seconds):
        for _ in range(seconds):
            self.now += 1
            for rank, whereabouts in enumerate(self.whereabouts):
                if rank not in self.silent:
                    number = int(self.now)
                    network = (True, "a store does not arrive") if rank in self.reading else ()
                    who = (self.waits[rank], "host", 100 + rank, 0.0)
                    self._beats[rank] = Beat(number, whereabouts.now, *who, *network)
            self.judge.see(self._beats, self.now)

    def named(self):
        return [culprit.rank for culprit in self.judge.culprits(self.now)]


def test_nobody_is_named_while_all_move():
    ranks = Ranks(3)
    for step in range(30):
        for rank in ranks.whereabouts:
            rank.begin_step(step)
        ranks.pass_seconds(9)
        assert not ranks.named()


def test_the_rank_that_is_behind_is_named_once_its_time_is_over():
    ranks = Ranks(3)
    ranks.pass_seconds(1)
    for rank in (0, 2):
        ranks.whereabouts[rank].enter(FORWARD)
    ranks.pass_seconds(10)
    assert not ranks.named()
    ranks.pass_seconds(1)
    assert ranks.named() == [1]
    (culprit,) = ranks.judge.culprits(ranks.now)
    assert str(culprit) == "rank 1 (process 101 on host) has not moved for 11 s: it is in 'data' of step 0"


def test_one_that_waits_is_not_the_one_that_is_waited_for():
    # As in a pipeline: the last stage has begun fewer micro-batches than the one that it waits for.
    ranks = Ranks(3)
    for rank in (0, 1):
        ranks.whereabouts[rank].enter(FORWARD)
    ranks.waits = [True, False, True]
    ranks.pass_seconds(12)
    assert ranks.named() == [1]


def test_all_are_named_where_all_wait():
    ranks = Ranks(2)
    ranks.waits = [True, True]
    ranks.pass_seconds(12)
    assert ranks.named() == [0, 1]


def test_one_that_does_not_answer_is_named_whatever_it_was_in():
    ranks = Ranks(2)
    for rank in ranks.whereabouts:
        rank.enter(SAVE)
    ranks.pass_seconds(1)
    ranks.silent = {1}
    ranks.pass_seconds(11)
    assert ranks.named() == [1]
    (culprit,) = ranks.judge.culprits(ranks.now)
    words = "rank 1 (process 101 on host) has not answered for 11 s; it was last seen in 'save' of step 0"
    assert str(culprit) == words


@pytest.mark.parametrize("phase", [SAVE, "a phase that has never been left"])
def test_some_phases_may_take_long(phase):
    ranks = Ranks(2)
    ranks.whereabouts[0].enter(FORWARD)
    ranks.whereabouts[1].enter(phase)
    # Those who wait for it are not named either: it is the one that is furthest behind.
    ranks.whereabouts[0].enter(FORWARD)
    ranks.pass_seconds(100)
    assert not ranks.named()
    ranks.pass_seconds(2)
    assert ranks.named() == [1]


def test_one_that_reads_over_a_network_is_given_the_time_that_reading_has():
    ranks = Ranks(2)
    ranks.reading = {1}
    ranks.whereabouts[0].enter(FORWARD)
    ranks.pass_seconds(100)
    assert not ranks.named()
    ranks.pass_seconds(2)
    assert ranks.named() == [1]
    (culprit,) = ranks.judge.culprits(ranks.now)
    assert str(culprit).endswith("it is in 'data' of step 0, where a store does not arrive")


def test_before_the_first_step_all_may_take_long():
    ranks = Ranks(2)
    for rank in range(2):
        ranks.whereabouts[rank] = Whereabouts()
    ranks.pass_seconds(1)
    ranks.silent = {0}
    ranks.pass_seconds(99)
    assert not ranks.named()
    ranks.pass_seconds(3)
    assert ranks.named() == [0]


def test_in_the_first_step_every_pass_may_take_long():
    """Of several micro-batches, the second may be the first that reaches code which is compiled."""
    ranks = Ranks(1)
    ranks.whereabouts[0] = Whereabouts()
    ranks.whereabouts[0].begin_step(7)
    for _ in range(2):
        ranks.whereabouts[0].enter(FORWARD)
        ranks.whereabouts[0].enter(REDUCE)
    ranks.whereabouts[0].enter(FORWARD)
    ranks.pass_seconds(100)
    assert not ranks.named()
    ranks.whereabouts[0].begin_step(8)
    ranks.whereabouts[0].enter(FORWARD)
    ranks.pass_seconds(12)
    assert ranks.named() == [0]


def test_one_that_has_left_is_waited_for_no_more():
    ranks = Ranks(2)
    ranks.whereabouts[1].enter(LEFT)
    ranks.pass_seconds(1)
    ranks.silent = {1}
    for _ in range(3):
        ranks.whereabouts[0].enter(FORWARD)
        ranks.pass_seconds(8)
    assert not ranks.named() and list(ranks.judge.present()) == [0]


def test_what_happened_while_the_judge_was_away_is_not_known():
    ranks = Ranks(2)
    ranks.pass_seconds(8)
    ranks.now += 1000
    ranks.judge.excuse(1000)
    assert not ranks.named()
    ranks.pass_seconds(5)
    assert ranks.named() == [0, 1]


def test_a_step_that_is_repeated_is_ahead_of_the_one_before():
    rank = Whereabouts()
    rank.begin_step(7)
    before = rank.now
    rank.begin_step(4)
    assert rank.now > before and rank.now.step == 4


def test_a_beat_is_read_as_it_was_said():
    beat = Beat(3, Position(1, 2, 5, FORWARD, False), True, "host", 7, 1.25)
    assert Beat.from_json(beat.as_json()) == beat
    assert Beat.from_json(dataclasses.replace(beat, number=4).as_json()) != beat
