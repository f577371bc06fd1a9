"""Help and version of every command, and what they must not import."""

import pytest

from helpers.fresh import modules_after
from hooked_mllm import cli
from hooked_mllm.version import __version__

COMMANDS = (["score"], ["bench"], ["bench", "prefill"], ["bench", "kernel"])


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(capsys, command):
    assert printed(capsys, *command, "--help").startswith(f"usage: hooked-mllm {' '.join(command)} ")


def test_help_lists_the_commands(capsys):
    out = printed(capsys, "--help")
    assert "score every attention head" in out and "time attention and prefill" in out


def test_version(capsys):
    assert printed(capsys, "--version") == f"hooked-mllm {__version__}\n"


@pytest.mark.parametrize("module", [None, "hooked_mllm", "hooked_mllm.cli"])
def test_help_and_version_import_neither_torch_nor_transformers(module):
    """As the console script and `python -m` start it."""
    call = "from hooked_mllm.cli import main\nmain(arguments)"
    if module is not None:
        call = f"sys.argv[1:] = arguments\nrunpy.run_module({module!r}, run_name='__main__')"
    lists = [["--version"], ["--help"], *([*command, "--help"] for command in COMMANDS)]
    code = "import runpy, sys\n" + "".join(
        f"arguments = {arguments!r}\ntry:\n    "
        + call.replace("\n", "\n    ")
        + "\nexcept SystemExit as stopped:\n    assert stopped.code == 0\nelse:\n    assert False\n"
        for arguments in lists
    )
    imported = modules_after(code)
    assert "hooked_mllm.cli.parser" in imported
    assert not imported & {"torch", "transformers", "numpy", "hooked_mllm.model", "hooked_mllm.cli.score"}


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2 and "command" in capsys.readouterr().err
