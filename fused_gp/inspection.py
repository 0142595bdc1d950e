"""What Triton compiles every kernel to, for GPUs that need not be present: `python -m fused_gp inspect`.

Each variant that the launchers use is compiled on a null device, and its machine code is read.
"""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget

import fused_gp.kernels as kernels

from . import arguments
from .form import accumulation_type
from .kernels.null_device import Launch, null_device


class Processor(NamedTuple):
    """A target, and the limits of its multiprocessor (compute unit): threads, programs, bytes of shared memory.

    NVIDIA: "Technical Specifications per Compute Capability" in the CUDA C++ Programming Guide. AMD: SIMDs of a compute
    unit times wavefronts of a SIMD, LLVM's "User Guide for AMDGPU Backend"; LLVM itself reports how many fit.
    """

    target: GPUTarget
    threads: int
    programs: int = 32
    shared: int = 0


PROCESSORS = {
    f"sm_{arch}": Processor(GPUTarget("cuda", arch, 32), threads, programs, kib * 1024)
    for arch, threads, programs, kib in (
        (75, 1024, 16, 64), (80, 2048, 32, 164), (86, 1536, 16, 100), (89, 1536, 24, 100), (90, 2048, 32, 228),
        (100, 2048, 32, 228), (120, 1536, 24, 100),
    )
} | {
    "gfx90a": Processor(GPUTarget("hip", "gfx90a", 64), 4 * 8 * 64),
    "gfx942": Processor(GPUTarget("hip", "gfx942", 64), 4 * 8 * 64),
    "gfx1100": Processor(GPUTarget("hip", "gfx1100", 32), 2 * 16 * 32),
}  # fmt: skip

# Registers of an NVIDIA multiprocessor. A warp is given 256 at a time, and warps are scheduled in groups of four.
REGISTERS = 65536


class Inspection(NamedTuple):
    """One variant of a kernel on one target. The code that is counted: the loop over tiles; without one, all up to the
    arrival of the program (atomic), or the end."""

    kernel: str
    variant: str
    dtype: str
    target: str
    registers: int  # of a thread
    spilled_bytes: int  # of a thread
    shared_bytes: int  # of a program
    loads: dict[int, int]  # {bits: instructions} on global memory, of one thread in the code that is counted
    stores: dict[int, int]
    elements: float  # of a row that a thread processes in that code
    instructions: int  # of any kind in that code
    in_flight_bytes: int  # the most that a thread has loaded before it waits for any of it
    programs: int  # that fit on a multiprocessor at once
    occupancy: float  # the share of its threads that they fill
    moved: int  # elements read and written for each element of the rows, by the code
    minimum: int  # the same, by the arguments
    arrival: list[str]  # accesses and barriers from the last store before the atomic to the first load after it


class Case(NamedTuple):
    """A batch of rows, and the calls below that are made on it."""

    name: str
    rows: int
    width: int
    dtypes: Sequence[torch.dtype]
    calls: Sequence[str]


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TWO, SINGLE = FLOATS[:2], FLOATS[:1]
ELEMENTWISE = ("interpolate", "perturb", "backward", "double")
MAIN = ("forward", *ELEMENTWISE)
OPTIONS = ("one input", "one-sided", "squared", "several tensors")
LONG = Case("long rows", 4, 65536, FLOATS, MAIN)

# One case for each way of dividing rows into programs (kernels/tiles.py), and for each specialisation by Triton.
CASES = (
    LONG,
    Case("many rows", 2049, 65536, TWO, ("forward", "double")),
    Case("short rows", 64, 784, TWO, MAIN),
    Case("many short rows", 16384, 784, SINGLE, ("forward", "double")),
    Case("short rows of 100", 64, 100, TWO, ("forward", "interpolate", "double")),
    Case("short rows of 1000", 64, 1000, (torch.bfloat16,), ("forward", "interpolate", "double")),
    Case("odd rows", 3, 9001, SINGLE, MAIN),
    Case("rows of one", 64, 1, SINGLE, ("forward", "interpolate", "double")),
    Case("one number", 1, 1, SINGLE, ("forward", "double")),
    Case("past 2^31 elements", 2, 2**31 + 4096, (torch.float16,), MAIN),
    Case("long rows", 4, 65536, SINGLE, OPTIONS),
)


