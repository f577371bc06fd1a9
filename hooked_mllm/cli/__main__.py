"""`python -m hooked_mllm.cli`."""

import sys

from hooked_mllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
