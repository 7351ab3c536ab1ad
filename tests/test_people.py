"""What people and services read of this repository fits what is in it.

None of the workflows can run here: what can be checked of them without GitHub is."""

import json
import re

import pytest
import sync
import yaml

from memtx_minimal import __version__

ROOT = sync.ROOT
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = [p for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config"]


def load(path):
    return yaml.safe_load(sync.read(path))


def project():
    return sync.tomllib.loads(sync.read(ROOT / "pyproject.toml"))["project"]


def test_citation_and_zenodo_say_the_same():
    citation, zenodo = load(ROOT / "CITATION.cff"), json.loads(sync.read(ROOT / ".zenodo.json"))
    assert citation["title"] == zenodo["title"]
    assert citation["authors"] == project()["authors"] == zenodo["creators"]
    assert zenodo["license"] in citation["license"]
    assert str(citation["version"]) == __version__
    assert "version" not in zenodo  # Zenodo takes the tag's
    assert zenodo["keywords"] == project()["keywords"]


def test_contributing_says_where_the_address_goes():
    text = sync.read(ROOT / "CONTRIBUTING.md")
    section = text.split("\n## The address\n")[1].split("\n## ")[0]
    assert sync.WHERE_IT_GOES == "CONTRIBUTING.md#the-address"
    (line,) = [line for line in section.splitlines() if "`[project.urls]`" in line]
    assert "`pyproject.toml`" in line and "`Repository`" in line
    assert project()["urls"]["Repository"]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md", "README.md"])
def test_links_lead_to_files(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", sync.read(ROOT / name))
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def commands():
    """Every `make NAME` of CONTRIBUTING and the workflows."""
    texts = [sync.read(p) for p in [ROOT / "CONTRIBUTING.md", *WORKFLOWS]]
    devcontainer = sync.read(ROOT / ".devcontainer/devcontainer.json")
    return set(re.findall(r"(?:`|run: |cpu )make ([\w./]+)", "\n".join([*texts, devcontainer])))


def test_commands_are_in_the_makefile():
    makefile = sync.read(ROOT / "Makefile").replace("$(READY)", ".venv/.stamp")
    targets = set(re.findall(r"(?m)^([\w./]+):", makefile))
    assert {"sync", "refresh", "record", "test", "site", ".venv/.stamp"} <= commands()
    assert commands() <= targets


def test_the_change_log_knows_this_version():
    assert f", {__version__} (" in sync.read(ROOT / "CHANGELOG.md")


def test_the_tests_run_on_every_system_and_python():
    matrix = load(ROOT / ".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["os"] == ["ubuntu-latest", "macos-latest", "windows-latest"]
    first = project()["requires-python"].removeprefix(">=")
    pins = sync.read(ROOT / "requirements.txt").splitlines()[0]
    last = re.search(r"Python 3\.10 to (3\.\d+)", pins)[1]
    assert matrix["python"] == [f"3.{n}" for n in range(10, int(last[2:]) + 1)]
    assert matrix["python"][0] == first


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow(path):
    """It asks for no rights that it does not need, ends by itself, and names versions."""
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job.get("timeout-minutes") or "permissions" in job
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.search(r"@v\d+$", step.get("uses", "@v1"))
            for file in re.findall(r"(?:book|tests)/\w+\.py|\.ci/\w+", step.get("run", "")):
                assert (ROOT / file).exists()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form(path):
    """GitHub shows no form that lacks one of these."""
    form = load(path)
    assert form["name"] and form["description"] and form["body"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["type"] in {"input", "textarea", "dropdown", "checkboxes"}
        assert field["attributes"]["label"]
        assert set(field) <= {"type", "id", "attributes", "validations"}


def test_the_form_that_the_errata_name():
    names = [load(path)["name"] for path in FORMS]
    for page in ("book/errata.md", "CONTRIBUTING.md"):
        text = " ".join(sync.read(ROOT / page).split())
        assert re.search(r"form[^*]*\*([^*]+)\*", text)[1] in names


def test_the_dev_container():
    json.loads(sync.read(ROOT / ".devcontainer/devcontainer.json"))
