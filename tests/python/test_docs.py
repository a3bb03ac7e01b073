"""The documentation is true: its Python runs, its links lead somewhere, its messages exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_script

TREE = Path(__file__).parents[2]
PAGES = [*sorted((TREE / "docs").glob("*.md")), TREE / "README.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_the_python_of_a_page_runs(page):
    pytest.importorskip("torch")
    # As a reader would, one block after the other.
    for rank, result in enumerate(run_script(3, "\n".join(blocks(page, "python")))):
        assert result.returncode == 0, f"{page.name}, rank {rank}: {result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = [
                re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings
            ]
            assert anchor in anchors, f"{page.name}: {target}"


def test_configuration_page_is_up_to_date():
    command = [sys.executable, TREE / "ci" / "make_config_page.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_messages_of_the_troubleshooting_page_exist():
    source = ""
    core, bindings = TREE / "bluefog_core", TREE / "bindings" / "python"
    for folder, suffix in ((core, "cc"), (core, "h"), (bindings, "cc"), (bindings, "py")):
        for file in sorted(folder.rglob(f"*.{suffix}")):
            if not file.name.endswith("_test.cc"):
                source += file.read_text()
    # Literals that stand one after the other are one text.
    source = re.sub(r'"\s*\+?\s*f?"', "", source)
    rows = re.findall(r"^\| (`.*?) \|", (TREE / "docs" / "troubleshooting.md").read_text(), re.M)
    assert len(rows) > 20
    for row in rows:
        for message in re.findall(r"`([^`]*)`", row):
            for part in message.split("…"):
                assert part.strip() in source, row
