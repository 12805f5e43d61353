"""The order of steps: the first run with the shares of its time, and the cells."""

import platform
import re
import subprocess
import sys
import time
from collections import namedtuple

from steps import checks, measure
from steps.runner import (
    FAILED,
    HERE,
    IMPOSSIBLE,
    NOT_REACHED,
    OK,
    RUNNING,
    STOPPED,
    Result,
    Task,
    tool,
)

COMMANDS = {
    "golden": checks.golden,
    "test": checks.test,
    "memcheck": checks.sanitize,
    "racecheck": checks.sanitize,
    "initcheck": checks.sanitize,
    "synccheck": checks.sanitize,
    "program": checks.program,
    "bench": measure.bench,
    "tune": measure.tune,
    "profile": measure.profile,
}
# The first run: seconds out of 480, and a command. The cells of the first section have 180 of the
# 480; the rest is for all other cells. Later steps get the unused time of earlier ones.
FIRST = [
    (20, "golden", []),
    (120, "test", []),
    (30, "memcheck", ["reduced"]),
    (30, "racecheck", ["reduced"]),
]
BENCH_SHARE, WHOLE = 180, 480
ATTEMPTS = 2

Cell = namedtuple("Cell", "section name seconds command words")


def read_cells(file):
    """Reads the cells of a file in order: section, name, seconds, command and its arguments."""
    cells, section = [], None
    for number, line in enumerate(file.read_text().splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            section = line.strip("[]")
            continue
        seconds, name, command, *words = line.split()
        if command not in COMMANDS or name in [cell.name for cell in cells]:
            raise ValueError(f"{file.name}:{number}: {name} {command}")
        cells.append(Cell(section, name, float(seconds), command, words))
    return cells


def first_section(cells):
    return [cell for cell in cells if cell.section == cells[0].section]


# ---- The first run ------------------------------------------------------------------------------


def first(run):
    """Runs the steps that are not done yet, each with its share of the time, then cells."""
    cells = read_cells(HERE / "cells.txt")
    note_cells(run, cells)
    describe_machine(run)
    begin, left = time.monotonic(), run.left()
    unit = None if left is None else left / WHOLE
    share = 0
    for seconds, name, words in FIRST:
        share += seconds
        if run.results["steps"].get(name, {}).get("outcome") != OK:
            end = None if unit is None else begin + share * unit
            step(run, name, words, end)
    end = None if unit is None else begin + (share + BENCH_SHARE) * unit
    do_cells(run, first_section(cells), end, retry=False)
    note_cells(run, cells)
    do_cells(run, cells, None if left is None else begin + left)
    note_cells(run, cells)


def step(run, command, words, end, name=None):
    """Runs one command as a step."""
    name = name or command
    attempt = run.results["steps"].get(name, {}).get("attempts", 0) + 1
    return run.perform(Task("steps", name, command, words, end, attempt), COMMANDS[command])


def by_hand(run, command, words):
    """Runs a command from the command line; its arguments are a part of its step's name."""
    name = re.sub(r"\W+", "-", " ".join([command, *words])).strip("-")
    left = run.left()
    step(run, command, words, None if left is None else time.monotonic() + left, name)


def describe_machine(run):
    """Writes the output of the machine's own tools to machine.txt, a part of the results."""
    torch = "import torch, triton; print(torch.__version__, triton.__version__)"
    questions = [[tool("nvidia-smi")], [tool("nvcc"), "--version"], ["lscpu"], ["free", "-g"]]
    questions += [[sys.executable, "-c", torch]]
    text = [platform.platform(), f"python {platform.python_version()}"]
    for command in questions:
        if command[0] is None:
            continue
        try:
            reply = run.query(command[0], 15, *command)
            text.append(f"$ {' '.join(command)}\n{reply.stdout}{reply.stderr}")
        except (OSError, subprocess.SubprocessError) as error:
            text.append(f"$ {' '.join(command)}\n{error}")
    (run.folder / "machine.txt").write_text("\n".join(text))


# ---- Cells --------------------------------------------------------------------------------------


def further(run):
    """Runs cells alone: those that were not reached, then second attempts of the others."""
    cells = read_cells(HERE / "cells.txt")
    note_cells(run, cells)
    left = run.left()
    do_cells(run, cells, None if left is None else time.monotonic() + left)
    note_cells(run, cells)


def do_cells(run, cells, end, retry=True):
    """Runs cells in order, as far as each fits into the time that is left."""
    impossible = set()
    while True:
        left = None if end is None else end - time.monotonic()
        cell = next_cell(run, [c for c in cells if c.name not in impossible], left, retry)
        if cell is None:
            return
        attempt = attempts(run, cell) + 1
        limit = 2 * cell.seconds * attempt
        limit = limit if left is None else min(left, limit)
        task = Task("cells", cell.name, cell.command, cell.words, time.monotonic() + limit, attempt)
        if run.perform(task, COMMANDS[cell.command]).outcome == IMPOSSIBLE:
            impossible.add(cell.name)


def entry(run, cell):
    return run.results["cells"].get(cell.name, {"outcome": NOT_REACHED})


def attempts(run, cell):
    """Returns the number of attempts of a cell, less those that were not possible on a machine."""
    known = entry(run, cell)
    return 0 if known["outcome"] in (NOT_REACHED, IMPOSSIBLE) else known["attempts"]


def next_cell(run, cells, left, retry):
    """Returns the next open cell that fits: untried cells first, then second attempts."""

    def needs(cell):
        known = entry(run, cell)
        # A stopped cell needs more time than it had; a failed one may need as long again.
        return max(cell.seconds, known.get("seconds") or 0) if attempts(run, cell) else cell.seconds

    open_ = [cell for cell in cells if entry(run, cell)["outcome"] != OK]
    open_ = [cell for cell in open_ if attempts(run, cell) < (ATTEMPTS if retry else 1)]
    open_ = [cell for cell in open_ if left is None or needs(cell) <= left]
    return min(open_, key=lambda cell: attempts(run, cell), default=None)


def note_cells(run, cells):
    """Notes all cells in the results, and the outcomes of the steps that consist of them."""
    known = run.results["cells"]
    fresh = {"outcome": NOT_REACHED, "what": "", "seconds": None, "date": None, "log": None}
    for cell in cells:
        command = " ".join([cell.command, *cell.words])
        known.setdefault(cell.name, {**fresh, "attempts": 0, "command": command})
    # The order of the list, not of the runs.
    names = [cell.name for cell in cells]
    order = names + [name for name in known if name not in names]
    run.results["cells"] = {name: known[name] for name in order}
    groups = {cells[0].section: first_section(cells), "cells": cells}
    for name, group in groups.items():
        outcomes = [entry(run, cell)["outcome"] for cell in group]
        if set(outcomes) - {NOT_REACHED}:
            run.note(Task("steps", name, name), group_result(outcomes))
    run.write()


def group_result(outcomes):
    """Returns the result of a step from the outcomes of its cells."""
    what = f"{outcomes.count(OK)} of {len(outcomes)} cells"
    for outcome in (FAILED, STOPPED, RUNNING, IMPOSSIBLE, NOT_REACHED):
        if outcomes.count(outcome):
            what += f", {outcomes.count(outcome)} {outcome}"
    if FAILED in outcomes:
        return Result(FAILED, what)
    unfinished = {STOPPED, RUNNING, NOT_REACHED} & set(outcomes)
    return Result(STOPPED if unfinished else OK, what)
