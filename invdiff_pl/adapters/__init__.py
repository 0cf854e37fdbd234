"""G_psi: the small modules trained beside the frozen backbone."""

from invdiff_pl.adapters.base import Adapter, build_adapter, load_adapter
from invdiff_pl.adapters.bottleneck import BottleneckAdapter
from invdiff_pl.adapters.lora import LoraAdapter
from invdiff_pl.adapters.pipeline import InvDiffPipeline
from invdiff_pl.adapters.unets import SmallUNetAdapter, UNetCopyAdapter

__all__ = [
    "Adapter",
    "BottleneckAdapter",
    "InvDiffPipeline",
    "LoraAdapter",
    "SmallUNetAdapter",
    "UNetCopyAdapter",
    "build_adapter",
    "load_adapter",
]
