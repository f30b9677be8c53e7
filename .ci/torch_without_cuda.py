"""Lets PyPI's torch for Linux load where CUDA's libraries are not installed.

Usage: torch_without_cuda.py SITE_PACKAGES

That wheel is linked to CUDA (3 GB of other wheels), which nothing calls on a machine without a GPU, but the loader asks for. Installed with
`pip install --no-deps torch`, it gets a stand-in here for each library that is missing: the symbols that torch wants of it, each a function
that returns 0.
"""

import pathlib
import re
import subprocess
import sys
from collections import defaultdict

SYSTEM = re.compile(r"(lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)|ld-linux-x86-64)\.so")


def output(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def build(library, versions):
    """`versions`: symbols by the name of their version."""
    names = [name for name in versions if name]
    script = library.with_suffix(".map")
    script.write_text("".join(f"{name} {{ global: {'; '.join([*versions[name], ''])} }};\n" for name in names))
    source = "".join(f"long {symbol}(void) {{ return 0; }}\n" for symbols in versions.values() for symbol in sorted(symbols))
    options = f"-Wl,-soname,{library.name}" + (f",--version-script,{script}" if names else "")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", library, options], input=source, check=True, text=True)
    script.unlink()


def main(site_packages):
    folder = pathlib.Path(site_packages) / "torch/lib"
    needed, undefined, defined, file_of = set(), set(), set(), {}
    for library in folder.glob("*.so*"):
        needed.update(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "--dynamic", "--wide", library)))
        for file, names in re.findall(r"File: (\S+)(.*?)(?=File: |$)", output("readelf", "--version-info", "--wide", library), re.DOTALL):
            file_of.update((name, file) for name in re.findall(r"Name: (\S+)  Flags", names))
        for line in output("nm", "--dynamic", library).splitlines():
            kind, name = line[17:].split(" ", 1)
            (undefined if kind == "U" else defined).add(name)
    missing = {name for name in needed if not SYSTEM.match(name) and not (folder / name).exists()}
    wanted = {name: defaultdict(set) for name in missing}
    for symbol in undefined - defined:
        name, _, version = symbol.partition("@")
        if file_of.get(version) in missing:
            wanted[file_of[version]][version].add(name)
        elif not version and re.match(r"cu|nv|nccl", name):  # of any library without versions
            for library in missing.difference(file_of.values()):
                wanted[library][""].add(name)
    for name in missing:
        build(folder / name, wanted[name])
    print(f"{len(missing)} stand-ins")


if __name__ == "__main__":
    main(sys.argv[1])
