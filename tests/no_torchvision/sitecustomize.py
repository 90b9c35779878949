"""An environment without torchvision and its kin, for tests: put this folder first in PYTHONPATH.

Python imports this file as it starts, in every process of an engine.
"""

import sys
from importlib.machinery import PathFinder

ABSENT = {"torchvision", "torchaudio", "torchcodec"}


class Finder(PathFinder):
    """Python's own, but for what is to be absent."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname in ABSENT else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
