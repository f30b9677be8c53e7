#!/usr/bin/env python3
"""Compiles kernels/*.cu for every architecture that a build holds, prints a table (kernel, arch, registers, shared memory, spills) and
fails where a kernel spills, takes more registers than its file's `// Checked:` line says, or lacks an instruction that line names.

Needs nvcc and cuobjdump in CUDA_HOME/bin; .ci/run installs them. No GPU."""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys

ARCHS = ["80", "90a", "100"]
KERNELS = pathlib.Path(__file__).resolve().parent.parent / "kernels"
OUT = KERNELS.parent / "target" / "kernels"
HOME = pathlib.Path(os.environ["CUDA_HOME"])


def checked(source):
    """(bound of registers, instructions) of `// Checked: 64 registers; HMMA LDSM` in a kernel's file."""
    line = re.search(r"^// Checked: (\d+) registers(?:; (.*))?$", source.read_text(), re.MULTILINE)
    if not line:
        sys.exit(f"{source.name}: no line `// Checked: N registers; INSTRUCTION ...`")
    return int(line[1]), (line[2] or "").split()


def compiled(job):
    source, arch = job
    image = OUT / f"{source.stem}.sm_{arch}.cubin"
    command = [HOME / "bin/nvcc", "-O3", "-std=c++17", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", "-o", image, source]
    built = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": f"{HOME}/bin:{os.environ['PATH']}"})
    if built.returncode:
        sys.exit(f"{source.name} for sm_{arch}:\n{built.stdout}{built.stderr}")
    sass = subprocess.run([HOME / "bin/cuobjdump", "-sass", image], capture_output=True, text=True, check=True)
    return source, arch, built.stdout + built.stderr, sass.stdout


def entries(report):
    """(kernel, registers, static shared memory, bytes of stack and spills) of ptxas' report."""
    for part in report.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        yield part.split("'")[0], int(re.search(r"Used (\d+) registers", part)[1]), int(shared[1]) if shared else 0, int(stack) + int(stores) + int(loads)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    jobs = [(source, arch) for source in sorted(KERNELS.glob("*.cu")) for arch in ARCHS]
    problems = []
    print(f"{'kernel':34} {'arch':7} {'registers':>9} {'bound':>5} {'shared':>7} {'spills':>6}")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, arch, report, sass in pool.map(compiled, jobs):
            bound, instructions = checked(source)
            for kernel, registers, shared, spills in entries(report):
                print(f"{kernel:34} sm_{arch:4} {registers:9} {bound:5} {shared:7} {spills:6}")
                if spills or registers > bound:
                    problems.append(f"{kernel} on sm_{arch}: {registers} registers of {bound}, {spills} bytes of stack and spills")
            lacking = [instruction for instruction in instructions if instruction not in sass]
            problems += [f"{source.name} on sm_{arch}: no {instruction} in its code" for instruction in lacking]
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
