"""Every kernel is compiled for an H100, on a machine without one, and its machine code is read.

The functions of the room run on meta tensors. Where they launch a kernel, it is compiled instead, by the path
that a launch takes: types, divisibility and constants are those of the call.
"""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import triton_modules

pytest.importorskip("triton", reason="the kernels need triton (the extra `kernels`)")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nanopost.kernels import (
    cross_entropy,
    gather_logps,
    linear_logps_chunked,
    linear_logps_single,
    rms_norm,
    rope,
    swiglu,
)

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = 227 * 1024  # bytes of shared memory that a program of an H100 may have
SCALARS = 7  # what a kernel reads for a whole row: its target, that logit, two sums, three gradients


@dataclass(frozen=True)
class Compiled:
    """A kernel, what it was compiled for, and what came out."""

    kernel: str
    dtype: torch.dtype
    options: dict[str, Any]
    shared: int  # bytes
    ptx: str
    registers: int  # of a thread
    stack: int  # bytes of a thread that did not fit into registers
    cubin: Path

    def __str__(self) -> str:
        return f"{self.kernel} for {self.dtype} with {self.options}"


def kernels() -> dict[str, JITFunction]:
    """What the room launches, as module.name."""
    return {
        f"{module.__name__.split('.')[-1]}.{name}": function
        for module in triton_modules()
        for name, function in vars(module).items()
        if isinstance(function, JITFunction) and name.endswith("_kernel")
    }


def compile_launches(run: Callable[[], object], dtype: torch.dtype, folder: Path) -> list[Compiled]:
    """Run a function whose launches compile."""
    found: list[Compiled] = []

    class Launcher:
        def __init__(self, name: str, kernel: JITFunction) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return partial(self.compile, grid)

        def compile(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            cubin = folder / f"{compiled.hash}.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            usage = tool("cuobjdump", "--dump-resource-usage", cubin)
            registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
            ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
            found.append(Compiled(self.name, dtype, options, shared, ptx, registers, stack, cubin))

    gpu = SimpleNamespace(
        get_current_target=lambda: HOPPER, get_current_device=lambda: "none", get_current_stream=lambda _: 0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triton.runtime.jit.driver", SimpleNamespace(active=gpu))
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns that its default will change
        for name, kernel in kernels().items():
            module, attribute = name.split(".")
            patch.setattr(f"nanopost.kernels.{module}.{attribute}", Launcher(name, kernel))
        run()
    return found


def tool(name: str, *arguments: object) -> str:
    """What one of the assembler's tools prints; they come with triton."""
    command = [str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def launch_everything(dtype: torch.dtype) -> None:
    """Each function, forward and backward, at sizes of Llama 3; rms_norm with every number of warps."""
    empty = partial(torch.empty, device="meta", dtype=dtype)
    leaf = partial(empty, requires_grad=True)
    targets = torch.empty(256, dtype=torch.int64, device="meta")
    sum_of(gather_logps.gather_logps(leaf(256, 128_256), targets, temperature=0.7)).backward()
    cross_entropy.cross_entropy(leaf(256, 128_256).clone(), targets).sum().backward()
    for width in (512, 1024, 2048, 4096, 8192):
        rms_norm.rms_norm(leaf(256, width), leaf(width), 1e-5).sum().backward()
    swiglu.swiglu(leaf(256, 14_336), leaf(256, 14_336)).sum().backward()
    rope.rope(leaf(256, 32, 128), empty(256, 64), empty(256, 64)).sum().backward()
    head = empty(256, 4096), empty(128_256, 4096), targets, 0.7
    found = linear_logps_chunked.forward(*head)
    linear_logps_chunked.backward(*head, found[2], found[1], found)
    if dtype == torch.bfloat16:  # the single kernel multiplies halves only
        linear_logps_single.forward(*head)


def sum_of(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(outputs).sum()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    folder, found = tmp_path_factory.mktemp("compiled"), dict[Path, Compiled]()
    for dtype in (torch.bfloat16, torch.float32):
        launches = compile_launches(partial(launch_everything, dtype), dtype, folder)
        found |= {each.cubin: each for each in launches}  # some are launched more than once
    return list(found.values())


def test_every_kernel_of_the_room_is_compiled(compiled: list[Compiled]) -> None:
    assert {each.kernel for each in compiled} == set(kernels()) != set()
    single = {"linear_logps_single._forward_kernel"}
    assert {each.kernel for each in compiled if each.dtype == torch.float32} == set(kernels()) - single
    sources = "".join(kernel.src for kernel in kernels().values())
    for module in triton_modules():  # what is no kernel is compiled inside of one
        for name, function in vars(module).items():
            if isinstance(function, JITFunction) and not name.endswith("_kernel"):
                assert f"{name}(" in sources, name


def test_no_kernel_spills_registers(compiled: list[Compiled]) -> None:
    for each in compiled:
        assert each.stack == 0 and 0 < each.registers <= 255, each


def test_a_block_of_32768_spills(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the test above would see: 32 logits a thread, and 64 registers for all that is made of them."""
    logits = torch.empty(256, 128_256, device="meta", requires_grad=True)
    targets = torch.empty(256, dtype=torch.int64, device="meta")
    monkeypatch.setattr(gather_logps, "BACKWARD", {"BLOCK": 32_768, "num_warps": 32})
    *_, backward = compile_launches(
        lambda: sum_of(gather_logps.gather_logps(logits, targets)).backward(), torch.float32, tmp_path
    )
    assert backward.kernel == "gather_logps._backward_kernel" and backward.stack > 0


def test_tensors_are_read_and_written_128_bits_at_a_time(compiled: list[Compiled]) -> None:
    for each in compiled:
        loads = re.findall(r"\bld\.global\S*?(\.v\d)?\.[bfu]\d+", each.ptx)
        stores = re.findall(r"\bst\.global\S*?(\.v\d)?\.[bfu]\d+", each.ptx)
        assert set(loads) | set(stores) <= {".v4", ""}, each
        assert loads.count("") <= SCALARS, each
        assert ".v4" in loads or "UTMALDG" in tool("nvdisasm", each.cubin), each


def test_products_run_on_the_tensor_cores_of_hopper(compiled: list[Compiled]) -> None:
    multiplying = [each for each in compiled if "mma" in each.ptx]
    assert {each.kernel for each in multiplying} == {"linear_logps_single._forward_kernel"}
    for each in multiplying:
        code = tool("nvdisasm", each.cubin)
        assert "HGMMA.64x128x16.F32.BF16" in code and "HMMA" not in code, each
        assert "UTMALDG" in code, each  # both operands come by the tensor memory accelerator


def test_shared_memory_fits(compiled: list[Compiled]) -> None:
    for each in compiled:
        assert each.shared <= SHARED, each
    assert max(each.shared for each in compiled) > 100_000  # the single kernel keeps three stages of tiles
