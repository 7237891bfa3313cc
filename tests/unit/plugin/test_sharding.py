"""Suites are divided among runners: each test once, few packs twice, and all about as long."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_vmbottle.plugin.sharding import Test, split


def a_test(number: int, pack: str = "", seconds: float = 1.0, unit: str = "") -> Test:
    return Test(nodeid=f"test_{number}", unit=unit or f"test_{number}", packs=(pack,) if pack else (), seconds=seconds)


suites = st.lists(
    st.builds(
        lambda pack, seconds, unit: (pack, seconds, unit),
        st.sampled_from(["", "base", "web", "database", "desktop"]),
        st.floats(0.01, 3.0),
        st.sampled_from(["", "", "", "module_a", "module_b"]),
    ),
    max_size=200,
).map(lambda facts: [a_test(number, *fact) for number, fact in enumerate(facts)])


@settings(deadline=None)
@given(tests=suites, count=st.integers(1, 8), seed=st.integers(0, 99))
def test_each_test_is_in_one_shard_with_its_unit_whatever_their_order_is(tests: list[Test], count: int, seed: int) -> None:
    shards = split(tests, count)
    assert len(shards) == count
    assert sorted(test.nodeid for shard in shards for test in shard.tests) == sorted(test.nodeid for test in tests)
    for packs, unit in {(test.packs, test.unit) for test in tests}:
        assert sum(any((test.packs, test.unit) == (packs, unit) for test in shard.tests) for shard in shards) == 1
    shuffled = list(tests)
    random.Random(seed).shuffle(shuffled)
    assert [[test.nodeid for test in shard.tests] for shard in split(shuffled, count)] == [
        [test.nodeid for test in shard.tests] for shard in shards
    ]


@pytest.mark.parametrize("seed", range(30))
def test_shards_take_about_as_long_as_each_other_and_few_packs_are_on_several(seed: int) -> None:
    chance = random.Random(seed)
    count, kinds = chance.randint(2, 12), chance.randint(1, 20)
    weights = [chance.random() ** 3 + 0.01 for _ in range(kinds)]
    tests = [
        a_test(number, pack, seconds=chance.lognormvariate(0, 0.8))
        for number, pack in enumerate(chance.choices([f"pack{kind}" for kind in range(kinds)], weights, k=1000))
    ]
    shards = split(tests, count)
    best = sum(test.seconds for test in tests) / count
    assert max(shard.seconds for shard in shards) < 1.1 * best
    placed = sum(len(shard.packs) for shard in shards)
    assert placed < len({test.packs for test in tests}) + 2 * count


def test_a_pack_whose_tests_fit_on_one_runner_is_on_no_other() -> None:
    tests = [a_test(number, "abcd"[number % 4]) for number in range(40)]
    assert [len(shard.packs) for shard in split(tests, 4)] == [1] * 4
    assert [len(shard.packs) for shard in split(tests, 2)] == [2] * 2


def test_no_shard_takes_much_longer_than_the_longest_test() -> None:
    shards = split([a_test(0, "web", 100), *(a_test(number, "web") for number in range(1, 50))], 3)
    assert max(shard.seconds for shard in shards) <= 105
