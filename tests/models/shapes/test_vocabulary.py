import pytest

from models.shapes.vocabulary import (
    CAPTION_TOKENS,
    EXAMPLE,
    VOCABULARY,
    Caption,
    Thing,
    detokenize,
    parse,
    tokenize,
)

TWO = "a small red ring stays still and a large blue cross orbits clockwise over a white curtain"


@pytest.mark.parametrize("text", [EXAMPLE, TWO])
def test_text_and_caption_and_tokens_agree(text):
    assert str(parse(text)) == text
    tokens = tokenize(text)
    assert tokens.shape == (CAPTION_TOKENS,) and detokenize(tokens) == text


def test_words_are_understood():
    assert parse(EXAMPLE) == Caption(
        (Thing("large", "red", "circle", "moves left"),), "blue", "checkerboard"
    )


def test_capitals_and_punctuation_do_not_matter():
    text = TWO.replace("a small", "A  Small").replace(" and", ", and") + "."
    assert str(parse(text)) == TWO


def test_the_empty_caption_is_all_padding():
    assert not tokenize("").any() and VOCABULARY[0] == ""


def test_unknown_words_are_named_with_close_ones():
    with pytest.raises(ValueError) as error:
        parse("a larg red circle teleports left over a blue wall")
    message = str(error.value)
    assert "'larg' (did you mean large?)" in message and "'teleports'" in message
    assert "motion: stays still" in message


@pytest.mark.parametrize(
    "text",
    [
        "a red large circle moves left over a blue wall",
        "a large red circle moves left",
        "a large red circle moves clockwise over a blue wall",
        "",
    ],
)
def test_known_words_in_another_order_show_the_grammar(text):
    with pytest.raises(ValueError, match="does not follow the grammar"):
        parse(text)


def test_two_things_need_two_colours():
    with pytest.raises(ValueError, match=r"need different colours .* both are red"):
        parse(TWO.replace("blue", "red"))


def test_thing_refuses_a_value_of_another_slot():
    with pytest.raises(ValueError, match=r"shape: expected one of circle.*got 'blob'"):
        Thing("small", "red", "blob", "moves up")
