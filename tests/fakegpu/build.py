"""build.py OUT_DIR: compile the fake libraries against the CUDA libraries of the torch that this Python has.

Each fake library gets what src/ holds for it, and for every other function that the real library exports a stub that
counts its call and returns 0, "success". torch itself is not imported.
"""

import concurrent.futures
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARIES = {  # source: real library, what its functions' names begin with
    "cudart": ("libcudart.so.13", "cuda|__cuda"),
    "cublas": ("libcublas.so.13", "cublas|xer|Xer"),
    "cublasLt": ("libcublasLt.so.13", "cublas"),
    "cudnn": ("libcudnn.so.9", "cudnn"),
    "nccl": ("libnccl.so.2", "nccl|pnccl"),
}


def main():
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    nvidia = torch.parent / "nvidia"
    headers = [nvidia / "cu13/include", nvidia / "cudnn/include", nvidia / "nccl/include"]
    if not (headers[0] / "driver_types.h").exists():
        sys.exit(
            f"{torch}: not a torch for CUDA 13 with its libraries from pip (no nvidia/cu13/include/driver_types.h)"
        )
    flags = ["-O1", "-fPIC", "-w", f"-I{HERE / 'src'}", *(f"-I{folder}" for folder in headers), *versions(headers)]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        objects = dict(
            zip(
                [*LIBRARIES, "cuda"],
                pool.map(
                    lambda name: compiled(HERE / f"src/{name}.cpp", out / f"{name}.o", "g++", "-std=c++17", *flags),
                    [*LIBRARIES, "cuda"],
                ),
            )
        )
        wanted = {name: exported(nvidia, *LIBRARIES[name]) for name in LIBRARIES}
        wanted["cuda"] = (dict.fromkeys(driver_functions(torch), ""), "libcuda.so.1")
        stubs = dict(zip(wanted, pool.map(lambda name: stub(name, out, objects[name], wanted[name][0]), wanted)))
    for name, (symbols, soname) in wanted.items():  # the fake libcudart first: the others link to it
        version = max(symbols.values())
        script = out / f"{name}.map"
        script.write_text(f"{version} {{ global: *; }};\n")
        run(
            "g++",
            "-shared",
            "-o",
            out / soname,
            objects[name],
            stubs[name],
            f"-Wl,-soname,{soname}",
            *([f"-Wl,--version-script={script}"] if version else []),
            *([] if name == "cudart" else [out / "libcudart.so.13"]),
        )
    for file in out.iterdir():
        if file.suffix in (".o", ".c", ".map"):
            file.unlink()


def versions(headers):
    """The version that each library reports, as -D flags, from the real headers."""

    def number(folder, file, *names):
        text = (folder / file).read_text(errors="replace") if (folder / file).exists() else ""
        return [int((re.search(rf"#define\s+{name}\s+\(?(\d+)", text) or [0, 0])[1]) for name in names]

    cuda = number(headers[0], "cuda.h", "CUDA_VERSION")[0] or 13000
    blas = number(headers[0], "cublas_api.h", "CUBLAS_VER_MAJOR", "CUBLAS_VER_MINOR", "CUBLAS_VER_PATCH")
    dnn = number(headers[1], "cudnn_version.h", "CUDNN_MAJOR", "CUDNN_MINOR", "CUDNN_PATCHLEVEL")
    if not any(dnn):
        dnn = number(headers[1], "cudnn_version_v9.h", "CUDNN_MAJOR", "CUDNN_MINOR", "CUDNN_PATCHLEVEL")
    nccl = number(headers[2], "nccl.h", "NCCL_MAJOR", "NCCL_MINOR", "NCCL_PATCH")
    return [
        f"-DCUDA_VERSION_HERE={cuda}",
        f"-DCUBLAS_VERSION_HERE={blas[0] * 10000 + blas[1] * 100 + blas[2]}",
        f"-DCUDNN_VERSION_HERE={dnn[0] * 10000 + dnn[1] * 100 + dnn[2]}",
        f"-DNCCL_VERSION_HERE={nccl[0] * 10000 + nccl[1] * 100 + nccl[2]}",
    ]


def exported(nvidia, library, prefixes):
    """({function: symbol version}, library) of a real library."""
    found = sorted(nvidia.glob(f"*/lib/{library}"))
    if not found:
        sys.exit(f"{nvidia}: no {library}; install torch from pip, with its nvidia-* packages")
    symbols = {}
    for line in run("nm", "-D", "--defined-only", found[0]).splitlines():
        kind, name = line.split()[-2:]
        name, _, version = name.partition("@")
        if kind in "TWtwi" and re.match(prefixes, name):
            symbols[name] = version.lstrip("@")
    return symbols, library


def driver_functions(torch):
    """The driver's functions that torch links to, and those that Triton's launcher looks up."""
    names = set()
    for library in (torch / "lib").glob("*.so"):
        names |= {line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines()}
    for source in (torch.parent / "triton/backends/nvidia").glob("*.c"):
        names |= set(re.findall(r"\bcu[A-Z]\w+\b", source.read_text(errors="replace")))
    return sorted(name for name in names if re.fullmatch(r"cu[A-Z]\w+(?<!_t)", name) and not name.startswith("cuFile"))


def stub(name, out, written, symbols):
    own = {line.split()[-1] for line in run("nm", "--defined-only", written).splitlines()}
    source = out / f"{name}_stub.c"
    source.write_text(
        "void fakegpu_stub(const char*, const char*);\n"
        + "".join(
            f'long {symbol}(void) {{ fakegpu_stub("{name}", "{symbol}"); return 0; }}\n'
            for symbol in sorted(symbols)
            if symbol not in own
        )
    )
    return compiled(source, out / f"{name}_stub.o", "gcc", "-O1", "-fPIC", "-w", "-fno-builtin")


def compiled(source, target, compiler, *flags):
    run(compiler, *flags, "-c", source, "-o", target)
    return target


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
