"""The order in which waiting requests run."""

from hypothesis import given
from hypothesis import strategies as st

from qlora_infer.requests.queue import RequestQueue
from qlora_infer.requests.request import GenerationRequest, RequestHandle


def make_handle(number):
    return RequestHandle(GenerationRequest(f"r{number}", "prompt", None), cancel=lambda handle: None)


@given(st.lists(st.sampled_from(["append", "pop", "remove"]), max_size=60), st.randoms(use_true_random=False))
def test_requests_come_out_in_the_order_in_which_they_came(actions, random):
    """Whatever is appended, popped and removed in between, the oldest waiting request is always the next one."""
    queue, waiting = RequestQueue(), []
    for number, action in enumerate(actions):
        if action == "append":
            handle = make_handle(number)
            queue.append(handle)
            waiting.append(handle)
        elif action == "pop":
            assert queue.pop(lambda handle: True) is (waiting.pop(0) if waiting else None)
        elif waiting:
            handle = waiting.pop(random.randrange(len(waiting)))
            assert queue.remove(handle)
            assert not queue.remove(handle)
        assert len(queue) == len(waiting)
    assert queue.drain() == waiting
    assert len(queue) == 0


def test_nobody_overtakes_a_request_that_cannot_run_yet():
    """While the oldest request is not admissible, no other one runs."""
    queue = RequestQueue()
    first, second = make_handle(1), make_handle(2)
    queue.append(first)
    queue.append(second)
    assert queue.pop(lambda handle: handle is not first) is None
    assert queue.pop(lambda handle: True) is first
