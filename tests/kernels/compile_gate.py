"""Compiles the kernels that a call launches for a Hopper GPU (sm_90), without one, and reports what became of them.

The call runs in a child process (the compiler may abort) on CPU tensors, with every launch replaced by its compilation,
so that signature, alignment, constants, warps and stages are those of the real launch. Under a version of Triton whose
compiler aborts or spills, the test that called this fails.

    def forward(width):
        launch_forward(torch.empty(4, width, dtype=torch.bfloat16))

    (kernels,) = compile_launches([(forward, {"width": 512})])
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.runs import PATIENCE, ROOT, environment

# Bytes that a block may have on an H100 or H200.
SHARED_MEMORY = 232_448
_REPORT = "compiled: "


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler made of one launch.

    Attributes:
        name: of the kernel function.
        registers: of a thread.
        stack_bytes: of a thread, in local memory: spilled registers. 0 is the aim.
        spills_in_loop: accesses to local memory in the innermost loops with tensor-core products; 0 where nothing is
            spilled, None where something is and there is no such loop.
        shared_bytes: of a block.
        wgmma: instructions in the PTX for the tensor cores of Hopper, counted where they are issued.
        mma: instructions for tensor cores in the manner of Ampere, half as fast or less.
        local_stores: st.local in the PTX.
        asynchronous_copies: cp.async and TMA loads in the PTX: a pipelined loop has some.
    """

    name: str
    registers: int
    stack_bytes: int
    spills_in_loop: int | None
    shared_bytes: int
    wgmma: int
    mma: int
    local_stores: int
    asynchronous_copies: int


def compile_launches(calls: list[tuple[Callable, dict]], timeout: float = PATIENCE) -> list[list[CompiledKernel]]:
    """For each call, the kernels that it launches, in order, compiled for sm_90.

    Args:
        calls: functions of a module's top level with keyword arguments that JSON can hold. They launch kernels with CPU
            tensors, by the functions that launch, not by public ones that look at the device.
        timeout: seconds for all calls.

    Raises:
        AssertionError: a call or the compiler failed; with its name and what it wrote.
    """
    wanted = [{"file": f.__code__.co_filename, "function": f.__name__, "arguments": a} for f, a in calls]
    variables = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_gate"]
    text = json.dumps(wanted)
    done = subprocess.run(command, input=text, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout)
    lines = [line.removeprefix(_REPORT) for line in done.stdout.splitlines() if line.startswith(_REPORT)]
    if len(lines) < len(calls):
        function, arguments = calls[len(lines)]
        raise AssertionError(
            f"{function.__name__}({arguments}) did not compile, exit code {done.returncode}:\n{done.stderr[-4000:]}"
        )
    return [[CompiledKernel(**kernel) for kernel in json.loads(line)] for line in lines]


def assert_lean(kernel: CompiledKernel, *, stack_bytes: int = 0, tensor_cores: bool = False) -> None:
    """Fits a Hopper multiprocessor, spills no more than stated, and has wgmma where its matrix products need them."""
    assert kernel.stack_bytes <= stack_bytes, kernel
    assert kernel.shared_bytes <= SHARED_MEMORY, kernel
    if tensor_cores:
        assert kernel.wgmma > 0, kernel


def hopper_without_gpu() -> list:
    """From here on a launch compiles for sm_90 and runs nothing; the result grows by (name, compiled) for each."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Hopper(DriverBase):
        @classmethod
        def is_active(cls):
            return True

        def map_python_to_cpp_type(self, ty):
            raise NotImplementedError("nothing is launched")

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self):
            raise NotImplementedError("nothing is launched")

        def get_benchmarker(self):
            raise NotImplementedError("nothing is launched")

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_device_capability(self, device=0):
            return 9, 0

    triton.runtime.driver.set_active(Hopper())
    compiled = []
    original = triton.runtime.jit.JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))
        return kernel

    triton.runtime.jit.JITFunction.run = run
    return compiled


def _spills_in_loop(sass: str) -> int | None:
    """As CompiledKernel.spills_in_loop, from cuobjdump's listing: a loop is what a jump back encloses."""
    instructions = {int(a, 16): text for a, text in re.findall(r"/\*([0-9a-f]{4,8})\*/\s+([^;]*);", sass)}
    jumps = [(re.search(r"\bBRA\b.*0x([0-9a-f]+)", text), source) for source, text in instructions.items()]
    # The kernel ends with a jump to itself.
    loops = [(int(m[1], 16), source) for m, source in jumps if m and int(m[1], 16) < source]
    bodies = {loop: [t for a, t in instructions.items() if loop[0] <= a <= loop[1]] for loop in loops}
    loops = [loop for loop in loops if any("MMA" in text for text in bodies[loop])]
    inner = [x for x in loops if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    if not inner:
        return None
    return sum(bool(re.search(r"\b(LDL|STL)\b", text)) for loop in inner for text in bodies[loop])


def _describe(name: str, kernel) -> CompiledKernel:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def listing(what: str) -> str:
            return subprocess.run([cuobjdump, what, file.name], capture_output=True, text=True, check=True).stdout

        usage = listing("-res-usage")
        stack_bytes = int(re.search(r"STACK:(\d+)", usage)[1])
        # To list the instructions takes half a second; without a stack none of them can go to local memory.
        spills_in_loop = _spills_in_loop(listing("-sass")) if stack_bytes else 0
    ptx = kernel.asm["ptx"]
    return CompiledKernel(
        name=name,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack_bytes=stack_bytes,
        spills_in_loop=spills_in_loop,
        shared_bytes=kernel.metadata.shared,
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma=len(re.findall(r"(?<!w)(?<!wg)mma\.sync", ptx)),
        local_stores=len(re.findall(r"st\.local", ptx)),
        asynchronous_copies=len(re.findall(r"cp\.async\.(?:ca|cg|bulk)", ptx)),
    )


def _main() -> None:
    modules, described = {}, {}
    compiled = hopper_without_gpu()
    for call in json.load(sys.stdin):
        file = call["file"]
        if file not in modules:
            spec = importlib.util.spec_from_file_location(Path(file).stem, file)
            modules[file] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[file])
        compiled.clear()
        getattr(modules[file], call["function"])(**call["arguments"])
        for name, kernel in compiled:
            # Triton has compiled once what several calls launch alike.
            if kernel.hash not in described:
                described[kernel.hash] = asdict(_describe(name, kernel))
        reports = [described[kernel.hash] for _, kernel in compiled]
        print(_REPORT + json.dumps(reports), flush=True)


if __name__ == "__main__":
    _main()
