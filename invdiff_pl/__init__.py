"""InvDiff: find hidden biases of text-to-image diffusion models, and train them away.

The names below are imported on first use, since torch, diffusers and Lightning take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invdiff_pl import adapters, callbacks, metrics, modules
    from invdiff_pl.adapters.pipeline import InvDiffPipeline
    from invdiff_pl.adapters.trained import TrainedAdapter
    from invdiff_pl.data.in_memory import LatentsInMemory
    from invdiff_pl.data.prompted import PromptedImages
    from invdiff_pl.modules.invariant_adapter import InvariantAdapter
    from invdiff_pl.utils.errors import InvDiffError
    from invdiff_pl.workflow.audit import Audit, audit
    from invdiff_pl.workflow.debias import debias
    from invdiff_pl.workflow.discover import Discovery, discover
    from invdiff_pl.workflow.generate import generate

__version__ = "0.2.0"
_HOMES = {
    "Audit": "workflow.audit",
    "Discovery": "workflow.discover",
    "InvDiffError": "utils.errors",
    "InvDiffPipeline": "adapters.pipeline",
    "InvariantAdapter": "modules.invariant_adapter",
    "LatentsInMemory": "data.in_memory",
    "PromptedImages": "data.prompted",
    "TrainedAdapter": "adapters.trained",
    "audit": "workflow.audit",
    "debias": "workflow.debias",
    "discover": "workflow.discover",
    "generate": "workflow.generate",
}
_ROOMS = ("adapters", "callbacks", "metrics", "modules")
__all__ = [
    "Audit",
    "Discovery",
    "InvDiffError",
    "InvDiffPipeline",
    "InvariantAdapter",
    "LatentsInMemory",
    "PromptedImages",
    "TrainedAdapter",
    "__version__",
    "adapters",
    "audit",
    "callbacks",
    "debias",
    "discover",
    "generate",
    "metrics",
    "modules",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
