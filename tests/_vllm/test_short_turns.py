"""How soon a thread gets Python's lock, while adapters are read."""

import sys
import threading

import pytest

from qlora_infer._vllm.short_turns import ShortTurns


@pytest.fixture
def before():
    """What it was, and is afterwards."""
    interval = sys.getswitchinterval()
    yield interval
    sys.setswitchinterval(interval)


def test_turns_are_short_until_the_last_thread_has_left(before):
    """Whichever of two comes or leaves first."""
    turns, may_leave, is_within = ShortTurns(0.0005), threading.Event(), threading.Event()

    def stay():
        with turns:
            is_within.set()
            may_leave.wait(10)

    thread = threading.Thread(target=stay)
    with turns:
        thread.start()
        assert is_within.wait(10)
        assert sys.getswitchinterval() == pytest.approx(0.0005)
    assert sys.getswitchinterval() == pytest.approx(0.0005)
    may_leave.set()
    thread.join(10)
    assert sys.getswitchinterval() == before


def test_turns_are_as_before_after_an_error(before):
    """An adapter that cannot be read leaves nothing behind."""
    turns = ShortTurns(0.0005)
    with pytest.raises(OSError, match="unreadable"), turns:
        raise OSError("unreadable")
    assert sys.getswitchinterval() == before


def test_what_others_have_set_in_between_is_put_back(before):
    """It is what was there when the first came, each time."""
    turns = ShortTurns(0.0005)
    with turns:
        pass
    sys.setswitchinterval(0.002)
    with turns:
        assert sys.getswitchinterval() == pytest.approx(0.0005)
    assert sys.getswitchinterval() == pytest.approx(0.002)
