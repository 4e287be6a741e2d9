"""The Triton kernel against the CPU. Without a GPU it runs under Triton's interpreter, and is compiled for GPUs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.commands import TESTS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; it comes with CUDA builds of torch"
)


def run(*words: str, **variables: str) -> None:
    """Run the cases in a process of their own, since Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=os.environ | variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and " skipped" not in done.stdout, done.stdout + done.stderr


def test_it_draws_the_noise_of_the_cpu() -> None:
    run("tests/smoothing/kernel_cases.py", TRITON_INTERPRET="0" if torch.cuda.is_available() else "1")


@pytest.mark.slow
def test_it_draws_the_noise_of_the_cpu_for_large_images() -> None:
    run("tests/smoothing/kernel_cases.py", "-m", "slow", TRITON_INTERPRET="0" if torch.cuda.is_available() else "1")


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_it_compiles_for_gpus(capability: int) -> None:
    """Without a GPU too. Its division is the correctly rounded one, and nothing is kept in slow local memory."""
    code = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.smoothing.gridnoise_triton import _noisy_images as kernel
types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(["table", "keys", "upper", "lower"], "*i32")
types |= dict(out="*fp32", images="*u8", below="*i16", steps="fp32")
constants = dict(LEAPS=11, BLOCKS=32, CALL=0, LOWER=2**24)
source = ASTSource(fn=kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
ptx = triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options=dict(num_warps=1)).asm["ptx"]
assert "div.rn.f32" in ptx and "div.full" not in ptx and "div.approx" not in ptx and ".local" not in ptx
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
