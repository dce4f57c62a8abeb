"""What a host of the repository reads: workflow, forms, the container that opens the dashboard."""

import json
import re

from documents import broken
from places import ROOT

TORCH = r"torch==[0-9.]+"


def test_the_workflow_runs_all_that_ci_runs():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "- run: .ci/run" in text
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_links_of_the_guide_lead_somewhere():
    assert broken(ROOT / ".github" / "CONTRIBUTING.md") == []


def test_the_container_opens_the_dashboard_on_the_port_that_it_forwards():
    settings = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    (port,) = settings["forwardPorts"]
    script = (ROOT / settings["postAttachCommand"].removeprefix("bash ")).read_text()
    assert f"streamlit run app.py --server.port {port} " in script
    assert f"-{port}." in script


def test_torch_is_of_the_version_that_is_required():
    required = set(re.findall(TORCH, (ROOT / "requirements.txt").read_text()))
    assert len(required) == 1
    assert set(re.findall(TORCH, (ROOT / "README.md").read_text())) == required
    assert set(re.findall(TORCH, (ROOT / ".devcontainer" / "devcontainer.json").read_text())) == required


def test_every_variable_that_is_read_is_documented():
    code = [*(ROOT / "intrafusion").rglob("*.py"), *(ROOT / "pages").rglob("*.py")]
    read = {name for file in code for name in re.findall(r'"(INTRAFUSION_[A-Z_]+)"', file.read_text())}
    told = "".join(file.read_text() for file in (ROOT / "assets" / "docs").glob("*.md"))
    assert len(read) >= 8
    assert {name for name in read if f"`{name}" not in told and f"${name}" not in told} == set()
