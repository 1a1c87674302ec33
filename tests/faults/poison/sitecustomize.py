"""Makes rows crash, hang or raise by their key, in every Python process with this folder on its PYTHONPATH.

Python runs this file at its start. `adata_id` says what a row does: raise:, segfault:, hang:, memory:, or just slow:.
"""

import ctypes
import importlib.abc
import importlib.util
import sys
import time


def _die(how):
    if how == "raise":
        raise RuntimeError("a fault that nobody foresaw")
    if how == "segfault":
        ctypes.string_at(0)
    if how == "slow":
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass
    if how == "hang":
        ctypes.PyDLL(None).sleep(1_000_000)  # holds the GIL, like native code that never returns
    if how == "memory":
        memory = []
        while True:
            memory.append(bytes(range(256)) * 2**20)


def _poison(module):
    prepare = module.RowReader.prepare

    def deadly(self, row, *args, **kwargs):
        _die(str(row["adata_id"]).partition(":")[0])
        return prepare(self, row, *args, **kwargs)

    module.RowReader.prepare = deadly


class _AfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "scgpt_batch.inference.row_reader":
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
