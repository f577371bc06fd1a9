"""The command line: `hooked-mllm score` measures every head, `hooked-mllm bench` times attention and prefill."""

import sys
from collections.abc import Sequence

from hooked_mllm.cli.parser import parser
from hooked_mllm.errors import HookedMLLMError

_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for a mistake of the caller's."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (HookedMLLMError, OSError) as error:
        print(f"{arguments.prog}: error: {error}", file=sys.stderr)
        return _USER_ERROR
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0
