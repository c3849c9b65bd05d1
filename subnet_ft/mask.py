"""SubnetMask: which weights of a model belong to the subnetwork, as an immutable value."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from subnet_ft.errors import ConfigError, MaskFormatError, MaskMismatchError
from subnet_ft.names import Patterns, select_names
from subnet_ft.storage.indices import check_indices, contains, index_dtype, spread, union
from subnet_ft.storage.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Patterns", "Shape", "SubnetMask", "select_names"]

Shape = tuple[int, ...]


class SubnetMask(Mapping[str, "Tensor"]):
    """Flat row-major indices of the subnetwork, per parameter of a base model.

    A mapping from the name of every parameter with at least one index to its indices. Tensors it
    returns must not be written to. Equality compares shapes and indices, not where they came from.

    Args:
        indices: name -> (nnz,) integer, strictly increasing, within the parameter's numel. Stored
            as int32 while numel < 2**31, else int64. A parameter without an index may be absent.
        shapes: name -> shape of every targeted floating-point parameter, those without an index
            included: they are the denominator of the density.
        checksums: name -> checksum of the base's values at the indices (`mask_file.checksum`).
        metadata: what is known of the mask's origin: base_model, rule, source, ...
        changed: name -> {rule: count}, how many weights each rule called changed at extraction.

    Raises:
        MaskFormatError: indices of a parameter are not what is described above.

    Example:
        >>> mask = SubnetMask({"w": torch.tensor([0, 5])}, {"w": (2, 4), "b": (2,)})
        >>> mask.nnz, mask.density
        (2, 0.2)
    """

    __slots__ = (
        "__weakref__",
        "_changed",
        "_checksums",
        "_counts",
        "_indices",
        "_metadata",
        "_path",
        "_shapes",
    )

    def __init__(
        self,
        indices: Mapping[str, Tensor],
        shapes: Mapping[str, Shape],
        *,
        checksums: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        changed: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        """Validate and normalise the indices of every parameter."""
        unknown = [name for name in indices if name not in shapes]
        if unknown:
            raise MaskFormatError(f"{unknown[0]}: has indices but no shape; add it to shapes.")
        checked = {
            name: check_indices(name, indices[name], math.prod(shapes[name]))
            for name in shapes
            if name in indices and indices[name].numel()
        }
        self._fill(
            checked,
            {name: len(checked.get(name, ())) for name in shapes},
            shapes,
            checksums or {},
            metadata or {},
            changed or {},
            None,
        )

    def _fill(
        self,
        indices: Mapping[str, Tensor],
        counts: Mapping[str, int],
        shapes: Mapping[str, Shape],
        checksums: Mapping[str, str],
        metadata: Mapping[str, str],
        changed: Mapping[str, Mapping[str, int]],
        path: Path | None,
    ) -> None:
        self._indices = indices
        self._counts = MappingProxyType({name: counts[name] for name in shapes})
        self._shapes = MappingProxyType({name: tuple(shape) for name, shape in shapes.items()})
        self._checksums = MappingProxyType({n: checksums[n] for n in shapes if n in checksums})
        self._metadata = MappingProxyType(dict(metadata))
        self._changed = MappingProxyType({n: dict(changed[n]) for n in shapes if n in changed})
        self._path = path

    @classmethod
    def from_source(
        cls,
        indices: Mapping[str, Tensor],
        counts: Mapping[str, int],
        shapes: Mapping[str, Shape],
        *,
        checksums: Mapping[str, str],
        metadata: Mapping[str, str],
        changed: Mapping[str, Mapping[str, int]],
        path: Path | None = None,
    ) -> SubnetMask:
        """Wrap a source that validates and returns indices when asked, without reading them now.

        Args:
            indices: name -> indices; its `__getitem__` reads and checks.
            counts: name -> nnz of every name in `shapes`.
            shapes: as in the constructor, like the remaining arguments.
            checksums: as in the constructor.
            metadata: as in the constructor.
            changed: as in the constructor.
            path: a lasting file that holds exactly this mask; what a pickle stores.
        """
        mask = cls.__new__(cls)
        mask._fill(indices, counts, shapes, checksums, metadata, changed, path)
        return mask

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every targeted parameter."""
        return self._shapes

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of indices of every targeted parameter, zeros included; reads no tensor."""
        return self._counts

    @property
    def checksums(self) -> Mapping[str, str]:
        """Checksum of the base's values at the indices, where known."""
        return self._checksums

    @property
    def metadata(self) -> Mapping[str, str]:
        """Origin of the mask: base_model, rule, source, ..."""
        return self._metadata

    @property
    def changed(self) -> Mapping[str, Mapping[str, int]]:
        """How many weights each rule called changed at extraction, per parameter, where known."""
        return self._changed

    @property
    def nnz(self) -> int:
        """Number of weights in the subnetwork."""
        return sum(self._counts.values())

    @property
    def numel(self) -> int:
        """Number of weights in all targeted parameters."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    @property
    def density(self) -> float:
        """Compute nnz / numel, 0.0 for a mask that targets nothing."""
        return self.nnz / self.numel if self.numel else 0.0

    def __getitem__(self, name: str) -> Tensor:
        """Return the (nnz,) indices of a parameter; KeyError where it has none."""
        if not self._counts.get(name):
            raise KeyError(name)
        return self._indices[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of parameters with at least one index, in the model's order."""
        return (name for name, count in self._counts.items() if count)

    def __len__(self) -> int:
        """Count the parameters with at least one index."""
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        """Tell whether a parameter has at least one index; reads no tensor."""
        return bool(self._counts.get(name))  # type: ignore[call-overload]

    def __or__(self, other: SubnetMask) -> SubnetMask:
        """Return the weights that are in either mask."""
        return self._combine(other, union)

    def __and__(self, other: SubnetMask) -> SubnetMask:
        """Return the weights that are in both masks."""
        return self._combine(other, lambda a, b: a[contains(b, a)])

    def __sub__(self, other: SubnetMask) -> SubnetMask:
        """Return the weights that are in this mask and not in the other."""
        return self._combine(other, lambda a, b: a[~contains(b, a)])

    def _combine(
        self, other: SubnetMask, operation: Callable[[Tensor, Tensor], Tensor]
    ) -> SubnetMask:
        if not isinstance(other, SubnetMask):
            return NotImplemented
        self.check_same_shapes(other)
        indices: dict[str, Tensor] = {}
        checksums: dict[str, str] = {}
        for name, shape in self.shapes.items():
            if name not in self and name not in other:
                continue
            none = torch.empty(0, dtype=index_dtype(math.prod(shape)))
            ours = self[name] if name in self else none
            theirs = other[name] if name in other else none
            result = indices[name] = operation(ours, theirs)
            # A checksum covers the values at the indices: it holds only while they are the same.
            for mask, operand in ((self, ours), (other, theirs)):
                if name in mask.checksums and torch.equal(result, operand):
                    checksums.setdefault(name, mask.checksums[name])
        metadata = {k: v for k, v in self.metadata.items() if other.metadata.get(k) == v}
        return SubnetMask(indices, self.shapes, checksums=checksums, metadata=metadata)

    def check_same_shapes(self, other: SubnetMask) -> None:
        """Refuse a mask that does not target the same parameters.

        Raises:
            MaskMismatchError: names the first parameter that differs.
        """
        for name in [*self.shapes, *other.shapes]:
            left, right = self.shapes.get(name, "absent"), other.shapes.get(name, "absent")
            if left != right:
                raise MaskMismatchError(
                    f"{name}: masks must target the same parameters, got shapes {left} and "
                    f"{right}; use masks of the same base model."
                )

    def filter(self, include: Patterns = None, exclude: Patterns = None) -> SubnetMask:
        """Keep the parameters whose names match, as both numerator and denominator.

        Args:
            include: regular expressions of which one must match the whole name; None for all.
            exclude: regular expressions of which none may match the whole name.

        Raises:
            ConfigError: a pattern is no regular expression, or matches nothing.
        """
        names = select_names(self.shapes, include, exclude)
        return SubnetMask.from_source(
            self._indices,
            self.counts,
            {name: self.shapes[name] for name in names},
            checksums=self.checksums,
            metadata=self.metadata,
            changed=self.changed,
        )

    @classmethod
    def synthetic(cls, shapes: Mapping[str, Shape], density: float, seed: int = 0) -> SubnetMask:
        """Make a random mask from shapes alone, for tracing and tests without weights.

        One index is drawn in each of round(density * numel) (at least 1) equal stretches of every
        parameter, so memory is in proportion to the indices, not to the parameter.

        Args:
            shapes: name -> shape.
            density: share of each parameter, in (0, 1].
            seed: of the random generator.

        Raises:
            ConfigError: the density is outside (0, 1].
        """
        if not 0 < density <= 1:
            raise ConfigError(f"density must be in (0, 1], got {density}; pass a share like 0.02.")
        generator = torch.Generator().manual_seed(seed)
        indices = {}
        for name, shape in shapes.items():
            numel = math.prod(shape)
            nnz = min(numel, max(1, round(density * numel)))
            indices[name] = spread(numel, nnz, generator)
        return cls(indices, shapes, metadata={"rule": "synthetic", "source": f"seed {seed}"})

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the mask file (layout: `subnet_ft.mask_file`), whole or not at all.

        Raises:
            ConfigError: the file exists and `overwrite` is false.
        """
        from subnet_ft.mask_file import save_mask

        save_mask(self, path, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SubnetMask:
        """Open a mask file as a lazy view: indices are read when asked for.

        Raises:
            MaskFormatError: the file is not a valid mask file.
        """
        from subnet_ft.mask_file import load_mask

        return load_mask(path)

    def __eq__(self, other: object) -> bool:
        """Compare shapes and indices; checksums and metadata tell only where they came from."""
        if not isinstance(other, SubnetMask):
            return NotImplemented
        return (
            dict(self.shapes) == dict(other.shapes)
            and dict(self.counts) == dict(other.counts)
            and all(torch.equal(self[name], other[name]) for name in self)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Show size and density, not the indices."""
        return (
            f"SubnetMask({len(self)} of {len(self.shapes)} parameters, "
            f"nnz={self.nnz}, density={self.density:.4%})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SubnetMask:
        """Return the mask itself: it is immutable."""
        return self

    def __copy__(self) -> SubnetMask:
        """Return the mask itself: it is immutable."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a view of a lasting file as its path, any other mask as its indices."""
        if self._path is not None:
            return SubnetMask.load, (str(self._path),)
        known = (dict(self.checksums), dict(self.metadata), dict(self.changed))
        return _rebuild, (dict(self.items()), dict(self.shapes), *known)


def _rebuild(
    indices: dict[str, Tensor],
    shapes: dict[str, Shape],
    checksums: dict[str, str],
    metadata: dict[str, str],
    changed: dict[str, dict[str, int]],
) -> SubnetMask:
    return SubnetMask(indices, shapes, checksums=checksums, metadata=metadata, changed=changed)
