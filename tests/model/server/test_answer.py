"""A continuation as its tokens come: text, ends, errors, and what is left to read."""

from __future__ import annotations

import asyncio

from model.generation.batch import Token
from model.generation.sampling import SamplingSettings
from model.generation.text import TextStream
from model.server.answer import Answer, CancelledError, Choice
from model.server.errors import ApiError


def decode(ids):
    return "".join(chr(token) for token in ids)


def choice(changes, stop=(), decode=decode, **settings):
    given = SamplingSettings(9, temperature=0, **settings)
    return Choice(0, (65,), given, TextStream(decode, (65,), stop), lambda of, count: changes.append(count))


def token(text, finish_reason=None):
    return Token(0, ord(text), -0.5, (), finish_reason)


def test_what_was_read_is_kept_no_more():
    changes: list[int] = []
    made = choice(changes, logprobs=0)
    made.take([token("a"), token("b")])
    made.take([token("c")])
    piece = made.read()
    assert (piece.text, [entry.token for entry in piece.tokens]) == ("abc", [97, 98, 99])
    assert made.read() is None and changes == [2, 1] and not made.has_ended


def test_a_stop_text_ends_it_and_what_comes_later_is_dropped():
    changes: list[int] = []
    made = choice(changes, stop=["cd"])
    made.take([token("b"), token("c")])
    assert made.read().text == "b"
    made.take([token("d"), token("e"), token("f")])
    assert (made.read(), made.finish_reason, made.generated) == (None, "stop", 3)
    # The batch has it still, until it is told.
    assert made.in_batch
    made.take([token("g", "length")])
    assert (made.read(), made.finish_reason, made.generated) == (None, "stop", 3)


def test_what_might_have_begun_a_stop_text_comes_with_the_end():
    made = choice([], stop=["cd"])
    made.take([token("b"), token("c", "length")])
    assert (made.read().text, made.finish_reason, made.in_batch) == ("bc", "length", False)


def test_text_that_cannot_be_made_ends_that_sequence_alone(caplog):
    """The batch is told to drop it."""

    def failing(ids):
        if 0 in ids:
            raise ZeroDivisionError
        return decode(ids)

    changes: list[int] = []
    made = choice(changes, decode=failing)
    made.take([token("b"), token("\0"), token("c")])
    assert isinstance(made.error, ZeroDivisionError) and made.in_batch and made.has_ended and len(changes) == 1
    assert "the text of a sequence cannot be made" in caplog.text


def test_errors_of_an_answer_are_told_but_its_own_end():
    first, second = choice([]), choice([])
    answer = Answer([first, second], 1)
    assert answer.error is None
    first.fail(ZeroDivisionError("x"))
    assert (answer.error.status, str(answer.error)) == (500, "the model failed: ZeroDivisionError")
    refusal = ApiError(503, "closing")
    third = choice([])
    third.end(refusal)
    third.end(CancelledError())
    assert Answer([third], 1).error is refusal and third.in_batch


def test_waiting_ends_with_a_change_or_after_its_time():
    async def scenario() -> None:
        answer = Answer([], 0)
        assert not await answer.changed(0.01)
        answer.wake()
        assert await answer.changed(60) and not await answer.changed(0.01)

    asyncio.run(scenario())