def inspect(target: str, cases: Iterable[Case] = CASES) -> list[Inspection]:
    """Compile the kernels for a target, one of `PROCESSORS`, and read their machine code."""
    found: dict[int, tuple[Launch, str]] = {}
    processor = PROCESSORS[target].target
    with null_device(processor) as launches:
        for case in cases:
            for dtype in case.dtypes:
                for call in case.calls:
                    launches.clear()
                    _call(call, case.rows, case.width, dtype)
                    for launch in launches:  # two calls may need the same kernel
                        values = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in launch.values]
                        found.setdefault(id(launch.compiled), (launch._replace(values=tuple(values)), case.name))
    kernels = [launch.compiled for launch, _ in found.values()]
    nvidia = processor.backend == "cuda"
    codes: Iterable[_Nvidia | _Amd] = _nvidia_kernels(kernels, processor.arch) if nvidia else map(_Amd, kernels)
    return [_inspection(launch, case, target, code) for (launch, case), code in zip(found.values(), codes, strict=True)]


def _call(call: str, rows: int, width: int, dtype: torch.dtype) -> None:
    """The launchers, on memory that is neither read nor written."""
    x = torch.empty(rows, width, dtype=dtype)
    column = torch.empty(rows, 1, dtype=accumulation_type(dtype))
    if call == "interpolate":
        kernels.interpolate(x, x, column)
        kernels.interpolate_adjoint(x, column, True, True)
    elif call == "perturb":
        kernels.perturb(x, x, column)
    elif call == "one input":
        kernels.interpolate_adjoint(x, column, True, False)
        kernels.interpolate_adjoint(x, column, False, True)
    elif call == "one-sided":
        _penalty([x], one_sided=True, reduction="none")
    elif call == "squared":
        _penalty([x], squared=True)
    elif call == "several tensors":
        _penalty([x, x], grad_scale=torch.ones(()))
        _penalty([x, x.double()])
    else:
        _penalty([x], orders=(call,))


def _penalty(
    gradients: list[torch.Tensor], orders: Sequence[str] = ("forward", "backward", "double"), one_sided: bool = False,
    squared: bool = False, reduction: str = "mean", grad_scale: Any = None,
) -> None:  # fmt: skip
    form = arguments.penalty_form(len(gradients[0]), 1.0, one_sided, 1e-12, 1.0, reduction, False, squared=squared)
    if grad_scale is not None:
        form = arguments.gradient_scale(form, grad_scale, gradients)
    norms = torch.empty(form.rows, dtype=accumulation_type(*[g.dtype for g in gradients]))
    upstream = norms.new_empty(()) if form.reduce else norms
    if "forward" in orders:
        kernels.penalty_forward(gradients, form)
    if "backward" in orders:
        kernels.penalty_backward(gradients, norms, upstream, form)
    if "double" in orders:
        kernels.penalty_double_backward(gradients, norms, upstream, gradients, form, True)


def _inspection(launch: Launch, case: str, target: str, machine: "_Nvidia | _Amd") -> Inspection:
    processor, constants = PROCESSORS[target], launch.constexprs
    threads = launch.compiled.metadata.num_warps * processor.target.warp_size
    programs = machine.programs(processor, threads)
    arrival = next((at for at, i in enumerate(machine.code) if re.search("ATOM|_atomic_", i.text)), None)
    code = _up_to(arrival, machine.code)
    loops = [instruction for loop in _loops_over_tiles(code) for instruction in loop]
    counted = loops or code

    matrices = {name: t for name, t in launch.arguments.items() if isinstance(t, torch.Tensor) and t.ndim == 2}
    rows = {name: tensor for name, tensor in matrices.items() if name not in ("alpha", "column")}
    dtype = next(iter(rows.values())).dtype
    minimum = len(rows)
    if launch.name == "scale_rows_kernel" and constants["SQUARED"] and "cotangents" in rows:
        minimum -= 1  # w' = 0: the gradients are not needed
    reads, writes = _moved(launch.compiled.asm["ttir"], f"{constants['ROWS']}x{constants['COLS']}x")

    # Of a tile with fewer elements than threads, several threads process the same one.
    tile = max(constants["ROWS"] * constants["COLS"], threads)
    # The compiler may have unrolled the loop, whose body then loads several tiles.
    loaded = sum(i.load for i in loops) / 8 * threads
    tiles = max(1, int(loaded / (tile * max(1, reads) * dtype.itemsize)))
    return Inspection(
        kernel=launch.name.removesuffix("_kernel"),
        variant=", ".join([case, *_options(launch, dtype)]),
        dtype=str(dtype).removeprefix("torch."),
        target=target,
        registers=machine.registers,
        spilled_bytes=machine.spilled_bytes,
        shared_bytes=launch.compiled.metadata.shared,
        loads=dict(Counter(i.load for i in counted if i.load)),
        stores=dict(Counter(i.store for i in counted if i.store)),
        elements=tile * tiles / threads,
        instructions=len(counted),
        in_flight_bytes=machine.in_flight(code) // 8,
        programs=programs,
        occupancy=programs * threads / processor.threads,
        moved=reads + writes,
        minimum=minimum,
        arrival=machine.arrival(),
    )


