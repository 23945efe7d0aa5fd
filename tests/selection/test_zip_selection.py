"""ZIP: the released algorithm index for index, the corrected one, and runs that are resumed."""

import random
import zlib

import numpy as np
import pytest

from jaxquant.selection import zip_selection as module
from jaxquant.selection.baselines import random_draw
from jaxquant.selection.compression import compression_ratio
from jaxquant.selection.zip_selection import zip_select
from tests.support.text_pools import BASES, pool_of_texts, vocabulary

SMALL = {"k1": 300, "k2": 60, "k3": 30}


def items_of(texts):
    return [{"text": text} for text in texts]


TEXTS, SOURCES = pool_of_texts()
POOL = items_of(TEXTS)
FEW = POOL[:120]
UNEQUAL = items_of(pool_of_texts(1, length=lambda draw: draw.randint(5, 60))[0])


def transcribed(pool, budget, k1, k2, k3, back=False):
    """The released algorithm from its description, without any of the code under test."""

    def ratio(items):
        data = str(items).encode("utf-8")
        return len(data) / len(zlib.compress(data, level=9))

    pi, selected = [ratio([item]) for item in pool], []
    while len(selected) < budget:
        so_far = [pool[i] for i in selected]
        c1 = sorted(range(len(pool)), key=lambda i: pi[i])[:k1]
        for i in c1:
            pi[i] = ratio([*so_far, pool[i]])
        c2 = sorted(c1, key=lambda i: pi[i])[:k2]
        third = []
        for _ in range(k3):
            rest = [i for i in c2 if i not in third]
            third.append(min(rest, key=lambda i: ratio([pool[j] for j in [*third, i]])))
        for i in third if back else c2:
            pi[i] = 1e6
        selected += third
    return selected


@pytest.fixture(scope="module")
def faithful():
    return zip_select(POOL, 60, faithful=True, **SMALL).indices


def bytes_of(indices, pool=POOL):
    return sum(len(repr(pool[i])) for i in indices)


def test_faithful_picks_are_those_of_the_released_algorithm(faithful):
    assert faithful.tolist() == transcribed(POOL, 60, 300, 60, 30)
    pool, stages = UNEQUAL[:150], (60, 30, 20)
    found = zip_select(pool, 50, faithful=True, k1=60, k2=30, k3=20)
    assert found.indices.tolist() == transcribed(pool, 50, *stages)
    assert found.spent == len(found.indices) == 60  # overshoots
    # The twin: rejected items that come back give other picks.
    assert found.indices.tolist() != transcribed(pool, 50, *stages, back=True)


def test_faithful_picks_repeat_where_those_of_the_released_algorithm_do():
    """Marked items come back when fewer than k1 others are left."""
    stages = {"k1": 25, "k2": 20, "k3": 15}
    found = zip_select(UNEQUAL[:30], 29, faithful=True, **stages).indices
    assert found.tolist() == transcribed(UNEQUAL[:30], 29, 25, 20, 15)
    assert len(set(found.tolist())) < len(found) == 30


def test_equal_ratios_are_ordered_by_index():
    pool = items_of(["same words", "other text"] * 40)
    found = zip_select(pool, 20, faithful=True, k1=40, k2=20, k3=10).indices
    assert found.tolist() == transcribed(pool, 20, 40, 20, 10)


def test_a_pool_smaller_than_the_stages():
    """Where the released code fails; nothing is selected twice."""
    few = POOL[:7]
    assert zip_select(few, 3, faithful=True).indices.tolist() == transcribed(few, 3, 7, 7, 7)
    assert len(zip_select(few, bytes_of(range(7)) - 1).indices) == 6
    pool = UNEQUAL[:80]
    found = zip_select(pool, 79, faithful=True, k1=81, k2=20, k3=15)
    assert sorted(found.indices) == list(range(80))


@pytest.mark.parametrize("mode", ["faithful", "corrected", "corrected, few at a time"])
def test_picks_are_less_redundant_than_random_draws(mode, faithful):
    budget = bytes_of(faithful)
    stages = SMALL if mode == "corrected" else {"k1": 100, "k2": 40, "k3": 20}
    picks = faithful if mode == "faithful" else zip_select(POOL, budget, **stages).indices
    sizes = [len(repr(item)) for item in POOL]
    ratio = lambda indices: compression_ratio([POOL[i] for i in indices])
    draws = [ratio(random_draw(sizes, budget, seed)) for seed in range(20)]
    assert ratio(picks) < min(draws)
    sources = [SOURCES[i] for i in picks]
    assert len(set(sources)) == len(sources)  # no two near-duplicates of one base
    diverse = np.mean([source >= BASES for source in sources])
    assert diverse >= (0.85 if mode == "faithful" else 1 - BASES / len(picks))
    random_sources = [SOURCES[i] for i in random_draw(sizes, budget, 0)]
    assert len(set(random_sources)) < 0.8 * len(random_sources)


