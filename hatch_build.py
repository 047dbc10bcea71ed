"""Compiles the CPU kernel with the compiler of `ziglang`, one library per instruction level."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

KERNELS = Path("htm_pytorch", "kernels")

# fmt: off
COMPILE = [
    "-c", "-O3", "-g0", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-sanitize=all",
    "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra", "-Werror",
]
# fmt: on
LINK = ["-shared", "-nostdlib++", "-O3", "-s"]

X86_64 = {
    "x86_64_v3": ["-mcpu=x86_64_v3"],
    "x86_64_v4": ["-mcpu=x86_64_v4", "-mprefer-vector-width=512"],
}
AARCH64 = {"aarch64": ["-mcpu=baseline"]}

# Tag of the wheel: the compiler's target, the libraries' ending, the levels. The versions are the
# oldest systems that the wheel runs on, whatever system builds it.
PLATFORMS = {
    "manylinux_2_17_x86_64": ("x86_64-linux-gnu.2.17", ".so", X86_64),
    "manylinux_2_17_aarch64": ("aarch64-linux-gnu.2.17", ".so", AARCH64),
    "musllinux_1_2_x86_64": ("x86_64-linux-musl", ".so", X86_64),
    "musllinux_1_2_aarch64": ("aarch64-linux-musl", ".so", AARCH64),
    "macosx_11_0_x86_64": ("x86_64-macos.11.0", ".dylib", X86_64),
    "macosx_11_0_arm64": ("aarch64-macos.11.0", ".dylib", AARCH64),
    "win_amd64": ("x86_64-windows-gnu", ".dll", X86_64),
}


class KernelBuildHook(BuildHookInterface[Any]):
    """Adds the kernel's libraries to a wheel; for an editable one they lie beside the source."""

    def dependencies(self) -> list[str]:
        """Name what pip fetches for the build: the compiler, if there is something to compile."""
        platform = self.platform()
        if platform is None or self.is_built(*PLATFORMS[platform][1:]):
            return []
        return ["ziglang==0.17.1"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it packs the wheel."""
        platform = self.platform()
        if platform is None:
            self.leave_out(version)
        else:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
            build_data["artifacts"] += self.compile(*PLATFORMS[platform])

    def platform(self) -> str | None:
        """Return the wheel's tag; None where the kernel is not wanted or not to be had."""
        if os.environ.get("HTM_PYTORCH_NO_KERNELS") == "1":
            return None
        return next((tag for tag in platform_tags() if tag in PLATFORMS), None)

    def leave_out(self, version: str) -> None:
        """Say that there is no kernel."""
        here = next(iter(platform_tags()))
        self.app.display_warning(f"no kernel for {here}: pure wheel, all runs in plain PyTorch")
        if version == "editable":  # which would still find those of an earlier build
            for library in Path(self.root, KERNELS).glob("recall-*"):
                library.unlink()

    def compile(self, target: str, ending: str, levels: dict[str, list[str]]) -> list[str]:
        """Compile the kernel for every level; return the libraries' paths in the project."""
        scratch = Path(self.root, "build")
        scratch.mkdir(exist_ok=True)
        # The compiler keeps the parts of its C library that it has built.
        os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(scratch / "zig"))
        source = Path(self.root, KERNELS, "recall.cpp")
        libraries = self.libraries(ending, levels)
        if self.is_built(ending, levels):
            return [f"/{library.as_posix()}" for library in libraries]
        with TemporaryDirectory(dir=scratch) as folder:
            for library, flags in zip(libraries, levels.values(), strict=True):
                compiler = [sys.executable, "-m", "ziglang", "c++", "-target", target]
                self.run([*compiler, *COMPILE, *flags, str(source), "-o", "recall.o"], folder)
                # No flags of the level here, so that one build of the C library serves all.
                self.run([*compiler, *LINK, "recall.o", "-o", library.name], folder)
            for library in libraries:
                os.replace(Path(folder, library.name), Path(self.root, library))
        return [f"/{library.as_posix()}" for library in libraries]

    def libraries(self, ending: str, levels: dict[str, list[str]]) -> list[Path]:
        """Return the paths of the libraries in the project, one for each level."""
        return [KERNELS / f"recall-{level}{ending}" for level in levels]

    def is_built(self, ending: str, levels: dict[str, list[str]]) -> bool:
        """Whether the libraries are there and younger than all that they are made from."""
        made = [Path(self.root, library) for library in self.libraries(ending, levels)]
        folder = Path(self.root, KERNELS)
        sources = [Path(__file__), *folder.glob("*.cpp"), *folder.glob("*.h")]
        if not all(library.exists() for library in made):
            return False
        oldest = min(library.stat().st_mtime for library in made)
        return oldest > max(source.stat().st_mtime for source in sources)

    def run(self, command: list[str], folder: str) -> None:
        """Run a command that reports its errors itself; if it fails, so does the build."""
        if code := subprocess.run(command, cwd=folder).returncode:
            self.app.abort(f"exit status {code}: {' '.join(command)}")