def _options(launch: Launch, dtype: torch.dtype) -> Iterator[str]:
    given, constants = launch.arguments, launch.constexprs
    if launch.name == "interpolate_adjoint_kernel":
        yield " and ".join(name for name in ("real", "fake") if given[name + "_grad"] is not None)
    if given.get("cotangents") is not None:
        yield "second order"
    for name in ("carried", "kappa_at"):
        if given.get(name) is not None:
            yield name
    for name in ("ONE_SIDED", "SQUARED"):
        if constants.get(name):
            yield name.lower().replace("_", "-")
    if constants.get("LAST") is False:
        yield "first of several"
    elif constants.get("REDUCE") is False:
        yield "no mean"
    if "norms" in given and given["norms"].dtype != accumulation_type(dtype):
        yield "beside float64"


def _moved(ttir: str, tile: str) -> tuple[int, int]:
    """How often each element of a tile is read, and written, in Triton's IR, before the program arrives.

    In a loop over tiles its own loads count, not the load of the first tile before it.
    """
    passes: dict[int, Counter[str]] = {}  # by the number of loops around an access
    blocks: list[bool] = []  # the open ones, outermost first: whether it is a loop
    for line in ttir.partition("tt.atomic_rmw")[0].splitlines():
        text = re.sub(r" loc\(\S*\)$", "", line.strip())
        if text.startswith("}"):
            blocks.pop()
        access = re.search(rf"\btt\.(load|store) .*tensor<{tile}!tt\.ptr", text)
        if access:
            passes.setdefault(sum(blocks), Counter())[access[1]] += 1
        if text.endswith("{"):
            blocks.append("scf.for" in text or "scf.while" in text)
    innermost = passes[max(passes)]
    return innermost["load"], innermost["store"]


class _Instruction(NamedTuple):
    """load, store: bits of global memory. jump: the target, as an index into the code."""

    text: str
    load: int = 0
    store: int = 0
    jump: int | None = None
    waits: frozenset[int] = frozenset()  # NVIDIA: the barriers that it waits for, and the one that its result sets
    sets: int = -1


def _up_to(arrival: int | None, code: list[_Instruction]) -> list[_Instruction]:
    """The instructions that lead to the arrival, some of which may be placed behind it; without an arrival, all."""
    if arrival is None:
        return code
    leads = {arrival}
    known = 0
    while len(leads) > known:
        known = len(leads)
        for at in range(len(code) - 1, -1, -1):
            follows = [code[at].jump] if _JUMPS.match(code[at].text) else [code[at].jump, at + 1]
            if not leads.isdisjoint(follows):
                leads.add(at)
    kept = sorted(leads - {arrival})
    places = {at: place for place, at in enumerate(kept)}
    return [code[at]._replace(jump=places.get(code[at].jump)) for at in kept]  # type: ignore[arg-type]


# With any predicate: NVIDIA's are before the instruction, or before the address.
_JUMPS = re.compile(r"BRA (?:`\(|0x)|EXIT|RET|s_branch|s_endpgm|s_setpc")


def _loops_over_tiles(code: list[_Instruction]) -> list[list[_Instruction]]:
    """The innermost loops that load from global memory."""
    spans = [(i.jump, at + 1) for at, i in enumerate(code) if i.jump is not None and i.jump <= at]
    spans = [(begin, end) for begin, end in spans if any(i.load for i in code[begin:end])]
    return [
        code[begin:end]
        for begin, end in spans
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
    ]


