import torch

from prefix_store.model.modules import keep_plain, make_plain, plain_of, replace


def test_what_was_replaced_can_be_put_back():
    inner = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh())
    model = torch.nn.Sequential(torch.nn.ReLU(), inner)
    relus = [model[0], inner[0]]
    replaced = replace(model, lambda layer: torch.nn.GELU() if type(layer) is torch.nn.ReLU else None)
    assert [(parent, name) for parent, name, _ in replaced] == [(model, "0"), (inner, "0")]
    assert [type(layer) for layer in (model[0], inner[0], inner[1])] == [torch.nn.GELU, torch.nn.GELU, torch.nn.Tanh]
    for parent, name, layer in replaced:
        setattr(parent, name, layer)
    assert [model[0], inner[0]] == relus


def test_what_stands_for_another_gives_way_to_it():
    fast, slow = torch.nn.Identity(), torch.nn.Tanh()
    keep_plain(fast, slow)
    model = torch.nn.Sequential(fast, torch.nn.ReLU())
    model[1].forward = lambda x: x
    assert model[0] is fast
    assert plain_of(fast) is slow
    assert list(fast.children()) == []
    make_plain(model)
    assert model[0] is slow
    assert float(model[1](torch.tensor(-1.0))) == 0
