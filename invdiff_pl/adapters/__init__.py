"""G_psi: the small modules trained beside the frozen backbone."""

from invdiff_pl.adapters.base import Adapter, build_adapter, load_adapter
from invdiff_pl.adapters.lora import LoraAdapter

__all__ = ["Adapter", "LoraAdapter", "build_adapter", "load_adapter"]
