"""The torch side: every twin under the name its launcher has in `jitted`."""

from .reference import gather, scatter_
from .reference_adamw import adamw_small_step_, adamw_step_
from .reference_bitmap import (
    adamw_bitmap_step_,
    gather_bitmap,
    gather_bitmap_many,
    scatter_bitmap_,
    scatter_bitmap_many_,
)
from .reference_multi import gather_many, scatter_many_
from .reference_weight_grad import weight_grad

__all__ = [
    "adamw_bitmap_step_",
    "adamw_small_step_",
    "adamw_step_",
    "gather",
    "gather_bitmap",
    "gather_bitmap_many",
    "gather_many",
    "scatter_",
    "scatter_bitmap_",
    "scatter_bitmap_many_",
    "scatter_many_",
    "weight_grad",
]
