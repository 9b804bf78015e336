"""The GPU's benchmark: a small run of all of it where only torch is installed, and that its checks can fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from server.engine import sampled
from server.engine.attention import BACKENDS
from server.engine.batch import Unread
from tests import alone
from tests.bench.gpu import __main__ as supervisor
from tests.bench.gpu import aims, checks, decode, machine, pieces, table, worker
from tests.bench.gpu.pieces import Piece
from tests.bench.gpu.record import FILE, Record
from tests.bench.gpu.sizes import TINY, Setup, Size
from tests.bench.shapes import parameters
from tests.models import tiny_frozen

pytestmark = pytest.mark.filterwarnings("ignore")

SETUP = Setup(TINY, machine.default())


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The process that ran a small one, and the folder that it wrote to."""
    folder = tmp_path_factory.mktemp("gpu")
    variables = {**alone.environment(folder), "OUT": str(folder)}
    command = [sys.executable, "-m", "tests.bench.gpu", "--tiny"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=alone.ROOT, env=variables), folder


@pytest.mark.slow
def test_a_small_run_goes_through_every_piece_and_all_checks_pass(ran):
    done, folder = ran
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads((folder / FILE).read_text())
    assert list(measured["pieces"]) == [piece.name for piece in pieces.all_of(TINY)]
    for piece, held in measured["pieces"].items():
        assert held["results"], piece
        assert {"failed", "left_out"}.isdisjoint(held), piece
        assert not [name for name, found in held["results"].items() if "failed" in found], piece
    assert measured["goals"].keys() == dict(aims.all_of(TINY)).keys()
    assert all(math.isfinite(goal["measured"]) for goal in measured["goals"].values())
    assert table.table(measured).count("|") > 100


@pytest.mark.slow
def test_what_is_printed_is_what_is_kept(ran):
    done, folder = ran
    measured = json.loads((folder / FILE).read_text())
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    printed = {(line["piece"], line["result"]): line for line in lines if "result" in line}
    for piece, held in measured["pieces"].items():
        for name, found in held["results"].items():
            assert printed[piece, name] == {"piece": piece, "result": name, **found}
    assert [line["name"] for line in lines if "goal" in line] == list(measured["goals"])
    assert lines[-1]["checks_that_did_not_pass"] == []


