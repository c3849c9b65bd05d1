"""Any Hugging Face checkpoint as named tensors that can be read in slices."""

from subnet_ft.checkpoints.base import Checkpoint
from subnet_ft.checkpoints.stored import StoredCheckpoint, open_checkpoint, read_json, resolve

__all__ = ["Checkpoint", "StoredCheckpoint", "open_checkpoint", "read_json", "resolve"]
