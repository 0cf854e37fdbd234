"""``python -m invdiff_pl COMMAND …`` and the console script ``invdiff``."""

import errno
import os
import sys
from collections.abc import Sequence

from invdiff_pl import __version__
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.processes import TERMINATED, Terminated, end_with_parent
from invdiff_pl.utils.quiet import silence, write_what_can_be_encoded

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HELP = """\
usage: python -m invdiff_pl COMMAND [OPTIONS]

whole experiments (each says which stage commands it runs):
  train      infer environments, train the adapter, sample, report
  augment    the same, and what debiased samples do for a classifier's worst group
  backbone   train a small backbone on a data set and measure its bias
stages, by the Lightning command line:
  fit        train a LightningModule:  --config FILE … --model.… --data.… --trainer.…
  predict    run one over its data:    the same
  test       the same as predict for the samples stage: draw, and score
helpers:
  check      look over a data set: what is there, what is broken, what to mend
  render     draw a stand-in data set
  report     write a run's report anew
  compare    figures of several runs in one table
  verify     check every file of a run folder against the digests on record
  replay     make a run folder's results anew in another folder, and compare
  card       write a new backbone's model card
  export     write a run's backbone, adapter and model card into a folder to take away
  sweep      bias against quality over invariant and guidance scales, of one or several runs

python -m invdiff_pl COMMAND --help tells a command's options.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: without the program's name; ``sys.argv`` if not given.

    Returns:
        exit status: 0 on success, 1 if ``check`` finds something to mend, ``verify`` a file that is
        missing or altered, or ``replay`` another result, 2 on bad input, 130 if interrupted, 143
        if ended by SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
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
    except (InvDiffError, OSError) as error:
        return _refused(_system_error(error) if isinstance(error, OSError) else str(error))
    except Terminated:
        print("\nended by SIGTERM; the same command goes on from here", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _refused(message: str) -> int:
    # On every rank but the first it is told who says so: all may stumble over the same input.
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    told = "error" if rank == "0" else f"error (rank {rank})"
    print(f"{told}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _system_error(error: OSError) -> str:
    """What the system refused: no space left, no permission, and so on."""
    reason = error.strerror or str(error)
    path = error.filename2 or error.filename
    where = f"{path}: " if path else ""
    remedy = "make room" if error.errno in _NO_ROOM else "mend that"
    return (
        f"{where}{reason}; {remedy} and run the same command again: it goes on from what is "
        "complete."
    )


def _dispatch(command: str, words: list[str]) -> int:
    # Imported late: torch and Lightning take seconds, which help and errors should not wait for.
    if command in ("train", "augment", "backbone"):
        from invdiff_pl.cli.experiment import run  # noqa: PLC0415

        run(command, words)
    elif command in ("fit", "predict", "test"):
        from invdiff_pl.cli.lightning import run as run_lightning  # noqa: PLC0415

        run_lightning([command, *words])
    elif command == "check":
        from invdiff_pl.cli.check import run as run_check  # noqa: PLC0415

        return run_check(words)
    elif command == "render":
        from invdiff_pl.data.synthetic.command import run as run_render  # noqa: PLC0415

        run_render(words)
    elif command == "verify":
        from invdiff_pl.workflow.verify import run as run_verify  # noqa: PLC0415

        return run_verify(words)
    elif command == "replay":
        from invdiff_pl.cli.replay import run as run_replay  # noqa: PLC0415

        return run_replay(words)
    elif command in ("report", "card"):
        from invdiff_pl.report.command import run as run_report  # noqa: PLC0415

        run_report(command, words)
    elif command == "compare":
        from invdiff_pl.report.compare import run as run_compare  # noqa: PLC0415

        run_compare(words)
    elif command == "export":
        from invdiff_pl.cli.export import run as run_export  # noqa: PLC0415

        run_export(words)
    elif command == "sweep":
        from invdiff_pl.cli.sweep import run as run_sweep  # noqa: PLC0415

        run_sweep(words)
    else:
        raise InvDiffError(
            f"there is no command {command!r}: expected train, augment, backbone, "
            "fit, predict, test, check, render, report, compare, verify, replay, card, export or "
            "sweep."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
