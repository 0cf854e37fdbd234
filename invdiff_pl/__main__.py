"""``python -m invdiff_pl COMMAND …`` and the console script ``invdiff``."""

import sys
from collections.abc import Sequence

from invdiff_pl import __version__
from invdiff_pl.errors import InvDiffError
from invdiff_pl.quiet import silence

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
        exit status: 0 on success, 1 if ``check`` finds something to mend, 2 on bad input, 130 if
        interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        print(_HELP)
        return 0
    if command == "--version":
        print(__version__)
        return 0
    silence()
    try:
        return _dispatch(command, words[1:])
    except InvDiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _dispatch(command: str, words: list[str]) -> int:
    # Imported late: torch and Lightning take seconds, which help and errors should not wait for.
    if command in ("train", "augment", "backbone"):
        from invdiff_pl.run import run  # noqa: PLC0415

        run(command, words)
    elif command in ("fit", "predict", "test"):
        from invdiff_pl.cli import run as run_lightning  # noqa: PLC0415

        run_lightning([command, *words])
    elif command == "check":
        from invdiff_pl.check import run as run_check  # noqa: PLC0415

        return run_check(words)
    elif command == "render":
        from invdiff_pl.data.synthetic.command import run as run_render  # noqa: PLC0415

        run_render(words)
    elif command in ("report", "card"):
        from invdiff_pl.report.command import run as run_report  # noqa: PLC0415

        run_report(command, words)
    elif command == "compare":
        from invdiff_pl.report.compare import run as run_compare  # noqa: PLC0415

        run_compare(words)
    elif command == "export":
        from invdiff_pl.export import run as run_export  # noqa: PLC0415

        run_export(words)
    elif command == "sweep":
        from invdiff_pl.sweep import run as run_sweep  # noqa: PLC0415

        run_sweep(words)
    else:
        raise InvDiffError(
            f"there is no command {command!r}: expected train, augment, backbone, fit, predict, "
            "test, check, render, report, compare, card, export or sweep."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
