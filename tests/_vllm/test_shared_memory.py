"""Shared memory that a killed process has left."""

import os
import subprocess
import sys

from qlora_infer._vllm import shared_memory

SCRIPT = """
import os
from multiprocessing.shared_memory import SharedMemory
from qlora_infer._vllm import shared_memory
segment = SharedMemory(create=True, size=4096)
found = shared_memory.segments_of([os.getpid()])
assert found == {segment.name}, (found, segment.name)
segment.close()
shared_memory.remove(found)
assert not os.path.exists("/dev/shm/" + segment.name)
shared_memory.remove(found)  # nothing is there any more
"""


def test_what_a_process_shares_is_found_and_removed():
    """By its name, once; and Python has nothing to say of it when the program ends."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_that_has_ended_shares_nothing():
    """Asking for it is no error."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert shared_memory.segments_of([child.pid, os.getpid()]) == shared_memory.segments_of([os.getpid()])
