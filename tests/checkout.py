"""A checkout in the shape of sglang's, of our own making: launchers, fixtures, and test files that use them."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

TEST_UTILS = """
import os, subprocess, unittest
import requests, torch
from sglang.srt.environ import envs
from sglang.srt.utils import get_bool_env_var, kill_process_tree, retry

DEFAULT_BIG_MODEL = "org/big"
DEFAULT_URL_FOR_TEST = "http://127.0.0.1:" + str(10000 + int(os.environ.get("CUDA_VISIBLE_DEVICES", "0")[0]) * 2000)


def is_in_ci():
    return get_bool_env_var("SGLANG_IS_IN_CI")


def try_cached_model(model):
    folder = os.getenv("DEFAULT_MODEL_CACHE_DIR")
    return os.path.join(folder, model) if folder else model


def _never(*args):
    raise RuntimeError("a launcher was run")


def popen_launch_server(model, base_url, timeout, api_key=None, other_args=None, env=None, device="auto"):
    _never()


def popen_launch_pd_server(model, base_url, timeout, api_key=None, other_args=(), env=None):
    _never()


def run_bench_one_batch(model, other_args):
    _never()


class CustomTestCase(unittest.TestCase):
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        setup = cls.setUpClass.__func__

        def safe(klass):
            try:
                setup(klass)
            except Exception:
                klass.tearDownClass()
                raise

        cls.setUpClass = classmethod(safe)

    def _callTestMethod(self, method):
        retry(lambda: super(CustomTestCase, self)._callTestMethod(method), max_retry=1)
"""
RUNNERS = """
from sglang.srt.entrypoints.engine import Engine
import torch, transformers


class SRTRunner:
    def __init__(self, model_path, torch_dtype, tp_size=1, lora_paths=None, disable_cuda_graph=False):
        self.engine = Engine(
            model_path=model_path, tp_size=tp_size, lora_paths=lora_paths, disable_cuda_graph=disable_cuda_graph
        )

    def forward(self, prompts=()):
        return self.engine.generate(prompts)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.engine.shutdown()
"""
ENVIRON = """
import os
from contextlib import contextmanager


class EnvField:
    def __set_name__(self, owner, name):
        self.name = name

    @contextmanager
    def override(self, value):
        os.environ[self.name] = str(value)
        yield
        os.environ.pop(self.name)


class Envs:
    SGLANG_SWITCH = EnvField()


envs = Envs()
"""
HEAD = """
import json, os, random, subprocess, sys, tempfile, threading, time, unittest
import requests, torch
import sglang as sgl
from sglang.srt.environ import envs
from sglang.srt.utils import is_blackwell, is_hip, get_device_sm, kill_process_tree
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.test_utils import *
from sglang.test.test_utils import CustomTestCase, is_in_ci, popen_launch_pd_server, popen_launch_server
from sglang.test.test_utils import run_bench_one_batch, try_cached_model
register_cuda_ci(est_time=9, stage="base-c", runner_config="8-gpu-h200")
"""


class Checkout:
    """A folder with ``python/sglang/test`` and ``test/registered``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("python/sglang/__init__.py", "raise ImportError('sglang itself is not run')")
        self.write("python/sglang/test/__init__.py", "")
        self.write("python/sglang/test/test_utils.py", TEST_UTILS)
        self.write("python/sglang/test/runners.py", RUNNERS)
        self.write("python/sglang/test/ci/__init__.py", "")
        self.write("python/sglang/test/ci/ci_register.py", "def register_cuda_ci(*args, **kwargs):\n    return None\n")
        self.write("python/sglang/srt/environ.py", ENVIRON)
        (root / "test" / "registered").mkdir(parents=True)

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
        return path

    def test(self, name: str, body: str, head: str = HEAD) -> str:
        """Write a test file with the imports that upstream's have; return its name below the checkout."""
        self.write(f"test/registered/{name}", dedent(head) + dedent(body))
        return f"test/registered/{name}"
