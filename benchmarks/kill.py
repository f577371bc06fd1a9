"""Kills runs with a checkpoint at random moments: resumed results are those of a run that was never stopped.

Run:  python benchmarks/kill.py                 (100 kills over `measure`, a sweep and `hooked-mllm score`)
      python benchmarks/kill.py --kills 3 --runs measure

Each run is a process that is forked after the imports, and gets SIGKILL or SIGINT. After every kill, each file that is
there must be readable as a whole; at the end, the result must be bit-equal and nothing else be left in the folder.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hooked_mllm import HookedMLLM, metrics, objectives, toys
from hooked_mllm.cli import main
from hooked_mllm.heads import HeadScores
from hooked_mllm.storage import read_tensors

TOY = "toy-qwen3-vl"
KINDS = ("hooked_mllm.measure/3", "hooked_mllm.causal.checkpoint")


def measured(folder: Path, model: HookedMLLM) -> None:
    """`measure` with a checkpoint; a save after every second sample."""
    samples = toys.VisualRetrieval(pages=1).samples(model, 16)
    metric = metrics.RetrievalAttentionMass()
    scores = model.measure(samples, metric, checkpoint=folder / "state", save_every=2, progress=False)
    scores.save(folder / "scores")


def swept(folder: Path, model: HookedMLLM) -> None:
    """A sweep metric with a checkpoint."""
    samples = toys.VisualRetrieval(pages=1).samples(model, 4, answer=True)
    metric = metrics.AblationEffect(mode="zero", phase="both", layers=[1, 3])
    options = {"objective": objectives.AnswerLogProb(), "progress": False, "batch_size": 3}
    metric.run(model, samples, checkpoint=folder / "state", **options).save(folder / "scores")


def scored(folder: Path, model: HookedMLLM) -> None:
    """`hooked-mllm score` with a checkpoint."""
    arguments = ["--model", TOY, "--samples", "24", "--pictures", "1", "--device", "cpu", "--quiet"]
    if main(["score", *arguments, "--checkpoint", str(folder / "state"), "--out", str(folder)]):
        raise SystemExit(1)


RUNS: dict[str, Callable[[Path, HookedMLLM], None]] = {"measure": measured, "sweep": swept, "score": scored}


def start(run: str, folder: Path, model: HookedMLLM) -> multiprocessing.Process:
    """The run in a process of its own, without output."""

    def work() -> None:
        torch.set_num_threads(1)  # makes torch's pool of threads anew, which a forked process lacks
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(folder.parent / "errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        with contextlib.suppress(KeyboardInterrupt):
            RUNS[run](folder, model)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def finish(run: str, folder: Path, model: HookedMLLM) -> tuple[np.ndarray, list[str], float]:
    """The scores of a run that is not stopped, the files that it leaves, and its seconds."""
    began, process = time.perf_counter(), start(run, folder, model)
    process.join()
    if process.exitcode:
        raise SystemExit(f"{run} failed: {(folder.parent / 'errors').read_text()}")
    seconds = time.perf_counter() - began
    return HeadScores.load(folder / "scores").values.numpy(), sorted(p.name for p in folder.iterdir()), seconds


def check_whole(folder: Path) -> None:
    """Every file with a final name is complete; the readers raise otherwise."""
    if (folder / "state").exists():
        read_tensors(folder / "state", *KINDS)
    for path in folder.iterdir():
        if path.suffix == ".png" and not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
            raise SystemExit(f"{path} is cut off")


def killed(run: str, kills: int, model: HookedMLLM, generator: np.random.Generator) -> str:
    """Stop a run `kills` times, a few times in each folder, and compare what each folder ends with."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "plain")
        folder.mkdir()
        expected, names, seconds = finish(run, folder, model)
        left, stopped, resumed = kills, {signal.SIGKILL: 0, signal.SIGINT: 0}, 0
        while left:
            folder = Path(tempfile.mkdtemp(dir=parent))
            for _ in range(min(left, 4)):
                process = start(run, folder, model)
                process.join(float(generator.uniform(0.05, 0.9)) * seconds)
                which = signal.SIGKILL if generator.random() < 0.5 else signal.SIGINT
                if process.is_alive():
                    os.kill(process.pid or 0, which)
                    stopped[which] += 1
                    left -= 1
                process.join()
                check_whole(folder)
            resumed += (folder / "state").exists()
            values, after, _ = finish(run, folder, model)
            if not np.array_equal(values, expected, equal_nan=True):
                raise SystemExit(f"{run}: resumed scores differ by up to {np.nanmax(np.abs(values - expected))}")
            if after != names:
                raise SystemExit(f"{run}: the folder holds {after}; expected {names}")
    counts = f"{stopped[signal.SIGKILL]} SIGKILL, {stopped[signal.SIGINT]} SIGINT"
    return f"{run}: {counts}; {resumed} runs continued from a checkpoint; bit-equal, nothing left behind"


def command() -> None:
    """Parse the command line, and print a line for each kind of run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = HookedMLLM.from_pretrained(TOY, dtype="float32", check=False)
    generator = np.random.default_rng(arguments.seed)
    for number, run in enumerate(arguments.runs):
        kills = len(range(number, arguments.kills, len(arguments.runs)))
        print(killed(run, kills, model, generator), flush=True)


if __name__ == "__main__":
    sys.exit(command())
