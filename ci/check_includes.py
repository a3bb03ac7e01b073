#!/usr/bin/env python3
"""Computes the include graph of the C++ sources and fails on what the architecture forbids.

Layers, lower first; a file includes its own layer and lower ones, never a sibling or a higher one:

    include < base < topology, kernels, transport, collective, control, plugin < engine
    < tools, bindings

Further: no cycle of headers; a transport never sees another; plugins include <bluefog/...> and the
standard library only, public headers those and absl's status; optional libraries stay in place.

Usage: check_includes.py [ROOT]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LEVELS = [
    {"include"},
    {"base"},
    {"topology", "kernels", "transport", "collective", "control", "plugin"},
    {"engine"},
    {"tools", "bindings"},
]
LEVEL = {layer: level for level, layers in enumerate(LEVELS) for layer in layers}
MAX_PUBLIC_HEADERS = 14
SUFFIXES = {".h", ".hpp", ".cc", ".cpp", ".cu", ".cuh"}
INCLUDE = re.compile(r'^\s*#\s*include\s*(<[^>]+>|"[^"]+")')

# Library, its headers, and the only places (path prefixes) where they may be included.
PLACES = [
    ("gRPC or protobuf", r"(grpc|grpcpp|google/protobuf)/|.*\.pb\.h$", ("bluefog_core/control/",)),
    ("UCX", r"(ucp|uct|ucs|ucm)/", ("bluefog_core/transport/ucx/",)),
    ("NCCL", r"nccl\.h$", ("bluefog_core/collective/",)),
    (
        "CUDA",
        r"(cuda|cuda_runtime|cuda_runtime_api|cuda_bf16|cuda_fp16)\.h$|cub/|nvtx3/",
        ("bluefog_core/kernels/", "bluefog_core/transport/cuda_ipc/", "bluefog_core/base/cuda"),
    ),
    ("Python", r"(Python\.h$|pybind11/)", ("bindings/",)),
]


def layer_of(path: str) -> str:
    """The layer of a path relative to the root, or "" outside the layers."""
    parts = path.split("/")
    if parts[0] == "bluefog_core":
        return parts[1] if len(parts) > 2 else "core"
    return parts[0] if parts[0] in ("tools", "bindings", "plugins") else ""


def includes_of(file: Path) -> list[tuple[int, str, bool]]:
    """(line, name, in angle brackets) of every #include."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if match := INCLUDE.match(line):
            found.append((number, match[1][1:-1], match[1][0] == "<"))
    return found


def is_standard(name: str) -> bool:
    return re.fullmatch(r"[a-z_0-9]+|(stddef|stdint)\.h", name) is not None


class Checker:
    def __init__(self, root: Path):
        self.root = root
        self.problems: list[str] = []
        self.graph: dict[str, list[tuple[int, str]]] = {}

    def run(self) -> list[str]:
        for folder in ("bluefog_core", "plugins", "tools", "bindings"):
            for file in sorted((self.root / folder).rglob("*")):
                if file.suffix in SUFFIXES:
                    self.check_file(file.relative_to(self.root).as_posix())
        self.check_cycles()
        public = [p for p in self.graph if layer_of(p) == "include"]
        if len(public) > MAX_PUBLIC_HEADERS:
            self.problems.append(
                f"bluefog_core/include: {len(public)} public headers, at most {MAX_PUBLIC_HEADERS}"
            )
        return self.problems

    def resolve(self, source: str, name: str) -> str | None:
        """The path of an included file of this tree, relative to the root."""
        for folder in (Path(source).parent, "bluefog_core", "bluefog_core/include", "."):
            if (self.root / folder / name).is_file():
                return (self.root / folder / name).resolve().relative_to(self.root).as_posix()
        return None

    def check_file(self, path: str) -> None:
        layer = layer_of(path)
        edges = self.graph.setdefault(path, [])
        for line, name, angle in includes_of(self.root / path):
            target = self.resolve(path, name)
            if target is not None:
                edges.append((line, target))
            if problem := self.problem_with(path, layer, name, angle, target):
                self.problems.append(f"{path}:{line}: {problem}")

    def problem_with(
        self, path: str, layer: str, name: str, angle: bool, target: str | None
    ) -> str | None:
        for library, pattern, places in PLACES:
            if re.match(pattern, name) and not path.startswith(places):
                return f"{library} header {name} outside {', '.join(places)}"
        own = angle and name.startswith("bluefog/")
        if layer == "plugins":
            if not (own or (angle and is_standard(name)) or path.endswith("_test.cc")):
                return f"a plugin includes <bluefog/...> and the standard library only, not {name}"
            return None
        if layer == "include":
            if not (own or (angle and (is_standard(name) or name.startswith("absl/status/")))):
                return (
                    "a public header includes <bluefog/...>, the standard library and absl's "
                    f"status only, not {name}"
                )
            return None
        if target is None or layer not in LEVEL:
            return None
        other = layer_of(target)
        if other == "plugins":
            return f"plugins are found by name, never included: {name}"
        if layer != other and LEVEL.get(other, len(LEVELS)) >= LEVEL[layer]:
            return f"{layer} includes {name} of {other}, which is not below it"
        if layer == other == "transport":
            return self.between_transports(path, target)
        return None

    @staticmethod
    def between_transports(path: str, target: str) -> str | None:
        folders = [p.split("/")[2] if p.count("/") > 2 else "" for p in (path, target)]
        if folders[0] != folders[1] and all(folders):
            return f"transport {folders[0]} includes {target}: a transport never sees another"
        return None

    def check_cycles(self) -> None:
        """Depth-first; a file met again while it is still open closes a cycle."""
        state: dict[str, bool] = {}  # True: open, False: done.

        def visit(path: str, trail: list[str]) -> None:
            state[path] = True
            for _, target in self.graph.get(path, []):
                if state.get(target):
                    cycle = [*trail[trail.index(target) :], target]
                    self.problems.append(f"{path}: cycle of includes: {' -> '.join(cycle)}")
                elif target not in state:
                    visit(target, [*trail, target])
            state[path] = False

        for path in self.graph:
            if path not in state:
                visit(path, [path])


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    checker = Checker(root)
    problems = checker.run()
    for problem in problems:
        print(problem, file=sys.stderr)
    edges = sum(len(e) for e in checker.graph.values())
    print(f"includes: {len(checker.graph)} files, {edges} edges, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
