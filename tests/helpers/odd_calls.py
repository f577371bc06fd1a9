"""Odd calls over the public API, as a user makes them: `python -m helpers.odd_calls` prints those that fail, as JSON.

With names of doors only these, with `--every` all odd values for each argument.

Each door is called with right arguments, then with one of them replaced by an odd value. The outcome must be a value,
one of the package's errors, or Python's own `TypeError` for a wrong number or an unknown name of arguments.
"""

import json
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hooked_mllm as hm
from helpers.odd_doors import doors

#: seconds after which a call counts as one that does not end
SECONDS = 20
SIGNATURE = re.compile(r"(unexpected keyword|missing \d+ required|positional arguments? but|multiple values for)")


def outcome(call: Callable[..., Any], arguments: dict[str, Any], *, right: bool = False) -> str | None:
    """None for a value or, unless the arguments are right, an error of ours; else what was raised and where."""
    try:
        signal.alarm(SECONDS)
        value = call(**arguments)
        if hasattr(value, "__enter__"):
            with value:
                pass
        elif hasattr(value, "savefig"):
            value.canvas.draw()  # a text is only read when it is drawn
    except hm.HookedMLLMError as error:
        return f"{type(error).__name__}: {error}" if right else None
    except Exception as error:
        if type(error) is TypeError and SIGNATURE.search(str(error)):
            return None
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "hooked_mllm/" in f.filename]
        at = f"{ours[-1].filename.split('hooked_mllm/')[-1]}:{ours[-1].lineno}" if ours else frame.filename
        return f"{type(error).__name__}: {str(error)[:160]} ({at})"
    finally:
        signal.alarm(0)
    return None


def main() -> None:
    signal.signal(signal.SIGALRM, _too_long)
    warnings.simplefilter("ignore")
    every, only = "--every" in sys.argv, [name for name in sys.argv[1:] if name != "--every"]
    counts: dict[str, int] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for door in doors(Path(folder)):
            if only and door.name not in only:
                continue
            for text, arguments in door.calls(every):
                counts[door.name] = counts.get(door.name, 0) + 1
                failed = outcome(door.call, arguments, right="right arguments" in text)
                if failed is not None:
                    failures[text] = failed
    print(json.dumps({"calls": counts, "failures": failures}, indent=1))


def _too_long(signum: int, frame: Any) -> None:
    raise TimeoutError(f"the call takes more than {SECONDS} s")


if __name__ == "__main__":
    main()
