"""PyPI's torchvision beside a CPU build of torch, for tests: put this folder first in PYTHONPATH.

Its compiled operators are linked against CUDA's libraries and do not load there. All of it that a model's processor
uses is Python, but registers what two of those operators return, and fails because there are none. So they are
declared first. PyPI's torchaudio and torchcodec, which transformers and vLLM import where they are installed, fail there
too, and only models of speech and video use them: the one stays empty, and the other is as if it were not installed.

Python imports this file as it starts, in every process of an engine. It does nothing until one of the three is
imported, and nothing then to a build that matches.
"""

import sys
from importlib.machinery import PathFinder, SourceFileLoader

#: Those that ``torchvision/_meta_registrations.py`` registers even where the compiled ones did not load (0.26 to 0.28).
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

#: torch forgets a library's operators with the object that declared them.
_declared = []


class TorchvisionLoader(SourceFileLoader):
    """Python's own, after the operators."""

    def exec_module(self, module):
        from pathlib import Path

        import torch

        try:
            torch.ops.load_library(str(Path(self.path).with_name("_C.so")))
        except (ImportError, OSError):
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                library.define(operator)
            _declared.append(library)
        super().exec_module(module)


class TorchaudioLoader(SourceFileLoader):
    """Python's own, which may fail and leave an empty module: transformers does not catch an error."""

    def exec_module(self, module):
        try:
            super().exec_module(module)
        except OSError:
            pass


class TorchcodecLoader(SourceFileLoader):
    """Python's own, with the error that vLLM catches."""

    def exec_module(self, module):
        try:
            super().exec_module(module)
        except OSError as error:
            raise ImportError(str(error)) from error


LOADERS = {"torchvision": TorchvisionLoader, "torchaudio": TorchaudioLoader, "torchcodec": TorchcodecLoader}


class Finder:
    """Finds them where Python's own finder does."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname not in LOADERS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = LOADERS[fullname](spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, Finder)
