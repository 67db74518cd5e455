from __future__ import annotations

import pytest

from common.errors import LinkError
from common.link import federation_pb2 as pb
from common.link.versions import NEWEST, OLDEST, OWN, Versions, offered, require_spoken, spoken

RANGES = [Versions(low, high) for low in range(1, 7) for high in range(low, 7)]


def hello(versions: Versions) -> pb.Hello:
    return pb.Hello(protocol=versions.newest, oldest=versions.oldest, software="sotto H")


@pytest.mark.parametrize("own", RANGES, ids=str)
def test_both_ends_agree_on_the_newest_that_both_speak_or_say_so(own: Versions) -> None:
    for theirs in RANGES:
        both = range(max(own.oldest, theirs.oldest), min(own.newest, theirs.newest) + 1)
        if both:
            version = spoken(hello(theirs), "sotto C", own)
            assert version == max(both)
            require_spoken(pb.Welcome(protocol=version), "sotto H", theirs)
            continue
        with pytest.raises(LinkError) as refused:
            spoken(hello(theirs), "sotto C", own)
        older = "holder's" if theirs.newest < own.oldest else "coordinator's"
        for part in ("sotto H", "sotto C", str(own), str(theirs), f"update the {older}"):
            assert part in str(refused.value)


def test_a_holder_of_the_first_release_speaks_its_only_version() -> None:
    first = pb.Hello(protocol=1, software="sotto 0.1.0")

    assert offered(first) == Versions(1, 1)
    with pytest.raises(LinkError, match=r"sotto 0\.1\.0\) speaks version 1 .* update the holder's"):
        spoken(first, "sotto 0.2.0")


def test_a_coordinator_of_the_first_release_is_told_from_its_welcome() -> None:
    welcome = pb.Welcome(software="sotto 0.1.0")

    with pytest.raises(
        LinkError, match=r"coordinator's software \(sotto 0\.1\.0\) speaks version 1"
    ):
        require_spoken(welcome, "sotto 0.2.0")


@pytest.mark.parametrize("protocol", [OLDEST - 1, NEWEST + 1, 2**32 - 1])
def test_a_coordinator_that_chooses_what_was_not_offered_is_refused(protocol: int) -> None:
    with pytest.raises(LinkError, match="install the same release"):
        require_spoken(pb.Welcome(protocol=protocol), "sotto H")


def test_the_own_range_is_one() -> None:
    assert Versions(OLDEST, NEWEST) == OWN
    assert OLDEST <= NEWEST
    assert OWN.common(OWN) == NEWEST
