import copy
import pickle

import pytest
import torch

from subnet_ft.errors import ConfigError, MaskFormatError, MaskMismatchError
from subnet_ft.mask import SubnetMask, select_names

SHAPES = {"a.weight": (4, 8), "b.weight": (6,), "c.bias": (3,)}


def mask(**indices: list[int]) -> SubnetMask:
    names = {"a": "a.weight", "b": "b.weight", "c": "c.bias"}
    tensors = {names[key]: torch.tensor(value) for key, value in indices.items()}
    return SubnetMask(tensors, SHAPES, checksums=dict.fromkeys(tensors, "0" * 16))


def test_density_counts_parameters_without_an_index():
    one = mask(a=[0, 31], b=[])
    assert (one.nnz, one.numel, one.density) == (2, 41, 2 / 41)
    assert one.counts == {"a.weight": 2, "b.weight": 0, "c.bias": 0}
    assert list(one) == ["a.weight"] and len(one) == 1
    assert "a.weight" in one and "b.weight" not in one
    assert one["a.weight"].dtype == torch.int32
    with pytest.raises(KeyError):
        one["b.weight"]


def test_wide_parameters_take_int64():
    wide = SubnetMask({"w": torch.tensor([0, 2**31])}, {"w": (2, 2**31)})
    assert wide["w"].dtype == torch.int64 and wide["w"][1] == 2**31


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([[0, 1]]), "1-D integers, got 2-D int64"),
        (torch.tensor([0.0]), "1-D integers, got 1-D float32"),
        (torch.tensor([1, 0]), "strictly increasing"),
        (torch.tensor([1, 1]), "strictly increasing"),
        (torch.tensor([5, 6]), r"lie in \[0, 6\), got 5 to 6"),
        (torch.tensor([-1, 3]), r"lie in \[0, 6\), got -1 to 3"),
    ],
)
def test_wrong_indices_name_the_parameter(indices, message):
    with pytest.raises(MaskFormatError, match=f"^b.weight: .*{message}") as error:
        SubnetMask({"b.weight": indices}, SHAPES)
    assert "\n" not in str(error.value)


def test_indices_without_a_shape():
    with pytest.raises(MaskFormatError, match=r"^z: "):
        SubnetMask({"z": torch.tensor([0])}, SHAPES)


def test_set_algebra_and_what_becomes_of_checksums():
    x, y = mask(a=[0, 3, 7], b=[1]), mask(a=[3, 8], b=[1], c=[2])
    assert (x | y) == mask(a=[0, 3, 7, 8], b=[1], c=[2])
    assert (x & y) == mask(a=[3], b=[1])
    assert (x - y) == mask(a=[0, 7])
    # b and c keep the indices their checksums were taken at; a does not.
    assert set((x | y).checksums) == {"b.weight", "c.bias"}
    assert set((x & y).checksums) == {"b.weight"}
    assert set((x - x).checksums) == set() or (x - x).nnz == 0
    assert (x | x) == x and (x - x).nnz == 0 and (x & x).checksums == x.checksums


def test_set_algebra_on_random_masks_is_that_of_sets():
    shapes = {"w": (37, 53)}
    x, y = (SubnetMask.synthetic(shapes, d, seed=s) for d, s in ((0.3, 1), (0.6, 2)))
    left, right = set(x["w"].tolist()), set(y["w"].tolist())
    assert set((x | y)["w"].tolist()) == left | right
    assert set((x & y)["w"].tolist()) == left & right
    assert set((x - y)["w"].tolist()) == left - right


def test_masks_of_other_models_do_not_combine():
    with pytest.raises(MaskMismatchError, match=r"^b.weight: .*\(6,\) and absent"):
        mask(a=[1]) | SubnetMask({}, {"a.weight": (4, 8)})


def test_filter_narrows_the_denominator():
    one = mask(a=[0], b=[0, 1]).filter(exclude=r"a\..*")
    assert list(one.shapes) == ["b.weight", "c.bias"] and one.density == 2 / 9
    assert list(one) == ["b.weight"] and one.checksums == {"b.weight": "0" * 16}
    assert pickle.loads(pickle.dumps(one)) == one


def test_select_names():
    names = list(SHAPES)
    assert select_names(names) == names
    assert select_names(names, include=[r"c\.bias", r"a.*"]) == ["a.weight", "c.bias"]
    for include, exclude, message in [
        ("weight", None, "'weight' must match a whole parameter name"),
        (None, "zzz", "exclude pattern 'zzz'"),
        ("(", None, "must be a regular expression"),
        (r"a.*", r"a.*", "leave no parameter"),
    ]:
        with pytest.raises(ConfigError, match=message):
            select_names(names, include, exclude)


def test_synthetic_density_seed_and_extremes():
    shapes = {"w": (100, 100), "tiny": (2,), "wide": (2, 2**31)}
    one = SubnetMask.synthetic(shapes, 1e-6)
    assert one.counts == {"w": 1, "tiny": 1, "wide": 4295}
    full = SubnetMask.synthetic({"w": (7, 9)}, 1.0)
    assert full["w"].tolist() == list(range(63))
    a, b, c = (SubnetMask.synthetic({"w": (99, 9)}, 0.2, seed=seed) for seed in (1, 1, 2))
    assert a == b and a != c and a.counts["w"] == round(0.2 * 891)
    for density in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError):
            SubnetMask.synthetic(shapes, density)


def test_is_a_value():
    one = mask(a=[1, 2])
    assert copy.deepcopy(one) is one and copy.copy(one) is one
    restored = pickle.loads(pickle.dumps(one))
    assert restored == one and restored.checksums == one.checksums
    assert one != mask(a=[1, 3]) and one != mask(a=[1]) and one != 3
    assert "nnz=2" in repr(one)
    with pytest.raises(TypeError):
        one.shapes["a.weight"] = (1,)
