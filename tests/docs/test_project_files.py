"""CONTRIBUTING, CHANGELOG, CITATION.cff and the pre-commit hooks agree with the package and with one another."""

import argparse
import re
import tomllib
from datetime import date
from pathlib import Path

import pytest
import yaml

from hooked_mllm.cli.parser import parser
from hooked_mllm.version import __version__

ROOT = Path(__file__).parents[2]
SECTIONS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]  # of Keep a Changelog


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_citation_has_the_keys_of_its_schema_and_the_version():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}  # required by version 1.2.0
    assert citation["cff-version"] == "1.2.0" and citation["version"] == __version__
    assert citation["license"] == project()["license"]
    assert citation["authors"] == project()["authors"] == [{"name": "hooked_mllm contributors"}]
    (paper,) = citation["references"]
    assert paper.keys() >= {"type", "title", "authors", "year", "url"}
    assert paper["url"].rsplit("/", 1)[1] in text_of("hooked_mllm/metrics/retrieval_attention_mass.py")
    assert all(author.keys() == {"family-names", "given-names"} for author in paper["authors"])


def project():
    return tomllib.loads(text_of("pyproject.toml"))["project"]


def test_changelog_has_the_form_of_keep_a_changelog():
    releases = re.findall(r"^## (.+)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert releases[0] == "[Unreleased]"
    dates = []
    for release in releases[1:]:
        version, day = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", release).groups()
        dates.append((date.fromisoformat(day), version))
    assert dates == sorted(dates, reverse=True) and dates[0][1] == __version__
    sections = re.findall(r"^### (.+)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert sections and set(sections) <= {*SECTIONS}


def test_pre_commit_hooks_are_local_and_their_tools_are_installed_for_development():
    repositories = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    assert {repository["repo"] for repository in repositories} == {"local"}
    hooks = [hook for repository in repositories for hook in repository["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    extras = project()["optional-dependencies"]
    installed = " ".join(extras["dev"] + extras["test"])
    assert [tool for hook in hooks if (tool := hook["entry"].split()[0]) not in installed] == []
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "pyright"}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md", "docs/families.md", "docs/performance.md"])
def test_files_that_a_page_names_exist(page):
    names = re.findall(r"`((?:hooked_mllm|tests|docs|benchmarks|examples)/[\w./-]+)`", text_of(page))
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_modules_that_the_architecture_page_names_exist():
    modules = re.findall(r"`(\w+/\w+\.py)`", text_of("docs/architecture.md"))
    assert len(modules) > 10
    folders = (ROOT / "hooked_mllm", ROOT)
    assert [module for module in modules if not any((folder / module).exists() for folder in folders)] == []


def test_contributing_is_short_and_has_the_five_routes():
    guide = text_of("CONTRIBUTING.md")
    assert len(guide.splitlines()) <= 48
    routes = re.findall(r"^- \*\*An? (.+?)\*\*(.*?)(?=^- |^$)", guide, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in routes] == ["metric", "family", "hook point", "backend", "kernel"]
    for name, route in routes:
        before, _, shown = route.partition("Shown by")
        assert "hooked_mllm/" in before and "tests/" in shown, name
    for script in re.findall(r"python -m helpers\.(\w+)", guide):
        assert (ROOT / "tests" / "helpers" / f"{script}.py").exists()


def test_the_rooms_of_the_architecture_page_are_those_of_its_floors():
    page = text_of("docs/architecture.md")
    floors = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1]
    on_floors = set(re.findall(r"[a-z_]+", floors))
    table = page.split("## Rooms")[1].split("\n## ")[0]
    described = {
        room for line in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE) for room in re.findall(r"`(\w+)`", line)
    }
    assert described == on_floors - {"__init__", "__main__"}


def options(command):
    """Every option of a parser and of its commands."""
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from options(inner)
        else:
            yield from action.option_strings


def test_the_page_of_the_command_line_has_every_option():
    listed = set(re.findall(r"--[a-z][a-z-]*", text_of("docs/cli.md")))
    assert listed == set(options(parser())) - {"-h", "--help", "--version"}
