"""Compiles the operators, `eva_attn/_C.*.so`, against the torch found here; pyproject.toml has the rest.

Environment variables:
    CUDA_HOME             CUDA toolkit (default: that of the nvcc on PATH, then /usr/local/cuda)
    TORCH_CUDA_ARCH_LIST  GPU architectures, as torch reads it (default: DEFAULT_ARCHES below, as far as nvcc
                          knows them)
    EVA_ATTN_CUDA=0       build for the CPU only, even where nvcc is found
    FORCE_CUDA=1          fail, rather than build for the CPU only, where CUDA kernels cannot be compiled
    EVA_ATTN_SANITIZE=1   AddressSanitizer and UndefinedBehaviorSanitizer
    MAX_JOBS              compiler processes at once (default: the number of cores)
"""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # not needed to compile
try:
    import torch
except ModuleNotFoundError:  # a source distribution is made without it
    torch = None

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)
DEFAULT_ARCHES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"


class TorchMissing(build_ext):
    def run(self):
        raise SystemExit(
            f"eva_attn compiles against torch, and {sys.executable} finds none: "
            "install torch >= 2.11, then `pip install --no-build-isolation .`"
        )


def toolkit_of(nvcc):
    """The toolkit that an nvcc on PATH belongs to; nvcc is asked, as it can be a wrapper or a link."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parents[1]


def find_cuda():
    """(toolkit, nvcc's version, None), or (None, None, the reason for building for the CPU only)."""
    if os.environ.get("EVA_ATTN_CUDA") == "0":
        return None, None, "EVA_ATTN_CUDA=0 was set"
    if torch.version.cuda is None:
        return None, None, f"torch {torch.__version__} was built without CUDA"
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        home = Path(named)
    elif nvcc := shutil.which("nvcc"):
        home = toolkit_of(nvcc)
    else:
        home = Path("/usr/local/cuda")
    if not (home / "bin/nvcc").exists():
        return None, None, f"no nvcc in {home}/bin (CUDA_HOME names the toolkit)"
    said = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", said)
    if version[1] != torch.version.cuda.split(".")[0]:
        return None, None, f"nvcc is of CUDA {version[1]}.{version[2]}, torch of {torch.version.cuda}"
    return home, f"{version[1]}.{version[2]}", None


def arches_known_to(nvcc):
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = listed.stdout.split()
    return ";".join(
        arch
        for arch in DEFAULT_ARCHES.split(";")
        if "compute_" + arch.removesuffix("+PTX").removesuffix("a").replace(".", "") in known
    )


def default_gencode(arches):
    """nvcc's flags for `arches`, those for one GPU alone ("9.0a") apart.

    The kernels ask for no feature beyond the first of the others, so that all those share one pass of the
    compiler proper, which takes longer than the assembler.
    """
    numbers = [arch.removesuffix("+PTX").replace(".", "") for arch in arches.split(";")]
    shared = next(number for number in numbers if number.isdigit())
    flags = [
        f"-gencode=arch=compute_{shared if number.isdigit() else number},code=sm_{number}"
        for number in numbers
    ]
    return [*flags, *([f"-gencode=arch=compute_{shared},code=compute_{shared}"] if "+PTX" in arches else [])]


def c_string(text):
    return "nullptr" if text is None else json.dumps(text)


if torch is None:
    extensions, command, requirement = [Extension("eva_attn._C", [])], TorchMissing, "torch>=2.11"
else:
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < MINIMUM_TORCH:
        raise SystemExit(f"eva_attn needs torch >= 2.11, and this is torch {torch.__version__}: upgrade it")
    # Symbols and layouts hold within a minor release of torch, not across.
    requirement = "torch=={}.{}.*".format(*release)

    cuda_home, cuda_version, cpu_only_reason = find_cuda()
    arches, gencode = None, []
    if cuda_home:
        os.environ["CUDA_HOME"] = str(cuda_home)
        arches = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if not arches:
            arches = arches_known_to(cuda_home / "bin/nvcc")
            gencode = default_gencode(arches)  # with which torch adds none of its own
    elif os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(f"eva_attn: FORCE_CUDA=1 was set, but {cpu_only_reason}")
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))

    # Imported here, as it reads CUDA_HOME at once.
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    sanitize = os.environ.get("EVA_ATTN_SANITIZE") == "1"
    facts = {
        "torch": torch.__version__,
        "cuda_version": cuda_version,
        "cuda_arches": arches,
        "cpu_only_reason": cpu_only_reason,
    }

    class BuildKernels(BuildExtension):
        objects = None  # by source, of both extensions

        def finalize_options(self):
            if self.build_temp is None:
                # Kept for the next build: editable installs would start from nothing.
                variant = f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
                self.build_temp = str(ROOT / "build" / (variant + "-sanitize" * sanitize))
            super().finalize_options()

        def run(self):
            header = Path(self.build_temp, "generated/build_facts.h")
            lines = [f"#define EVA_ATTN_{name.upper()} {c_string(value)}\n" for name, value in facts.items()]
            text = "#pragma once\n" + "".join(lines)
            if not header.exists() or header.read_text() != text:
                header.parent.mkdir(parents=True, exist_ok=True)
                header.write_text(text)
            self.extensions[0].include_dirs.append(str(header.parent))

            against = f"eva_attn is built against torch {torch.__version__}"
            if cuda_home:
                print(f"{against} for the CPU and CUDA {cuda_version}, {arches}", file=sys.stderr, flush=True)
            else:  # pip passes warnings on
                warnings.warn(f"{against} for the CPU only: {cpu_only_reason}", stacklevel=1)
            super().run()
            # Read by eva_attn before it loads the library.
            beside_library = Path(self.get_ext_fullpath("eva_attn._C")).with_suffix(".json")
            beside_library.write_text(json.dumps(facts) + "\n")

        def build_extension(self, extension):
            if self.objects is None:  # by now the compiler is torch's
                compile_sources, self.objects = self.compiler.compile, {}

                # Both extensions' at once, and in this order: distutils sorts each one's.
                def compile_all(sources, **options):
                    if not self.objects:
                        self.objects.update(
                            zip(all_sources, compile_sources(all_sources, **options), strict=True)
                        )
                    return [self.objects[source] for source in sources]

                self.compiler.compile = compile_all
            super().build_extension(extension)

    device = "cuda" if cuda_home else "cpu"
    sources = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.c*"))
    sources = [path for path in sources if path.suffix in (".cpp", ".cu")]
    if not cuda_home:
        sources = [path for path in sources if "cuda" not in path.parts]
    # What takes longest to compile comes first, so that no core is idle at the end.
    sources.sort(key=lambda path: (path.suffix != ".cu", "kernels" not in path.parts))
    all_sources = [str(path) for path in sources]
    module = "csrc/module.cpp"
    sources = [source for source in all_sources if source != module]
    system_includes = [flag for path in include_paths(device) for flag in ("-isystem", path)]

    libraries = ["c10", "torch", "torch_cpu"]
    if cuda_home:
        libraries += ["c10_cuda", "torch_cuda", "cudart"]

    cxx = ["-O3", "-g0", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
    cxx += ["-Wall", "-Wextra", *system_includes]
    # Without it at::parallel_for is compiled to run on one thread, and says nothing.
    link = ["-fopenmp"] if sys.platform == "linux" else []
    cxx += link
    if sanitize:
        # vptr checks need the type info of classes that torch keeps hidden.
        link += ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        # Python's own flags can hold -fwrapv, and signed overflow is then not undefined.
        cxx += [*link, "-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv"]

    # torch's own flags take half and bfloat16 conversions and operators away.
    taken = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
    nvcc = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", *gencode]
    nvcc += [f"-U__CUDA_NO_{name}__" for name in taken]
    nvcc += ["-Xfatbin", "-compress-all"]  # a quarter of the size
    nvcc += ["-Xcompiler", "-g0,-fvisibility=hidden,-Wall,-Wextra", *system_includes]

    common = {
        "include_dirs": [str(ROOT / "csrc")],
        "define_macros": [("EVA_ATTN_WITH_CUDA", "1" if cuda_home else "0")],
        "library_dirs": library_paths(device),
        "extra_compile_args": {"cxx": cxx, "nvcc": nvcc},
        "extra_link_args": link,
        "language": "c++",
    }
    extensions = [
        Extension("eva_attn._C", sources=sources, libraries=libraries, **common),
        # Apart, as it needs Python, which the operators do not.
        Extension(
            "eva_attn._direct",
            sources=[module],
            libraries=["c10", "torch_cpu", "torch_python"],
            **common,
        ),
    ]
    command = BuildKernels

setup(ext_modules=extensions, cmdclass={"build_ext": command}, install_requires=[requirement])
