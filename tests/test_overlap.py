import math

import pytest
import torch

from subnet_ft.analysis.density import (
    density_by,
    extremes,
    layer_of,
    matrix_type_of,
    overall_density,
)
from subnet_ft.analysis.overlap import overlap, pairwise_overlap
from subnet_ft.errors import ConfigError, MaskMismatchError
from subnet_ft.mask import SubnetMask

SHAPES = {"dense": (10, 10), "sparse": (30, 30)}


def mask(dense: range, sparse: range) -> SubnetMask:
    ranges = {"dense": dense, "sparse": sparse}
    return SubnetMask({name: torch.tensor(list(r)) for name, r in ranges.items()}, SHAPES)


def test_figures_by_hand():
    a, b = mask(range(0, 80), range(0, 90)), mask(range(40, 100), range(80, 125))
    pair = overlap(a, b)
    assert (pair.nnz_a, pair.nnz_b, pair.intersection) == (170, 105, 50)
    # Per parameter 80 * 60 / 100 and 90 * 45 / 900.
    assert pair.expected == 48 + 4.5
    assert pair.o1 == 50 / 170 and pair.o2 == 50 / 105
    assert pair.chance_o1 == 52.5 / 170 and pair.chance_o2 == 52.5 / 105
    assert pair.uniform_o1 == b.density and pair.uniform_o2 == a.density
    assert pair.lift == 50 / 52.5 and math.isclose(pair.uniform_lift, (50 / 170) / (105 / 1000))
    assert pair.ceiling_o1 == 105 / 170 and pair.ceiling_o2 == 1.0
    assert pair.jaccard == 50 / 225 and pair.chance_jaccard == 52.5 / 222.5
    assert set(pair.as_dict()) >= {"o1", "o2", "lift", "expected", "jaccard", "ceiling_o1"}


def test_extremes_of_overlap():
    a, none = mask(range(5), range(0)), mask(range(0), range(3))
    assert overlap(a, a).o1 == overlap(a, a).o2 == overlap(a, a).jaccard == 1.0
    assert overlap(a, none).o1 == overlap(a, none).lift == 0.0


def test_random_masks_meet_at_the_chance_level():
    shapes = {"x": (300, 300), "y": (50, 50)}
    a = SubnetMask({"x": torch.randperm(90_000)[:20_000].sort().values}, shapes)
    b = SubnetMask({"x": torch.randperm(90_000)[:40_000].sort().values}, shapes)
    assert overlap(a, b).lift == pytest.approx(1, abs=0.03)
    assert overlap(a, b).uniform_lift > 1.01


def test_pairs():
    masks = {name: mask(range(5), range(5)) for name in "abc"}
    assert set(pairwise_overlap(masks)) == {("a", "b"), ("a", "c"), ("b", "c")}
    with pytest.raises(ConfigError, match="at least two"):
        pairwise_overlap({"a": masks["a"]})
    with pytest.raises(MaskMismatchError):
        overlap(masks["a"], masks["a"].filter("dense"))


def test_groups_are_weighted_by_numel():
    shapes = {
        "model.embed_tokens.weight": (50, 4),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.input_layernorm.weight": (4,),
        "model.layers.10.self_attn.q_proj.weight": (8, 4),
        "model.layers.10.self_attn.q_proj.bias": (8,),
    }
    names = list(shapes)
    indices = {names[1]: torch.arange(4), names[2]: torch.arange(4), names[3]: torch.arange(2)}
    changed = {n: {"bitwise": len(indices.get(n, ())), "abs:1e-5": 0} for n in names}
    one = SubnetMask(indices, shapes, changed=changed)
    layers = {entry.label: entry for entry in density_by(one, layer_of)}
    assert list(layers) == ["0", "10", "other"]
    # Weighted 8 / 20; the mean over tensors would be 0.625.
    assert layers["0"].density == 8 / 20 and layers["10"].density == 2 / 40
    types = {entry.label: entry for entry in density_by(one, matrix_type_of)}
    assert list(types) == ["embed_tokens", "q_proj", "input_layernorm", "q_proj.bias"]
    assert types["q_proj"].density == 6 / 48
    assert types["q_proj"].changed == {"bitwise": 6, "abs:1e-5": 0}
    assert overall_density(one).density == one.density
    densest, sparsest = extremes(one, 2)
    assert [entry.label for entry in densest] == [names[2], names[1]]
    assert {entry.label for entry in sparsest} == {names[0], names[4]}
    assert density_by(one | one, layer_of)[0].changed == {}


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("transformer.h.7.attn.c_attn.bias", "7", "c_attn.bias"),
        ("model.layers.3.mlp.experts.gate_up_proj", "3", "gate_up_proj"),
        ("bert.encoder.layer.0.output.dense.weight", "0", "dense"),
        ("lm_head.weight", "other", "lm_head"),
        ("weight", "other", "weight"),
    ],
)
def test_names(name: str, layer: str, kind: str):
    assert (layer_of(name), matrix_type_of(name)) == (layer, kind)
