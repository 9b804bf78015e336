"""A prefix that another program left in a pickle is served as that program would, whatever its neighbours use."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from prefix_store import codec
from prefix_store.formats import pickled
from prefix_store.model.frozen import FrozenModel
from server.engine.prefix_loader import payload_of
from server.scheduler.messages import PrefixPayload
from tests.models import VOCABULARY, tiny_frozen, tiny_model
from tests.parity.harness import TOLERANCE, Case, alone, make_engine, run_mixed, worst_difference
from tests.prefix_store import foreign

LENGTHS = [3, 10, 24]
# by program: the family its models are of, and what writes its files
PROGRAMS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "rinna": ("gpt_neox", foreign.rinna),
    "Li & Liang": ("gpt2", foreign.li_liang),
    "crumb": ("opt", foreign.crumb),
    "cartridges": ("llama", foreign.cartridge),
}


def imported(path: Path, served: FrozenModel) -> PrefixPayload:
    """As the command line imports a file and the server takes it from the store."""
    native = path.with_suffix(".native")
    native.write_bytes(codec.encode(*pickled.read(path, "auto", served.geometry)))
    return payload_of(path.name, *codec.decode(native), torch.float32)


@pytest.mark.parametrize("program", PROGRAMS)
def test_mixed_rows_equal_the_program_s_own_keys_and_values(program, tmp_path, record_worst):
    draw = random.Random(0)
    family, build = PROGRAMS[program]
    served, plain = tiny_frozen(family), tiny_model(family)
    files = [tmp_path / f"{length}.weight" for length in LENGTHS]
    truth = [build(path, served.geometry, length, seed=length) for path, length in zip(files, LENGTHS, strict=True)]
    cases, prefixes = [], []
    for index in range(8):
        prompt = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.choice([1, 4, 17])))
        case = Case(prompt, None, new=6, arrives=index)
        if index % 4 == 3:  # neighbours without any
            prefixes.append(None)
        else:
            case = replace(case, kv=truth[index % 3])
            prefixes.append(imported(files[index % 3], served))
        cases.append(case)
    expected = [alone(plain, case) for case in cases]
    engine = make_engine(served, step_tokens=9, rows=5)
    tokens = run_mixed(engine, cases, prefixes)
    worst = worst_difference(engine, [logits for _, logits in expected])
    record_worst(f"{family}, {program}", worst)
    assert worst < TOLERANCE
    assert [tokens[str(index)] for index in range(len(cases))] == [ids for ids, _ in expected]

    swapped = make_engine(served)
    run_mixed(swapped, cases, prefixes[1:] + prefixes[:1])
    assert worst_difference(swapped, [logits for _, logits in expected]) > 100 * TOLERANCE


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@torch.inference_mode()
def test_peft_itself_serves_crumb_s_folder_alike(tmp_path):
    served = tiny_frozen("opt")
    foreign.crumb(tmp_path / "adapter", served.geometry, 24)
    model = PeftModel.from_pretrained(tiny_model("opt"), tmp_path / "adapter").eval()
    case = Case((5, 9, 42, 7), None, new=1)
    engine = make_engine(served)
    run_mixed(engine, [case], [imported(tmp_path / "adapter", served)])
    logits = model(torch.tensor([case.prompt])).logits[:, -1]
    assert worst_difference(engine, [logits]) < TOLERANCE
    assert worst_difference(engine, [alone(tiny_model("opt"), case)[1]]) > 100 * TOLERANCE
