from __future__ import annotations

import pytest

from prefix_store.errors import ContextLengthExceeded
from prefix_store.jobs import CHOSEN_BY_DATA, TrainingSpec
from trainer.defaults import fill_pace, fill_room, room_for_text

OPEN = TrainingSpec("0" * 64, 1, unset=CHOSEN_BY_DATA)


@pytest.mark.parametrize(("max_length", "virtual_tokens", "room"), [(50, 10, 50), (100, 10, 90), (100, 98, 2)])
def test_an_example_and_the_prefix_share_the_context(max_length, virtual_tokens, room):
    spec = TrainingSpec("0" * 64, 1, max_length=max_length, virtual_tokens=virtual_tokens)
    assert room_for_text(spec, 100) == room


def test_a_prefix_that_fills_the_context_is_refused():
    with pytest.raises(ContextLengthExceeded, match="99 virtual tokens leave no room in a context of 100"):
        room_for_text(TrainingSpec("0" * 64, 1, virtual_tokens=99), 100)


@pytest.mark.parametrize(
    ("lengths", "context", "virtual_tokens", "max_length"),
    [
        ([5, 30], 1024, 16, 30),
        ([5, 900], 1024, 16, 512),  # at most so many
        ([90], 100, 12, 88),  # what a small context leaves
        ([3], 4, 1, 3),
    ],
)
def test_the_room_follows_the_longest_example_and_the_context(lengths, context, virtual_tokens, max_length):
    spec = fill_room(OPEN, lengths, context)
    assert (spec.virtual_tokens, spec.max_length) == (virtual_tokens, max_length)
    assert room_for_text(spec, context) == max_length


@pytest.mark.parametrize(
    ("examples", "length", "batch_size", "steps"),
    [
        (3, 20, 3, 100),  # never more a step than there are
        (40, 20, 8, 100),  # never fewer steps than a prefix needs
        (400, 60, 8, 400),  # eight epochs
        (400, 512, 4, 800),  # so many examples that a step takes about as long
        (4, 30_000, 1, 100),
        (100_000, 60, 8, 1500),  # nor more than anyone waits for
    ],
)
def test_the_pace_follows_how_many_examples_there_are(examples, length, batch_size, steps):
    spec = fill_pace(OPEN, [length] * examples)
    assert (spec.batch_size, spec.steps) == (batch_size, steps)


@pytest.mark.parametrize(
    ("examples", "epochs", "steps"),
    [(3, 1, 1), (40, 3, 15), (41, 1, 6), (4000, 8, 4000), (100_000, 10_000, 100_000)],
)
def test_epochs_are_passes_over_what_there_is(examples, epochs, steps):
    spec = fill_pace(TrainingSpec("0" * 64, 1, epochs=epochs, unset=CHOSEN_BY_DATA), [20] * examples)
    assert (spec.steps, spec.epochs) == (steps, epochs)


def test_what_was_chosen_stays_and_what_follows_from_it_follows():
    spec = fill_room(TrainingSpec("0" * 64, 1, virtual_tokens=60, unset=("max_length", "steps")), [50], 100)
    assert (spec.virtual_tokens, spec.max_length, spec.unset) == (60, 40, ("steps",))
    spec = fill_pace(TrainingSpec("0" * 64, 1, batch_size=2, unset=("steps",)), [50] * 100)
    assert (spec.batch_size, spec.steps, spec.unset) == (2, 400, ())
    asked = TrainingSpec("0" * 64, 1)
    assert fill_pace(fill_room(asked, [9], 100), [9]) == asked


def test_the_same_data_gives_the_same_choice_whatever_its_order():
    assert fill_pace(OPEN, [5, 50, 20] * 9) == fill_pace(OPEN, [50, 20, 5] * 9)
