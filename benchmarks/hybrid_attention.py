"""Hybrid attention against dense attention by cuDNN and FlashAttention-2, and FlexAttention of the same mask.

Run on a GPU:  python benchmarks/hybrid_attention.py --tokens 8k 128k

The same as `hooked-mllm bench kernel`, with the same options. Variants take turns. Before anything is timed, outputs
are compared with the definition in float64 at a short length, and with FlexAttention at the timed lengths.
"""

import sys

from hooked_mllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "kernel", *sys.argv[1:]]))
