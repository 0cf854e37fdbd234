"""``python -m invdiff_pl COMMAND …`` and the console script ``invdiff``."""

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from invdiff_pl import __version__
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.processes import TERMINATED, Terminated, end_with_parent
from invdiff_pl.utils.quiet import silence, write_what_can_be_encoded

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HELP = """\
usage: python -m invdiff_pl COMMAND [OPTIONS]

whole experiments (each says which stage commands it runs):
  train      infer environments, train the adapter, sample, report
  augment    the same, then test a classifier trained with debiased samples
  backbone   train a small backbone on a data set and measure its bias
stages, on Lightning's command line:
  fit        train a LightningModule:  --config FILE … --model.… --data.… --trainer.…
  predict    run one over its data:    the same
  test       as predict, for the samples stage: draw and score
helpers:
  check      look over a data set: what is there, what is broken, what to fix
  render     draw a stand-in data set
  report     rewrite a run's report
  compare    figures of several runs in one table
  verify     check every file of a run folder against the recorded digests
  replay     repeat a run in another folder, and compare the results
  card       write a new backbone's model card
  export     write a run's backbone, adapter and model card into one self-contained folder
  audit      count what a pipeline draws, with and without LoRAs: shares, bias, a page
  sweep      bias against quality over invariant and guidance scales, of one or several runs

python -m invdiff_pl COMMAND --help lists a command's options.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: without the program's name; ``sys.argv`` if not given.

    Returns:
        exit status: 0 on success, 1 if ``check`` finds something to mend, ``verify`` a missing or
        altered file, or ``replay`` a different result, 2 on bad input, 130 if interrupted, 143 if
        ended by SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(words: list[str]) -> int:
    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        print(_HELP)
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if os.getcwd() not in sys.path:  # a user's own classes, as `python -m` finds them
        sys.path.append(os.getcwd())
    silence()
    write_what_can_be_encoded()
    end_with_parent()
    try:
        return _dispatch(command, words[1:])
    except BrokenPipeError:
        raise
    except (InvDiffError, OSError) as error:
        return _refused(_system_error(error) if isinstance(error, OSError) else str(error))
    except Terminated:
        print("\nended by SIGTERM; run the same command again to resume", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to resume", file=sys.stderr)
        return 130


def _refused(message: str) -> int:
    # Ranks other than the first give their number, since all may fail on the same input.
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    told = "error" if rank == "0" else f"error (rank {rank})"
    print(f"{told}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _system_error(error: OSError) -> str:
    """Return the message on what the system refused: no space left, no permission, and so on."""
    reason = error.strerror or str(error)
    path = error.filename2 or error.filename
    where = f"{path}: " if path else ""
    remedy = "make room" if error.errno in _NO_ROOM else "fix that"
    return (
        f"{where}{reason}; {remedy} and run the same command again: it resumes from what is "
        "complete."
    )


# Module and function of each command, imported late: help and errors should not wait the seconds
# that importing torch and Lightning takes.
_COMMANDS = {
    "train": "cli.experiment:run_experiment",
    "augment": "cli.experiment:run_experiment",
    "backbone": "cli.experiment:run_experiment",
    "fit": "cli.lightning:run_lightning",
    "predict": "cli.lightning:run_lightning",
    "test": "cli.lightning:run_lightning",
    "check": "cli.check:run_check",
    "render": "data.synthetic.command:run_render",
    "report": "report.command:run_report",
    "card": "report.command:run_report",
    "compare": "report.compare:run_compare",
    "verify": "workflow.verify:run_verify",
    "replay": "cli.replay:run_replay",
    "export": "cli.export:run_export",
    "audit": "cli.audit:run_audit",
    "sweep": "cli.sweep:run_sweep",
}


def _dispatch(command: str, words: list[str]) -> int:
    if command not in _COMMANDS:
        raise InvDiffError(f"there is no command {command!r}: expected {', '.join(_COMMANDS)}.")
    module, _, function = _COMMANDS[command].partition(":")
    run = getattr(import_module(f"invdiff_pl.{module}"), function)
    # A function that runs several commands is given the command's name.
    told = [name for name, place in _COMMANDS.items() if place == _COMMANDS[command]]
    status = run(command, words) if len(told) > 1 else run(words)
    return int(status or 0)


if __name__ == "__main__":
    sys.exit(main())
