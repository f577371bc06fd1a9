"""The command line: `hooked-mllm score` measures every head, `hooked-mllm bench` times attention and prefill."""

import argparse
import sys
from collections.abc import Sequence

from hooked_mllm.cli import bench, score
from hooked_mllm.errors import HookedMLLMError
from hooked_mllm.version import __version__

_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for a mistake of the caller's."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (HookedMLLMError, OSError) as error:
        print(f"{arguments.prog}: error: {error}", file=sys.stderr)
        return _USER_ERROR
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hooked-mllm", description="Look inside multimodal language models.")
    parser.add_argument("--version", action="version", version=f"hooked-mllm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    score.add_to(commands)
    bench.add_to(commands)
    return parser
