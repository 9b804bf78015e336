import random

import pytest

from trainer.bundled import records
from trainer.bundled.invented import Names, is_held_out


def test_the_same_seed_gives_the_same_documents():
    assert list(records.documents(1, 20)) == list(records.documents(1, 20))
    assert list(records.documents(1, 20)) != list(records.documents(2, 20))
    assert list(records.table_rows(1, 5)) != list(records.table_rows(2, 5))


@pytest.mark.parametrize("held_out", [False, True])
def test_a_text_holds_every_value_of_its_record(held_out):
    for table, text, values in records.table_rows(3, 400, held_out=held_out):
        assert all(value in table and value in text for value in values)
        if table.startswith("name:"):  # others hold an invented word in a longer name
            assert is_held_out(values[0]) is held_out


def test_a_no_is_told_without_the_value():
    slot = next(slot for domain in records.DOMAINS for slot in domain.slots if slot.denied)
    names = Names(random.Random(0))
    assert records.says(names, slot, "no") in slot.denied
    assert records.says(names, slot, "yes") in slot.says


def test_phrases_have_one_gap_for_the_value_and_yes_or_no_has_none():
    for domain in records.DOMAINS:
        for slot in domain.slots:
            gaps = {phrase.count("{}") for phrase in (*slot.beside, *slot.says, *slot.ahead, *slot.denied)}
            assert gaps == ({0} if slot.denied else {1}), slot


@pytest.mark.parametrize("notation", records.NOTATIONS)
def test_every_notation_writes_every_value(notation):
    names = Names(random.Random(5))
    for domain in records.DOMAINS:
        record = records.draw_record(names, domain, 5)
        written = notation.write(record, records.draw_keys(names, domain))
        assert all(value in written for value in record.values())


def test_a_list_is_told_again_in_the_same_order(monkeypatch):
    monkeypatch.setattr(records, "RETOLD", [("First: {}.", ", ", "Again: {}.")])
    names = Names(random.Random(2))
    for _ in range(30):
        first, *again = records.list_document(names).split("\n")
        assert again
        assert {line.replace("Again", "First") for line in again} == {first}


def test_every_answer_of_a_dialogue_stands_in_what_was_told():
    names = Names(random.Random(4))
    for _ in range(30):
        told, *lines = records.dialogue_document(names).split("\n")
        for line in lines[1::2]:
            answer = line.partition(": ")[2] or line.partition('"')[2].partition(',"')[0]
            kept = [
                word
                for word in answer.rstrip(".").split()
                if word[0].isupper() and word not in ("In", "At", "To", "From", "The")
            ]
            assert all(word in told for word in kept), (told, line)
