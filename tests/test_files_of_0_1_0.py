"""Files of funcnet 0.1.0 load: the architecture, the state of a training, the bits."""

from pathlib import Path

import optree
import pytest
import torch
from test_properties import same

import funcnet as fn

DATA = Path(__file__).parent / "data"
NET = fn.Sequential(
    fn.Conv2d(4, 3, stride=2, padding=1),
    fn.ReLU(),
    fn.Conv2d(2, (1, 2), padding="valid", bias=False, method="unfold"),
    fn.UpsampleConv2d(3),
    fn.Sequential(fn.Sigmoid(), fn.Upsample2d((1, 2))),
)


def test_a_model():
    net, params = fn.load_model(DATA / "model-0.1.0.safetensors")
    assert net == NET
    assert same(params, NET.init(fn.key(7), (3, 8, 8)))  # the same key, the same parameters
    assert fn.inspect(DATA / "model-0.1.0.safetensors").metadata == {"epoch": "3"}


def test_a_tree():
    params = NET.init(fn.key(7), (3, 8, 8))
    state = fn.SGD(0.1, momentum=0.9).init(params)
    tree = {"params": params, "state": state, 3: [None, ()]}
    loaded = fn.load(DATA / "tree-0.1.0.safetensors")
    assert type(loaded["state"]) is fn.SGDState
    assert loaded[3] == [None, ()]
    assert same((loaded["params"], loaded["state"]), (tree["params"], tree["state"]))


def test_a_model_in_another_dtype():
    net, params = fn.load_model(DATA / "model-0.1.0.safetensors", dtype=torch.float64)
    expected = optree.tree_map(torch.Tensor.double, NET.init(fn.key(7), (3, 8, 8)))
    assert net == NET
    assert same(params, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_model_in_a_dtype_that_no_network_computes_in(dtype):
    message = f"expected a floating-point dtype of torch, of 16 bits or more, got {dtype}"
    with pytest.raises(TypeError, match=f"load_model: {message}"):
        fn.load_model(DATA / "model-0.1.0.safetensors", dtype=dtype)