def _nvidia_kernels(kernels: list[Any], arch: int) -> Iterator["_Nvidia"]:
    """Disassembled all at once: starting nvdisasm takes longer than compiling a kernel."""
    binaries = [_machine_code(kernel.asm["cubin"]) for kernel in kernels]
    flag = f"SM{arch}a" if arch >= 90 else f"SM{arch}"  # what Triton compiles for
    sass = _run(knobs.nvidia.nvdisasm.path, "--binary", flag, "-hex", data=b"".join(binaries))
    # /*0070*/  @P0 LDG.E.128 R8, desc[UR4][R2.64] ;  /* 0x... */, and in the next line the upper half of the encoding,
    # which has the barriers.
    pattern = r"/\*(\w{4,})\*/\s+([^;]*?)\s*;\s+/\* 0x\w+ \*/\s+/\* 0x(\w+) \*/"
    lines = iter(re.findall(pattern, sass))
    for kernel, binary in zip(kernels, binaries, strict=True):
        yield _Nvidia(kernel, list(islice(lines, len(binary) // 16)))


def _machine_code(cubin: bytes) -> bytes:
    """The executable section of the ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry, count = struct.unpack_from("<HH", cubin, 58)
    headers = (struct.unpack_from("<IIQQQQ", cubin, table + entry * index) for index in range(count))
    ((begin, size),) = [(begin, size) for _, _, flags, _, begin, size in headers if flags & 4]
    return cubin[begin : begin + size]


def _run(tool: str, *options: str, data: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


class _Nvidia:
    """A cubin, read by the tools in Triton's wheel."""

    def __init__(self, compiled: Any, lines: list[tuple[str, str, str]]) -> None:
        used = _run(knobs.nvidia.cuobjdump.path, "-res-usage", data=compiled.asm["cubin"])
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", used))
        self.registers, self.spilled_bytes = int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
        self.shared = compiled.metadata.shared
        self.ptx = compiled.asm["ptx"]
        self.code = [i for i in self._instructions(lines) if i.text != "NOP"]

    def _instructions(self, lines: list[tuple[str, str, str]]) -> Iterator[_Instruction]:
        kept = [int(address, 16) for address, text, _ in lines if text != "NOP"]
        index = {address: at for at, address in enumerate(kept)}
        for _, text, encoding in lines:
            control = int(encoding, 16) >> 41
            jump = re.search(r"\bBRA\b.* (?:`\()?(0x\w+)", text)
            access = re.search(r"\b(LDG|STG)(\.\S+)", text)
            suffix = re.search(r"\.(128|64|[US]16|[US]8)\b", access[2]) if access else None
            width = int(suffix[1].lstrip("US")) if suffix else 32
            moved = {{"LDG": "load", "STG": "store"}[access[1]]: width} if access else {}
            waits = frozenset(barrier for barrier in range(6) if control >> 11 >> barrier & 1)
            target = index.get(int(jump[1], 16)) if jump else None
            yield _Instruction(text, jump=target, waits=waits, sets=control >> 5 & 7, **moved)

    def in_flight(self, code: list[_Instruction]) -> int:
        waiting: Counter[int] = Counter()  # bits, by the barrier that their arrival sets
        most = 0
        for instruction in code:
            for barrier in instruction.waits:
                waiting[barrier] = 0
            waiting[instruction.sets] += instruction.load
            most = max(most, waiting.total())
        return most

    def programs(self, processor: Processor, threads: int) -> int:
        warps = REGISTERS // (-(-self.registers // 8) * 8 * 32) // 4 * 4
        reserved = 0 if processor.target.arch < 80 else 1024  # bytes of shared memory of each program, for the system
        fits = [processor.threads // threads, warps // (threads // 32), processor.programs]
        if self.shared:
            fits.append(processor.shared // (self.shared + reserved))
        return min(fits)

    def arrival(self) -> list[str]:
        found = re.findall(r"(?<![\w.])(?:ld\.global|st\.global|atom|bar\.sync|barrier|fence|membar)[\w.:]*", self.ptx)
        return _around_atomic(found, atomic=r"atom", store=r"st\.global", load=r"ld\.global")


_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(\w+)")
_AMD_WIDTHS = {"dwordx4": 128, "b128": 128, "dwordx3": 96, "b96": 96, "dwordx2": 64, "b64": 64, "dword": 32, "b32": 32}


class _Amd:
    """LLVM's assembly, whose metadata has the kernel's resources."""

    def __init__(self, compiled: Any) -> None:
        text = compiled.asm["amdgcn"]
        used = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.M)}
        self.registers = used["vgpr_count"] + used.get("agpr_count", 0)
        spilled = used["vgpr_spill_count"] + used["sgpr_spill_count"]
        self.spilled_bytes = used["private_segment_fixed_size"] + 4 * spilled
        self.wavefronts = int(re.search(r"; Occupancy: (\d+)", text)[1])  # type: ignore[index]
        self.old = "gfx9" in text.partition("\n")[0]
        self.code = list(self._instructions(text))

    def _instructions(self, text: str) -> Iterator[_Instruction]:
        body = re.search(r"^\w+_kernel:.*?^\.Lfunc_end0:", text, re.M | re.S)[0]  # type: ignore[index]
        lines = [line.partition(";")[0].strip() for line in body.splitlines()]
        lines = [line for line in lines if re.match(r"[sv]_|ds_|global_|buffer_|flat_|scratch_|\.LBB", line)]
        labels: dict[str, int] = {}
        texts: list[str] = []
        for line in lines:
            if line.startswith(".LBB"):
                labels[line.rstrip(":")] = len(texts)
            elif not line.startswith("s_nop"):
                texts.append(line)
        for line in texts:
            access = _AMD_ACCESS.match(line)
            moved: dict[str, int] = {access[1]: _AMD_WIDTHS.get(access[2], 16)} if access else {}
            jump = re.match(r"s_c?branch\w* (\S+)", line)
            yield _Instruction(line, jump=labels.get(jump[1]) if jump else None, **moved)  # type: ignore[arg-type]

    def in_flight(self, code: list[_Instruction]) -> int:
        waiting: list[int] = []  # bits, in the order of their arrival; before gfx10 stores are counted with loads
        most = 0
        for instruction in code:
            wait = re.search(r"vmcnt\((\d+)\)", instruction.text)
            if wait:
                waiting = waiting[len(waiting) - int(wait[1]) :] if int(wait[1]) else []
            if instruction.load or (instruction.store and self.old):
                waiting.append(instruction.load)
                most = max(most, sum(waiting))
        return most

    def programs(self, processor: Processor, threads: int) -> int:
        simds = 4 if processor.target.warp_size == 64 else 2
        return self.wavefronts * simds * processor.target.warp_size // threads

    def arrival(self) -> list[str]:
        pattern = re.compile(r"(?:global|buffer|flat)_\w+|s_barrier|s_waitcnt.*vmcnt\(0\)|s_waitcnt_vscnt")
        found = [match[0] for i in self.code if (match := pattern.match(i.text))]
        return _around_atomic(found, atomic=r".*_atomic_", store=r".*_store_", load=r".*_load_")


def _around_atomic(found: list[str], atomic: str, store: str, load: str) -> list[str]:
    """From the last store before the atomic to the first load after it, without repetitions."""
    at = next((at for at, text in enumerate(found) if re.match(atomic, text)), None)
    if at is None:
        return []
    begin = max((i for i in range(at) if re.match(store, found[i])), default=0)
    end = next((i for i in range(at, len(found)) if re.match(load, found[i])), len(found) - 1)
    return [text for text, _ in groupby(found[begin : end + 1])]


def table(inspections: Sequence[Inspection]) -> str:
    """Aligned text, one line for each inspection."""
    head = ("target", "kernel", "variant", "dtype", "regs", "spills", "shared", "loads", "stores", "loads/el",
            "stores/el", "instr/el", "in flight", "programs", "occupancy", "moved/min")  # fmt: skip
    lines = [head] + [
        (
            i.target, i.kernel, i.variant, i.dtype, str(i.registers), str(i.spilled_bytes), str(i.shared_bytes),
            _widths(i.loads), _widths(i.stores), f"{sum(i.loads.values()) / i.elements:.2f}",
            f"{sum(i.stores.values()) / i.elements:.2f}", f"{i.instructions / i.elements:.1f}",
            f"{i.in_flight_bytes} B", str(i.programs), f"{i.occupancy:.0%}", f"{i.moved}/{i.minimum}",
        )
        for i in inspections
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _widths(accesses: dict[int, int]) -> str:
    return " + ".join(f"{count} x {bits}" for bits, count in sorted(accesses.items(), reverse=True)) or "-"