@pytest.mark.parametrize("unit", ["bytes", "tokens"])
def test_the_corrected_budget_is_filled_and_never_exceeded(unit):
    texts = [item["text"] for item in UNEQUAL]
    sizes = [len(t.split()) for t in texts] if unit == "tokens" else None
    each = sizes or [len(t) for t in texts]
    for budget in (50, 400, 1000):
        found = zip_select(texts, budget, serialize="text", sizes=sizes, **SMALL)
        assert found.spent == sum(each[i] for i in found.indices) <= budget
        left = set(range(300)) - set(found.indices.tolist())
        assert budget - found.spent < min(each[i] for i in left)  # nothing else fits


def unique_twice(count=60, words=150, seed=3):
    """Texts of 1 kB without anything in common, each twice, at random places: 120 kB."""
    draw = random.Random(seed)
    texts = [" ".join(vocabulary(draw, words)) for _ in range(count)] * 2
    order = draw.sample(range(2 * count), 2 * count)
    return [texts[i] for i in order]


def repeats(texts, picks):
    return len(picks) - len({texts[i] for i in picks})


def test_repeats_beyond_the_window_are_seen_by_the_corrected_mode_only():
    texts = unique_twice()
    stages = {"k1": 60, "k2": 20, "k3": 10}
    half = sum(map(len, texts)) // 2
    assert repeats(texts, zip_select(texts, half, serialize="text", **stages).indices) == 0
    # The twins: one buffer of history, and the released algorithm.
    assert repeats(texts, zip_select(texts, half, serialize="text", history=1, **stages).indices)
    assert repeats(texts, zip_select(texts, 60, faithful=True, **stages).indices)


def test_long_documents_are_recognized():
    draw = random.Random(5)
    long = [" ".join(vocabulary(draw, 9000)) for _ in range(3)]  # of 60 kB each
    pool = [long[0], long[0], long[1], long[1], long[2]]
    found = zip_select(pool, sum(map(len, long)) + 9, serialize="text").indices
    assert {pool[i] for i in found} == set(long) and len(found) == 3


def test_texts_of_unequal_lengths():
    """For as many bytes, the corrected picks are less redundant than the released ones."""
    ratio = lambda indices: compression_ratio([UNEQUAL[i] for i in indices])
    released = zip_select(UNEQUAL, 60, faithful=True, **SMALL).indices
    found = zip_select(UNEQUAL, bytes_of(released, UNEQUAL), **SMALL).indices
    assert ratio(found) < ratio(released)


