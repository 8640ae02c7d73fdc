"""The C++ that a GPU compiles for RCT-AF, compiled here for the CPU, beside the closed form."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.cuda.jiterator import _CodeParser

from hessdiag.activations import gpu
from hessdiag.activations.formula import closed_form, working_dtype

CASES = [(beta, order, times) for beta in range(4) for order in range(4) for times in (False, True)]
C_TYPES = {torch.float32: "float", torch.float64: "double"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Every case as a loop over arrays, with T as float and as double."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    lines = ["#include <cmath>", "using namespace std;"]
    for beta, order, times in CASES:
        for wide in (False, True):
            space = f"wide_{int(wide)}"
            lines.append(f"namespace {space} {{\n{gpu.source(beta, order, times, wide)}\n}}")
            name = f"rct_{beta}_{order}{'_times' if times else ''}"
            for real in C_TYPES.values():
                call = f"{space}::{name}<{real}>(x[i]{', g[i]' if times else ''}, alpha)"
                lines.append(
                    f'extern "C" void {name}_{space}_{real}(const {real}* x, const {real}* g, {real}* out, long n, '
                    f"double alpha) {{ for (long i = 0; i < n; ++i) out[i] = {call}; }}"
                )
    folder: Path = tmp_path_factory.mktemp("gpu")
    (folder / "kernels.cpp").write_text("\n".join(lines), encoding="utf-8")
    subprocess.run(
        ["g++", "-O1", "-shared", "-fPIC", "-o", str(folder / "kernels.so"), str(folder / "kernels.cpp")], check=True
    )
    return ctypes.CDLL(str(folder / "kernels.so"))


def compiled(library: ctypes.CDLL, case: tuple[int, int, bool], x: Tensor, g: Tensor, alpha: float) -> Tensor:
    beta, order, times = case
    wide = working_dtype(x, alpha, beta + order) == torch.float64
    name = f"rct_{beta}_{order}{'_times' if times else ''}_wide_{int(wide)}_{C_TYPES[x.dtype]}"
    out = torch.empty_like(x)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, g, out)]
    getattr(library, name)(*pointers, ctypes.c_long(x.numel()), ctypes.c_double(alpha))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_the_source_is_the_closed_form(library: ctypes.CDLL, case: tuple[int, int, bool], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    near = torch.linspace(-8, 8, 1001, dtype=dtype)
    far = torch.tensor([0.0, 40, -40, 300, -300, 1e4, -1e4, float("inf"), float("nan")], dtype=dtype)
    x = torch.cat([near, far])
    g = torch.randn(len(x), generator=generator, dtype=dtype)
    beta, order, times = case
    for alpha in (0.5, 3.0, 14.0, 100.0):
        exact = closed_form(x.double(), alpha, beta, order)
        expected = exact * g.double() if times else exact
        scale = closed_form(near.double(), alpha, beta, order).abs().max()
        if order == 0:
            scale = scale + x.double().abs()
        found = compiled(library, case, x, g, alpha).double()
        known = ~(expected.isnan() | expected.isinf())
        assert torch.equal(found.isnan(), expected.isnan())
        error = ((found - expected).abs() / (scale * (1 + g.double().abs())))[known].max()
        assert float(error) < (2e-14 if dtype == torch.float64 else 4e-6)


@pytest.mark.parametrize("case", CASES)
def test_torch_finds_the_function_in_the_source(case: tuple[int, int, bool]) -> None:
    beta, order, times = case
    found = _CodeParser(gpu.source(*case, wide=False))
    assert found.function_name == f"rct_{beta}_{order}{'_times' if times else ''}"
    assert found.function_params == f"(T x_given, {'T g_given, ' if times else ''}double alpha_given)"
    assert found.function_body.startswith("{\n    typedef T R;")


def test_on_the_cpu_nothing_is_asked_of_a_gpu() -> None:
    x = torch.randn(3)
    assert not gpu.served(x)


def test_a_compiler_that_refuses_leaves_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise RuntimeError("nvrtc: no such architecture\nand more")

    monkeypatch.setattr(gpu, "kernel", lambda *_: refuse)
    monkeypatch.setattr(gpu, "_refused", [])
    with pytest.warns(UserWarning, match="unfused on this GPU.*no such architecture$"):
        assert gpu.value(torch.randn(3), 1.0, 1, 0) is None
    assert gpu._refused


def test_what_fails_while_a_graph_is_recorded_is_not_the_compilers_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu, "kernel", lambda *_: fail)
    monkeypatch.setattr(gpu, "_refused", [])
    monkeypatch.setattr(gpu, "_recorded", lambda: True)
    with pytest.raises(RuntimeError, match="capturing"):
        gpu.value(torch.randn(3), 1.0, 1, 0)
    assert not gpu._refused
