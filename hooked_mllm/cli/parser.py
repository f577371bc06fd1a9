"""The commands and their options. Torch is imported when a command runs, so that `--help` and `--version` are fast."""

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_mllm.bench.choices import BACKENDS, RUNS, SIZES, WARM_UP
from hooked_mllm.cli.arguments import DATA_FORMS, DTYPES, METRICS, TOY, count, tokens, torch_device
from hooked_mllm.version import __version__

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:  # its class has no type parameters at run time
    Commands = object
_CONTEXTS = [8192, 16384, 32768, 65536, 131072]


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; what it returns has `run`, a function of the arguments."""
    whole = argparse.ArgumentParser("hooked-mllm", description="Look inside multimodal language models.")
    whole.add_argument("--version", action="version", version=f"hooked-mllm {__version__}")
    commands = whole.add_subparsers(dest="command", required=True)
    _add_score(commands)
    bench = commands.add_parser("bench", help="time attention and prefill", description="Time attention and prefill.")
    kinds = bench.add_subparsers(dest="kind", required=True)
    _add_prefill(kinds)
    _add_kernel(kinds)
    return whole


def _command(commands: Commands, module: str, name: str, summary: str, description: str | None = None) -> Any:
    """A command, whose function of this name is imported when it runs."""

    def run(arguments: argparse.Namespace) -> None:
        getattr(import_module(f"hooked_mllm.cli.{module}"), name)(arguments)

    text = description or f"{summary[0].upper()}{summary[1:]}."
    how = argparse.ArgumentDefaultsHelpFormatter
    command = commands.add_parser(name, help=summary, description=text, formatter_class=how)
    command.set_defaults(run=run, prog=command.prog)
    return command


# -- score ---------------------------------------------------------------------------------------------------------


def _add_score(commands: Commands) -> None:
    add = _command(
        commands,
        "score",
        "score",
        "score every attention head and draw where the best ones look",
        "Score every attention head. Without arguments: the bundled toy model on its own task.",
    ).add_argument
    add("--model", default=TOY, help="folder, hub id, or a bundled toy")
    add("--data", help=f"{DATA_FORMS} (for a toy: toy)")
    add("--metric", choices=sorted(METRICS), default="ram", help="what to score heads by")
    add("--samples", type=count, default=32, help="samples at most")
    add("--top", type=count, default=8, help="heads to list, frame and draw")
    add("--pictures", type=partial(count, least=0), default=3, help="samples to paint the top heads' attention on")
    add("--out", type=Path, default=Path("hooked-mllm-out"), help="folder for the results")
    add("--checkpoint", type=Path, help="file of the state of the scores, from which an interrupted run continues")
    add("--dtype", choices=DTYPES, help="of the weights (float32 on a CPU, else bfloat16)")
    add("--device", type=torch_device, help="torch device (cuda if there is one, else cpu)")
    add("--seed", type=int, default=0, help="of the choice of samples")
    add("--quiet", action="store_true", help="no progress bar")


# -- bench ---------------------------------------------------------------------------------------------------------


def _add_prefill(kinds: Commands) -> None:
    summary = "time the prefill of a whole text decoder under several attentions"
    command = _command(kinds, "bench", "prefill", summary)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a checkpoint's folder, hub id, or a bundled toy: its text decoder")
    source.add_argument("--config", choices=list(SIZES), help="a published size with random weights")
    add = command.add_argument
    add("--contexts", type=tokens, nargs="+", default=_CONTEXTS, help="lengths, such as 8k 131072")
    add("--dense", type=partial(count, least=0), nargs="+", help="numbers of dense heads (of --config: the paper's)")
    add("--heads", type=Path, help="ranking of the dense heads: saved scores, or names such as L2H4,L3H1")
    add("--backends", nargs="+", choices=list(BACKENDS), metavar="NAME", help=f"of {', '.join(BACKENDS)}")
    add("--runs", type=count, default=RUNS, help="timed forwards of each variant at each length")
    add("--warm-up", type=count, default=WARM_UP, help="forwards before them")
    add("--dtype", choices=DTYPES, help="of the weights (float32 on a CPU, else bfloat16)")
    add("--device-map", choices=["auto", "balanced"], help="spread the layers over all GPUs")
    add("--resume", action="store_true", help="continue the record that is there: finished cells are left out")
    add("--quiet", action="store_true", help="no progress bar")
    _common(add)


def _add_kernel(kinds: Commands) -> None:
    summary = "time the hybrid attention op alone against other kernels"
    add = _command(kinds, "bench", "kernel", summary).add_argument
    add("--tokens", type=tokens, nargs="+", default=[8192, 32768, 131072], help="lengths, such as 8k 131072")
    add("--dense", type=partial(count, least=0), default=4, help="dense heads")
    add("--heads", type=count, default=32, help="query heads")
    add("--kv-heads", type=count, default=8, help="key-value heads")
    add("--d-head", type=count, default=128, help="width of a head")
    add("--rounds", type=count, default=7, help="readings of each variant")
    add("--skip-flex", action="store_true", help="without FlexAttention")
    _common(add)


def _common(add: Callable[..., Any]) -> None:
    add("--sink", type=partial(count, least=0), default=64, help="first tokens that streaming heads see")
    add("--window", type=count, default=1024, help="last tokens that streaming heads see")
    add("--device", type=torch_device, help="torch device (cuda if there is one, else cpu)")
    add("--seed", type=int, default=0, help="of random heads, token ids and weights")
    add("--out", type=Path, default=Path("hooked-mllm-out"), help="folder for the results")
