"""Makes scikit-misc's LOESS fit crash on fewer than 20 points, in every Python process with this folder on PYTHONPATH.

Python runs this file at its start. It stands for whatever crafted data crashes native code tomorrow.
"""

import ctypes
import importlib.abc
import importlib.util
import sys


def _poison(module):
    fit = module.loess

    def deadly(x, *args, **kwargs):
        return ctypes.string_at(0) if len(x) < 20 else fit(x, *args, **kwargs)

    module.loess = deadly


class _AfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "skmisc.loess":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            _poison(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _AfterImport())
