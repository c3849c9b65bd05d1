"""The Triton side: every launcher under the name its torch twin has. Importing it needs triton."""

from .adamw import adamw_step_
from .adamw_bitmap import adamw_bitmap_step_
from .adamw_small import adamw_small_step_
from .bitmap import gather_bitmap, gather_bitmap_many, scatter_bitmap_, scatter_bitmap_many_
from .gather import gather, gather_many
from .scatter import scatter_, scatter_many_
from .weight_grad import weight_grad

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
