"""The process that checks and measures: whatever of the pieces is not yet in the record, while there is time."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

import transformers

from tests.bench import results
from tests.bench.gpu import aims, machine, pieces
from tests.bench.gpu.record import LOST, NOWHERE, Record
from tests.bench.gpu.sizes import TINY, Setup, Size

LEAST_SECONDS = 5.0  # that are worth beginning a piece


def main() -> int:
    """Goes on where the record stands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("until", type=float)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--anew", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    setup = Setup(TINY if arguments.tiny else Size(), machine.default())
    if setup.device == "cpu" and not arguments.tiny:
        print("there is no GPU here; --tiny runs on a CPU", file=sys.stderr)
        return NOWHERE
    record = Record.new(arguments.record) if arguments.anew else Record(arguments.record)
    record.note(tiny=arguments.tiny, conditions={**results.conditions(), **machine.named(setup.device)})
    try:
        run(setup, record, arguments.until)
    except machine.DeviceLost as lost:
        record.end_cut_off(f"the device is lost: {lost}")
        return LOST
    return 0


def run(setup: Setup, record: Record, until: float) -> None:
    """Every piece that the record has not, each within its time and what is left. Raises DeviceLost."""
    for piece in pieces.all_of(setup.size):
        if piece.name in record.pieces:
            continue
        if (left := until - time.time()) < LEAST_SECONDS:
            record.end(piece.name, left_out="no time was left")
            record.goals = aims.judged(setup.size, record.results())
            continue
        record.begin(piece.name)
        begun, why = time.perf_counter(), {}
        try:
            with pieces.limited(min(piece.seconds, left)):
                for name, found in piece.run(setup):
                    record.put(piece.name, name, found)
        except pieces.OutOfTime as late:
            why = {"failed": f"took {late}"}
        except Exception as error:
            why = {"failed": machine.told(error)}
        record.end(piece.name, time.perf_counter() - begun, **why)
        record.goals = aims.judged(setup.size, record.results())
        _clear(setup)


def _clear(setup: Setup) -> None:
    try:
        machine.wait(setup.device)
        machine.release(setup.device)
    except Exception as error:
        raise machine.DeviceLost(machine.told(error)) from error


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # threads of others' libraries shall not keep a process that is done