def test_headers_do_not_make_short_texts_preferred():
    """Of random words all texts are alike, but the released algorithm selects short ones first."""
    draw = random.Random(7)
    words = vocabulary(draw, 4000)
    texts = [" ".join(draw.choices(words, k=k)) for k in (4, 60) * 60]
    short = lambda picks: sum(len(texts[i]) < 100 for i in picks[:15])
    stages = {"k1": 60, "k2": 30, "k3": 15}
    assert short(zip_select(items_of(texts), 45, faithful=True, **stages).indices) == 15
    found = zip_select(texts, sum(map(len, texts)) // 2, serialize="text", **stages).indices
    assert short(found) < 8  # those that fill the first buffer


def test_the_third_stage_passes_over_copies():
    """Also if both copies reached it, and k3 is not smaller than k2."""
    texts = unique_twice(20)
    stages = {"k1": 40, "k2": 10, "k3": 10}
    half = sum(map(len, texts)) // 2
    assert repeats(texts, zip_select(texts, half, serialize="text", **stages).indices) == 0


def test_a_codec_without_a_window():
    texts = unique_twice(10)
    half = sum(map(len, texts)) // 2
    found = zip_select(texts, half, serialize="text", codec="lzma", k1=20, k2=5, k3=5).indices
    assert repeats(texts, found) == 0 and len(found) >= 9


def test_a_budget_that_covers_the_pool_selects_everything():
    for options in ({}, {"faithful": True}, {"sizes": [1] * 9}):
        found = zip_select(POOL[:9], 10**9, **options)
        assert found.whole and found.indices.tolist() == list(range(9))
    one = zip_select([{"a": 1}], 5)
    assert not one.whole and not len(one.indices) and one.spent == 0  # it does not fit
    assert zip_select([{"a": 1}], 8).whole


def test_duplicates_constant_data_and_items_without_text():
    same = zip_select(["the same text"] * 50, 130, serialize="text")
    assert same.indices.tolist() == list(range(10)) and same.spent == 130
    found = zip_select(["", "words", "", "of a text"], 6, serialize="text")
    assert found.indices.tolist() == [1]


class Killed(BaseException):
    """What no handler of errors takes for one."""


def kill_after(count):
    def progress(done):
        nonlocal count
        count -= 1
        if not count:
            raise Killed

    return progress


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("calls", [50, 122, 124])
def test_a_killed_run_goes_on_to_the_same_picks(faithful, calls, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    budget = 50 if faithful else 15_000
    options = {"faithful": faithful, "k1": 60, "k2": 20, "k3": 6}
    whole, kept, told = zip_select(FEW, budget, **options), {}, []
    with pytest.raises(Killed):
        zip_select(FEW, budget, progress=kill_after(calls), finished=kept, **options)
    again = zip_select(FEW, budget, progress=told.append, finished=kept, **options)
    assert again.indices.tolist() == whole.indices.tolist() and again.spent == whole.spent
    assert len([t for t in told if t.stage == "scoring"]) == max(0, 120 - calls)
    done = zip_select(FEW, budget, progress=kill_after(1), finished=kept, **options)
    assert done.indices.tolist() == whole.indices.tolist()  # nothing was left to do


def test_what_is_kept_of_other_runs_is_not_used(monkeypatch):
    kept, told = {}, []
    zip_select(POOL[:20], 5, faithful=True, finished=kept)
    for pool, budget in ((POOL[1:21], 5), (POOL[:20], 6)):
        fresh = zip_select(pool, budget, faithful=True).indices.tolist()
        found = zip_select(pool, budget, faithful=True, finished=kept, progress=told.append)
        assert found.indices.tolist() == fresh
    assert len([t for t in told if t.stage == "scoring"]) == 40


def test_progress_ends_at_the_budget():
    told = []
    zip_select(POOL, 50, faithful=True, progress=told.append, **SMALL)
    assert told[299] == ("scoring", 300, 300) and told[-1] == ("selecting", 50, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": []}, "the pool holds no items"),
        ({"pool": "text"}, "pool: expected a sequence"),
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"budget": 1.5}, "budget: expected an integer"),
        ({"k2": 300}, "k1 >= k2 >= k3 >= 1, got k1=10000, k2=300, k3=301"),
        ({"k3": 0}, "k1 >= k2 >= k3 >= 1"),
        ({"codec": "gzip"}, "codec must be one of zlib, lzma"),
        ({"serialize": "json"}, "serialize must be one of repr, text"),
        ({"serialize": "text"}, "takes strings or bytes, but item 0 is {'text'"),
        ({"history": 0}, "history must be at least 1"),
        ({"sizes": [1, 2]}, "sizes must be 3 integers of 0 or more"),
        ({"sizes": [1, -2, 1]}, "some negative"),
        ({"sizes": [1.0, 1.0, 1.0]}, "got float64"),
        ({"sizes": [1, 1, 1], "faithful": True}, "without sizes"),
        ({"codec": "lzma", "faithful": True}, 'needs codec="zlib"'),
    ],
)
def test_bad_arguments(options, message):
    if options.get("k2") == 300:
        options = options | {"k3": 301}
    given = {"pool": POOL[:3], "budget": 2} | options
    with pytest.raises(ValueError, match=message):
        zip_select(given.pop("pool"), given.pop("budget"), **given)


def test_bad_draws():
    for sizes, budget in (([], 1), (np.ones((1, 1), int), 1), ([-1], 1), ([1.5], 1), ([1], 0)):
        with pytest.raises(ValueError, match="random_draw needs one integer of 0 or more per item"):
            random_draw(sizes, budget, 0)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ([2**62] * 3, r"whose sum is below 2\^63"),
        ([True, True, True], "got bool of shape \\[3\\]$"),
        ([-1, 1, 1], "some negative$"),
    ],
)
def test_sizes_that_are_none(sizes, message):
    with pytest.raises(ValueError, match=message):
        zip_select(["a", "b", "c"], 2, sizes=sizes)
