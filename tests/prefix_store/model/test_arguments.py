from prefix_store.model.arguments import strange


def test_only_what_is_given_and_unknown_is_strange():
    assert strange({"dropout": 0.1, "position_ids": 1, "s_aux": None, "output_router_logits": False}) == []
    assert strange({"s_aux": 1, "head_mask": 0, "use_cache": True}) == ["head_mask", "s_aux"]
