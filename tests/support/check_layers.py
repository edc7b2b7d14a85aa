"""Check that dependencies point one way (docs/internals.md, design §2), and that `unsafe` stays where it belongs.

rust:    py -> engine -> {sys, image};  launcher -> sys;  only py sees pyo3;  sys and image do not see each other
python:  cli -> everything else;  nothing imports cli
unsafe:  rust/sys, and in the launcher only in files that docs/safety.md names
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MAY_DEPEND_ON = {
    "torpor-sys": set(),
    "torpor-image": set(),
    "torpor-engine": {"torpor-sys", "torpor-image"},
    "torpor-launcher": {"torpor-sys"},
    "torpor-py": {"torpor-sys", "torpor-image", "torpor-engine"},
}
# Which modules of torpor.cli may be imported by what is not torpor.cli.
OUTSIDE_CLI_MAY_IMPORT = {"__main__.py": "torpor.cli"}


def rust_arrows() -> list[str]:
    """Ask cargo for the workspace's packages and their direct and indirect dependencies."""
    out = subprocess.run(
        ["cargo", "metadata", "--format-version=1", "--locked" if (ROOT / "Cargo.lock").exists() else "--quiet"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    meta = json.loads(out)
    names = {p["id"]: p["name"] for p in meta["packages"]}
    edges = {
        n["id"]: [d["pkg"] for d in n["deps"] if any(k["kind"] != "dev" for k in d["dep_kinds"])]
        for n in meta["resolve"]["nodes"]
    }
    problems = []
    for member in meta["workspace_members"]:
        name = names[member]
        if name not in MAY_DEPEND_ON:
            problems.append(f"{name} is a new crate: give it a line in {Path(__file__).name}")
            continue
        seen: set[str] = set()
        todo = list(edges[member])
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += edges[node]
        reached = {names[i] for i in seen}
        problems += [
            f"{name} depends on {other}" for other in sorted((reached & set(MAY_DEPEND_ON)) - MAY_DEPEND_ON[name])
        ]
        if name != "torpor-py" and "pyo3" in reached:
            problems.append(f"{name} sees pyo3")
    return problems


def python_arrows() -> list[str]:
    package = ROOT / "python" / "torpor"
    problems = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        if relative.parts[0] == "cli" or str(relative) in OUTSIDE_CLI_MAY_IMPORT:
            continue
        here = ["torpor", *relative.parts[:-1]]
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                targets = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = here[: len(here) - node.level + 1] if node.level else []
                module = ".".join([*base, node.module] if node.module else base)
                targets = [module, *(f"{module}.{a.name}" for a in node.names)]
            else:
                continue
            if any(t == "torpor.cli" or t.startswith("torpor.cli.") for t in targets):
                problems.append(f"{path.relative_to(ROOT)}:{node.lineno} imports torpor.cli")
    return problems


def code_only(source: str) -> str:
    """Blank out comments and string literals, keeping line numbers."""
    pattern = r'//[^\n]*|/\*.*?\*/|r#*".*?"#*|"(?:\\.|[^"\\])*"'
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group()), source, flags=re.DOTALL)


def unsafe_places() -> list[str]:
    safety = ROOT / "docs" / "safety.md"
    documented = safety.read_text() if safety.exists() else ""
    problems = []
    for path in sorted((ROOT / "rust").rglob("*.rs")):
        relative = path.relative_to(ROOT)
        crate = relative.parts[1]
        if crate == "sys" or not re.search(r"\bunsafe\b", code_only(path.read_text())):
            continue
        if crate == "launcher" and f"`{relative}`" in documented:
            continue
        problems.append(f"{relative} uses unsafe: move it to rust/sys")
    for crate in ("engine", "image"):
        lib = ROOT / "rust" / crate / "src" / "lib.rs"
        if "#![forbid(unsafe_code)]" not in lib.read_text():
            problems.append(f"{lib.relative_to(ROOT)} lacks #![forbid(unsafe_code)]")
    return problems


def main() -> int:
    problems = rust_arrows() + python_arrows() + unsafe_places()
    for problem in problems:
        print(f"layers: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
