"""InvDiff in PyTorch Lightning: find and mitigate unlabelled biases of diffusion models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invdiff_pl.adapters.pipeline import InvDiffPipeline

__version__ = "0.1.0"
__all__ = ["InvDiffPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the pipeline when it is first asked for: diffusers takes seconds."""
    if name != "InvDiffPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from invdiff_pl.adapters.pipeline import InvDiffPipeline  # noqa: PLC0415

    return InvDiffPipeline
