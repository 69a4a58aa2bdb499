"""What a caption can say, its grammar and its tokens.

    a {size} {colour} {shape} {motion} [and a {size} {colour} {shape} {motion}]
    over a {colour} {background}

Every slot has a fixed number of words, so that a word's place says which thing it describes.
"""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Sequence

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "medium", "large")
MOTIONS = (
    "stays still",
    "grows steadily",
    "shrinks steadily",
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "bounces sideways",
    "bounces vertically",
    "orbits clockwise",
    "orbits anticlockwise",
)
BACKGROUNDS = ("wall", "checkerboard", "curtain", "gradient")
SLOTS = {
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "motion": MOTIONS,
    "background": BACKGROUNDS,
}
GRAMMAR = (
    "a {size} {colour} {shape} {motion} [and a {size} {colour} {shape} {motion}] "
    "over a {colour} {background}"
)
EXAMPLE = "a large red circle moves left over a blue checkerboard"

# Token 0 pads; the empty caption is all padding and means "anything".
VOCABULARY = (
    "",
    *dict.fromkeys(
        word
        for phrase in ("a", "and", "over", *itertools.chain(*SLOTS.values()))
        for word in phrase.split()
    ),
)
CAPTION_TOKENS = 24  # 17 words at most, and room


@dataclasses.dataclass(frozen=True, slots=True)
class Thing:
    """One object, in words."""

    size: str
    colour: str
    shape: str
    motion: str

    def __post_init__(self):
        for slot in ("size", "colour", "shape", "motion"):
            if getattr(self, slot) not in SLOTS[slot]:
                raise ValueError(
                    f"{slot}: expected one of {', '.join(SLOTS[slot])}, got {getattr(self, slot)!r}"
                )

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.motion}"


@dataclasses.dataclass(frozen=True, slots=True)
class Caption:
    """One or two things of different colours before a background; the first is in front."""

    things: tuple[Thing, ...]
    background_colour: str
    background: str

    def __post_init__(self):
        if len(self.things) not in (1, 2):
            raise ValueError(f"things: expected 1 or 2, got {len(self.things)}")
        if len(self.things) == 2 and self.things[0].colour == self.things[1].colour:
            raise ValueError(
                f"two things need different colours to be told apart, both are "
                f"{self.things[0].colour}"
            )

    def __str__(self) -> str:
        things = " and ".join(map(str, self.things))
        return f"{things} over a {self.background_colour} {self.background}"


_THING = "a {size} {colour} {shape} {motion}".format(
    **{slot: f"({'|'.join(values)})" for slot, values in SLOTS.items()}
)
_CAPTION = re.compile(
    f"{_THING}(?: and {_THING})? over a ({'|'.join(COLOURS)}) ({'|'.join(BACKGROUNDS)})"
)


def parse(text: str) -> Caption:
    """The caption that a text says; capitals, commas, full stops and spacing do not matter.

    Raises:
      ValueError: an unknown word (with the words that come close), or an order of known words that
        the grammar does not have.
    """
    words = _known_words(text)
    found = _CAPTION.fullmatch(" ".join(words))
    if not found:
        raise ValueError(
            f"{' '.join(words)!r} does not follow the grammar\n  {GRAMMAR}\n  example: {EXAMPLE}"
        )
    groups = found.groups()
    things = tuple(Thing(*part) for part in (groups[:4], groups[4:8]) if part[0])
    return Caption(things, *groups[8:])


def tokenize(text: str) -> np.ndarray:
    """Token ids int32 `[CAPTION_TOKENS]`, zeros behind the text; "" is the empty caption.

    Raises:
      ValueError: as `parse`.
    """
    tokens = np.zeros(CAPTION_TOKENS, np.int32)
    if text.strip():
        words = str(parse(text)).split()
        tokens[: len(words)] = [VOCABULARY.index(word) for word in words]
    return tokens


def detokenize(tokens: Sequence[int] | np.ndarray) -> str:
    """The text of token ids, padding left out."""
    return " ".join(VOCABULARY[token] for token in tokens if token)


def _known_words(text: str) -> list[str]:
    words = re.sub(r"[.,;!]", " ", text.lower()).split()
    if unknown := [word for word in dict.fromkeys(words) if word not in VOCABULARY]:
        lines = [f"  {word!r}{_suggestion(word)}" for word in unknown]
        slots = [f"  {slot}: {', '.join(values)}" for slot, values in SLOTS.items()]
        raise ValueError("unknown words:\n" + "\n".join([*lines, "what can be said:", *slots]))
    return words


def _suggestion(word: str) -> str:
    close = difflib.get_close_matches(word, VOCABULARY[1:], n=2)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