def test_shapes_have_the_parameters_they_are_named_after():
    with torch.device("meta"):
        found = {one.shape.name: parameters(one.shape.model("eager", device="meta")) for one in Size().decoding}
    expected = {"Llama-2-7B": 6.74e9, "gpt2-medium": 355e6, "Qwen3-0.6B": 596e6}
    assert found == {name: pytest.approx(number, rel=0.01) for name, number in expected.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("served", [(1, 0), (0, 0), (1, 1)])
def test_a_prefix_in_the_place_of_another_does_not_pass(dtype, served):
    frozen = tiny_frozen("llama")
    frozen.model.to(dtype)
    assert checks.agreement(frozen)["passed"]
    found = checks.agreement(frozen, served)
    assert not found["passed"]
    assert found["worst"] > found["tolerance"]


def test_a_token_that_is_not_the_likeliest_does_not_pass(monkeypatch):
    run = checks._run
    monkeypatch.setattr(checks, "_run", lambda *given: [[*new[:-1], (new[-1] + 1) % 258] for new in run(*given)])
    found = checks.agreement(tiny_frozen("llama"))
    assert found["worst"] <= found["tolerance"]
    assert found["wrong"] == 5
    assert not found["passed"]


def test_attention_that_computes_something_else_does_not_pass(monkeypatch):
    name = checks.default_backend(tiny_frozen("llama"))
    right = BACKENDS[name]
    *_, (_, found) = checks.backend(SETUP)
    assert found["passed"]
    monkeypatch.setitem(BACKENDS, name, lambda *given, **options: 1.001 * right(*given, **options))
    *_, (_, found) = checks.backend(replace(SETUP, size=replace(TINY, fuzzed=1)))
    assert not found["passed"]


def test_other_bits_do_not_pass(monkeypatch):
    bits = checks._bits
    monkeypatch.setattr(checks, "_bits", lambda *given: bits(*given) + 1e-6 * torch.rand(1))
    assert not dict(checks.same_bits(SETUP))["again"]["passed"]


def test_a_row_that_goes_on_with_anothers_token_does_not_pass(monkeypatch):
    def turned(tokens, selections):
        return Unread(tokens.flip(0), selections)

    monkeypatch.setattr(sampled, "Unread", turned)
    found = dict(checks.same_bits(SETUP))
    assert (found["again"]["passed"], found["ahead"]["passed"]) == (True, False)


def test_the_ideal_reads_weights_own_tokens_and_each_distinct_prefix_once():
    one = TINY.decoding[0]
    decoder = decode.Decoder(SETUP, one.shape, [decode.Cell(4, 150, 2)])
    found = decoder.measure(decode.Cell(4, 150, 2))
    geometry = one.shape.frozen().geometry
    numbers = parameters(one.shape.model("eager"))
    numbers += geometry.kv_numbers_per_token * (4 * found["own_tokens"] + 2 * 150)
    ideal = 2000 * numbers / SETUP.copy_rate  # two bytes each, in milliseconds
    assert found["ideal_ms_a_step"] == pytest.approx(ideal, abs=1e-3)
    assert found["own_tokens"] == pytest.approx(TINY.own, abs=2)


def test_memory_that_runs_out_ends_one_measurement_and_the_next_one_runs():
    one, cell = TINY.decoding[0], decode.Cell(4, 5, 2)
    decoder = decode.Decoder(SETUP, one.shape, [cell])
    rate = decoder.measure(cell)["tokens_per_second"]

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    decoder._engine.step = full
    assert decoder.measure(cell) == {"failed": "OutOfMemoryError: CUDA out of memory"}
    assert decoder.measure(cell)["tokens_per_second"] > rate / 50


def late(setup):
    yield "before", {"a": 1}
    time.sleep(30)
    yield "after", {"a": 2}


def broken(setup):
    yield "before", {"passed": False}
    raise ValueError("two\nlines")


def well(setup):
    yield "all", {"passed": True}


def lost(setup):
    yield "before", {}
    raise machine.DeviceLost("an illegal address")


def run(monkeypatch, path, *steps: Piece, seconds: float = 60.0) -> Record:
    monkeypatch.setattr(pieces, "all_of", lambda size: list(steps))
    record = Record(path)
    worker.run(SETUP, record, time.time() + seconds)
    return Record(path)


def test_a_piece_that_is_late_or_fails_keeps_no_other_from_running(monkeypatch, tmp_path, capfd):
    steps = Piece("late", 0.2, late), Piece("broken", 9, broken), Piece("well", 9, well)
    record = run(monkeypatch, tmp_path / FILE, *steps)
    assert record.results() == {
        "late": {"before": {"a": 1}}, "broken": {"before": {"passed": False}}, "well": {"all": {"passed": True}}
    }  # fmt: skip
    assert record.pieces["late"]["failed"].startswith("took longer than")
    assert record.pieces["broken"]["failed"] == "ValueError: two lines"
    assert record.wrong() == ["broken: before"]
    assert len(capfd.readouterr().out.splitlines()) == 6


def test_a_process_goes_on_where_another_lost_the_device(monkeypatch, tmp_path):
    steps = Piece("lost", 9, lost), Piece("well", 9, well)
    with pytest.raises(machine.DeviceLost):
        run(monkeypatch, tmp_path / FILE, *steps)
    record = Record(tmp_path / FILE)
    assert record.end_cut_off("the device is lost")
    assert not record.end_cut_off("again")
    assert run(monkeypatch, tmp_path / FILE, *steps).results() == {
        "lost": {"before": {}}, "well": {"all": {"passed": True}}
    }  # fmt: skip
    assert Record(tmp_path / FILE).pieces["lost"]["failed"] == "the device is lost"


def test_without_time_pieces_are_left_out_and_goals_are_not_measured(monkeypatch, tmp_path):
    record = run(monkeypatch, tmp_path / FILE, Piece("well", 9, well), seconds=1.0)
    assert record.pieces["well"]["left_out"] == "no time was left"
    assert set(aims.judged(TINY, record.results()).values()) == {None}


def test_a_process_that_dies_is_followed_by_one_that_goes_on(monkeypatch, tmp_path, capfd):
    codes, commands = [-11, 0], []

    def died(command, **options):
        commands.append(command)
        record = Record.new(tmp_path / FILE) if "--anew" in command else Record(tmp_path / FILE)
        record.begin(f"piece {len(commands)}")
        if not codes[0]:
            record.end("piece 2")
            record.goals = {"fast": None}
        return subprocess.CompletedProcess(command, codes.pop(0))

    monkeypatch.setattr(subprocess, "run", died)
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny"])
    monkeypatch.setenv("OUT", str(tmp_path))
    assert supervisor.main() == 0
    assert ["--anew" in command for command in commands] == [True, False]
    pieces = Record(tmp_path / FILE).pieces
    assert pieces == {"piece 1": {"results": {}, "failed": "the process ended with -11"}, "piece 2": {"results": {}}}
    assert '{"name": "fast", "met": null}' in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_and_nothing_lost(tmp_path):
    command = [sys.executable, "-m", "tests.bench.gpu"]
    (tmp_path / FILE).write_text("what a GPU has measured")
    variables = {**alone.environment(tmp_path), "OUT": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=alone.ROOT, env=variables)
    assert done.returncode == 1
    assert "no GPU" in done.stderr
    assert (tmp_path / FILE).read_text() == "what a GPU has measured"
