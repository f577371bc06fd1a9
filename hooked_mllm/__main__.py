"""`python -m hooked_mllm`, the same as `hooked-mllm`."""

import sys

from hooked_mllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
