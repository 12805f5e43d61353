"""Measurements: the bench with peers, variants of a kernel, profiles."""

import argparse
import csv
import json
import os
import re
import shutil
import sys

from steps.runner import FAILED, IMPOSSIBLE, OK, PAYLOAD, STOPPED, NoAnswer, Result, tool

MEMORY_FOLDER = "/dev/shm"  # For the peers' files of tensors, which have gigabytes.
MEMORY_BYTES = 16 << 30
TORCH_ANSWERS = 60  # Seconds in which torch has to load and find its device.
PAGE_ANSWERS = 60  # Seconds in which ncu has to print a report.
STOPS_EARLY = 15  # Seconds before its end at which a bench starts no further measurement.


# ---- Bench --------------------------------------------------------------------------------------


def torch_trouble(run):
    """Returns why peers cannot run on this machine; empty if they can."""
    probe = [sys.executable, "-c", "import torch; torch.zeros(1).cuda()"]
    try:
        reply = run.query("torch", TORCH_ANSWERS, *probe)
    except NoAnswer as error:
        return str(error)
    if not reply.returncode:
        return ""
    return (reply.stderr.strip().splitlines() or ["torch does not load"])[-1]


def peer_options(run, against, tuning_seconds):
    """Returns the bench's options for peers, or why they cannot run."""
    if run.device != "cuda":
        return None, "peers do not run on the software device"
    if not (PAYLOAD / "peers/peers.py").is_file():
        return None, "peers are not in this bundle"
    why = run.once("torch", lambda: torch_trouble(run))
    if why:
        return None, f"peers: {why}"
    # Later runs reuse the configurations that a search has found.
    cache = os.path.relpath(run.folder / "peers-cache", PAYLOAD)
    program = f"{sys.executable} peers/peers.py --cache {cache} --tuning-seconds {tuning_seconds:g}"
    return ["--peers", program + ("" if against == "all" else f" --only {against}")], None


def bench(run, task):
    """Runs the bench: times, rooflines and, with `--against`, peers."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--against")
    parser.add_argument("--tuning-seconds", type=float, default=30)
    options, words = parser.parse_known_args(task.words)
    folder = run.folder / task.path
    command = ["./moe-kernels", "bench", "--device", run.device, "--output", folder, *words]
    environment = {}
    if options.against:
        peers, why = peer_options(run, options.against, options.tuning_seconds)
        if why:
            return Result(IMPOSSIBLE, why)
        command += peers
        if os.path.isdir(MEMORY_FOLDER) and shutil.disk_usage(MEMORY_FOLDER).free > MEMORY_BYTES:
            environment["TMPDIR"] = MEMORY_FOLDER
    left = task.left()
    if left is not None:
        command += ["--time-limit", f"{max(left - STOPS_EARLY, 0.6 * left):.0f}"]
    done = run.call(task, *command, **environment)
    record = read_bench(folder)
    rows = f"{len(record['rows'])} rows" if record else "no rows"
    if done.status:
        return Result(FAILED, f"{rows}, {done.last()}")
    if done.status is None or not (record and record["complete"]):
        return Result(STOPPED, f"{rows}, not all")
    return Result(OK, rows)


def read_bench(folder):
    file = folder / "bench.json"
    return json.loads(file.read_text()) if file.is_file() else None


# ---- Variants -----------------------------------------------------------------------------------


def tune(run, task):
    """Times variants of grouped_gemm, compiled by this machine's nvcc."""
    if run.device != "cuda":
        return Result(IMPOSSIBLE, "variants are not timed on the software device")
    nvcc = tool("nvcc")
    if nvcc is None:
        return Result(IMPOSSIBLE, "nvcc, which compiles variants, was not found")
    architecture = run.results["device"]["capability"].replace(".", "")
    words = ["variants", "--architectures", architecture, "--nvcc", nvcc]
    done = run.call(task, "./tune-variants", *words)
    if done.status is None:
        return Result(STOPPED, f"the variants were not compiled in {done.seconds:.0f} s")
    if done.status:
        return Result(FAILED, done.last())
    command = ["./moe-kernels", "tune", "--variants", "variants"]
    command += ["--output", run.folder / task.path, *task.words]
    left = task.left()
    if left is not None:
        command += ["--time-limit", f"{0.8 * left:.0f}"]
    done = run.call(task, *command)
    return Result(done.outcome(), done.last())


# ---- Profiles -----------------------------------------------------------------------------------

# The metrics of ncu that are kept, if the GPU has them.
METRICS = re.compile(
    r"gpu__time_duration\.sum"
    r"|dram__bytes_(read|write)\.sum|dram__throughput\.avg\.pct.*elapsed"
    r"|lts__t_sector_hit_rate\.pct"
    r"|sm__(inst_executed_)?pipe_tensor.*pct.*"
    r"|l1tex__data_bank_conflicts_pipe_lsu.*\.sum"
    r"|launch__(registers_per_thread|occupancy_limit_.*|waves_per_multiprocessor)"
    r"|sm__warps_active\.avg\.pct.*|sm__maximum_warps_.*|smsp__issue_active\.avg\.pct"
)
PROFILED = ["--model", "qwen3-30b-a3b", "--tokens", "512", "--op", "layer"]


def profile(run, task):
    """Profiles kernels with ncu: a regular expression for their names, then a bench's arguments."""
    if run.device != "cuda":
        return Result(IMPOSSIBLE, "ncu needs a GPU, this is the software device")
    ncu = tool("ncu")
    if ncu is None:
        return Result(IMPOSSIBLE, "ncu was not found")
    kernels, *words = task.words or ["moe_"]
    report = PAYLOAD / "profiled.ncu-rep"
    report.unlink(missing_ok=True)
    # The first launches are the warm-up. ncu does not change the machine's clocks.
    choose = ["--kernel-name", f"regex:{kernels}", "--launch-skip", 20, "--launch-count", 10]
    how = ["--set", "full", "--clock-control", "none", "--force-overwrite", "--export", report]
    target = ["./moe-kernels", "bench", "--device", run.device, *(words or PROFILED)]
    done = run.call(task, ncu, *choose, *how, *target, "--output", PAYLOAD / "profiled")
    if not report.is_file():
        refused = done.find(r"==ERROR== (.*)")
        if refused:
            return Result(IMPOSSIBLE, f"ncu: {refused[0][1]}")
        return Result(STOPPED if done.status is None else FAILED, done.last())

    def page(*words):
        return run.query("ncu --import", PAGE_ANSWERS, ncu, "--import", report, *words).stdout

    run.file(task, ".txt").write_text(page("--page", "details"))
    launches = list(csv.DictReader(page("--page", "raw", "--csv").splitlines()))
    columns = launches[0] if launches else {}
    chosen = [c for c in columns if c == "Kernel Name" or METRICS.fullmatch(c)]
    with open(run.file(task, ".csv"), "w", newline="") as file:
        table = csv.DictWriter(file, chosen, extrasaction="ignore")
        table.writeheader()
        table.writerows(launches)  # The first row has the units.
    report.unlink()
    return Result(OK, f"{max(len(launches) - 1, 0)} launches, {len(chosen)} metrics")
