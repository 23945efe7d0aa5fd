"""Pools of texts for tests of selection: near-duplicates and diverse texts of random words."""

import random

WORDS = 60  # of a text
BASES = 10  # of near-duplicates
MUTATED = 6  # words in which a near-duplicate differs from its base


def vocabulary(draw, count=2000):
    """Random words of 3 to 9 letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(draw.choices(letters, k=draw.randint(3, 9))) for _ in range(count)]


def pool_of_texts(seed=0, each=150, length=lambda draw: WORDS):
    """(texts, sources): near-duplicates of few bases among as many diverse texts.

    The source of a near-duplicate is its base, 0 to BASES - 1; a diverse text is its own.

    Args:
      length: function of a generator that returns the number of words of a text.
    """
    draw = random.Random(seed)
    words = vocabulary(draw)
    text = lambda: draw.choices(words, k=length(draw))
    originals = [text() for _ in range(BASES)]
    found = [_mutated(draw, originals[i % BASES], words) for i in range(each)]
    found += [text() for _ in range(each)]
    order = draw.sample(range(2 * each), 2 * each)
    return [" ".join(found[i]) for i in order], [i % BASES if i < each else i for i in order]


def _mutated(draw, text, words):
    text = list(text)
    for place in draw.sample(range(len(text)), max(1, len(text) * MUTATED // WORDS)):
        text[place] = draw.choice(words)
    return text
