"""CPU time of imports and of the command line, each in fresh processes: `python benchmarks/import_time.py`."""

import argparse
import os
import resource
import statistics
import subprocess
import sys

CLASSES = "Qwen3VLForConditionalGeneration, LlavaOnevisionForConditionalGeneration, InternVLForConditionalGeneration"
PLAIN = f"import torch\nfrom transformers import {CLASSES}"
MODEL = "from hooked_mllm import HookedMLLM"
COMMANDS = [["--version"], ["--help"], ["score", "--help"], ["bench", "prefill", "--help"]]


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a process on one thread."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind, in turns")
    rounds = parser.parse_args().rounds
    code = {"torch and transformers' classes": PLAIN, "HookedMLLM": MODEL, "hooked_mllm": "import hooked_mllm"}
    commands = {name: [sys.executable, "-c", text] for name, text in code.items()}
    commands |= {" ".join(c): [sys.executable, "-m", "hooked_mllm", *c] for c in COMMANDS}
    for command in commands.values():  # files are read from disk, and compiled, once
        cpu_seconds(command)
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            times[name].append(cpu_seconds(command))
    plain = statistics.median(times["torch and transformers' classes"])
    print(f"{'CPU seconds, median of ' + str(rounds):<34}{'median':>8}{'range':>14}{'ratio':>8}")
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):.2f}-{max(values):.2f}"
        print(f"{name:<34}{median:>8.2f}{spread:>14}{median / plain:>8.3f}")


if __name__ == "__main__":
    main()
