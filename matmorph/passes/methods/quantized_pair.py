"""What loftq and qlora have in common: codes in the place of the weight, and a pair of factors beside them that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from matmorph.ir.site import Reject, Site
from matmorph.passes.methods.protocol import ReplaceMethod, SiteMethod, SiteStats, Trains
from matmorph.passes.methods.quantize.method import Quantize
from matmorph.passes.methods.quantized_base import refuse_rank, refuse_site, trial_error
from matmorph.passes.methods.quantized_settings import QuantizedSpec, quantizer_settings
from matmorph.passes.methods.weights import rank_beyond, scaled_pair, widened


class QuantizedPair(ReplaceMethod):
    """y = x @ Q^T + scale (x @ down) @ up + bias. Its settings have a `rank`. An update is merged into the codes, which are made anew."""

    trains: ClassVar[Trains | None] = "adapters"

    def check(self, site: Site, spec: Any) -> Reject | None:
        return refuse_site(site, spec, self.name, tables=Quantize.name) or refuse_rank(site, spec.rank)

    def impossible(self, sites: Sequence[Site], spec: Any) -> str | None:
        return rank_beyond(sites, spec.rank)

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """W' = `base` + `scale` (down @ up)^T with the dequantised `base` [out, in]; the bias is the node's own."""
        update = (widened(parts["down"]) @ widened(parts["up"])).T
        return widened(parts["base"]) + float(parts.get("scale", 1.0)) * update, None

    def two_factor(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return scaled_pair(parts)

    def equalises(self, spec: QuantizedSpec) -> bool:
        return spec.equalise

    def trial_error(self, site: Site, spec: QuantizedSpec, stats: SiteStats) -> float:
        return trial_error(site, spec, stats)

    def base_settings(self, spec: QuantizedSpec) -> Mapping[str, Any]:
        return quantizer_settings(spec)

    def base_again(self, settings: Mapping[str, Any]) -> tuple[SiteMethod, QuantizedSpec]:
        return Quantize().base_again(settings)
