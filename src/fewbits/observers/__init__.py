"""Observers pick scale and zero point for a weight; some look at a layer's inputs first."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fewbits.observers.base import Observer
from fewbits.observers.histogram import HistogramObserver
from fewbits.observers.min_max import MinMaxObserver
from fewbits.observers.moving_average import MovingAverageMinMaxObserver
from fewbits.observers.mse import MSEObserver
from fewbits.observers.percentile import PercentileObserver

#: The built-in observers by short name.
OBSERVERS: Mapping[str, type[Observer]] = MappingProxyType(
    {
        "minmax": MinMaxObserver,
        "moving-average": MovingAverageMinMaxObserver,
        "histogram": HistogramObserver,
        "percentile": PercentileObserver,
        "mse": MSEObserver,
    }
)
