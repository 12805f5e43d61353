"""Correctness: golden vectors, the test suite, compute-sanitizer, the program's own checks."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

from steps.runner import FAILED, IMPOSSIBLE, NoAnswer, Result, tool

# tidy checks sources, which a bundle does not have. Tests of tensors of gigabytes are a cell.
LEFT_OUT = ("tidy::", "large::")
CASES = "4"  # Random cases of each property test, without `cases=N` and PROPTEST_CASES.
LIST_ANSWERS = 30  # Seconds in which the test binary has to list its tests.
MOST_ALONE = 200  # The most failed tests that are tried again, each in a process of its own.
ALONE_ENDS = 300  # Seconds in which one of them has to end.
# The reduced set of a sanitizer: all operations, with partial tiles and with many experts.
REDUCED = ["--shapes", "T37H72I56E5K2,T24H136I24E67K6", "--dtypes", "f32,bf16"]
REDUCED += ["--skews", "uniform", "--seeds", "0"]
# A small check that shows whether compute-sanitizer works on the machine.
PROBE = ["--ops", "permute", "--shapes", "T4H64I64E4K2", "--dtypes", "f32", "--seeds", "0"]


def golden(run, task):
    """Compares each primitive of the kernels with its result on the software device."""
    record = run.folder / "golden.txt"
    done = run.call(task, "./golden", "cases", "images", record)
    count = done.find(r"\d+ cases, .*")
    return Result(done.outcome(), count[0][0] if count else done.last())


# ---- The test binary ----------------------------------------------------------------------------


def words_of(task):
    """Reads a test command: the number of cases, and the filters of the test binary."""
    cases = os.environ.get("PROPTEST_CASES", CASES)
    filters = []
    for word in task.words:
        if word.startswith("cases="):
            cases = word.partition("=")[2]
        else:
            filters.append(word)
    left_out = [name for name in LEFT_OUT if name not in filters]
    return cases, filters + [word for name in left_out for word in ("--skip", name)]


def listed(run, chosen):
    done = run.query("./it --list", LIST_ANSWERS, "./it", "--list", *chosen)
    done.check_returncode()
    return set(re.findall(r"^(\S+): test$", done.stdout, re.MULTILINE))


def binary(run, task, threads, prefix=()):
    """Runs the test binary, also under a tool: its end, all tests, those reached, those failed."""
    cases, chosen = words_of(task)
    names = listed(run, chosen)
    done = run.call(
        task, *prefix, "./it", *chosen, "--test-threads", threads, PROPTEST_CASES=cases
    )
    seen = {match[1] for match in done.find(r"^test (\S+) \.\.\.")} & names
    failed = {match[1] for match in done.find(r"^test (\S+) \.\.\. .*FAILED")}
    return done, names, seen, failed


def counted(names, seen, failed, done):
    """Returns the result line of the test binary."""
    what = f"{len(seen)} of {len(names)} tests"
    if failed:
        what += f", failed: {' '.join(sorted(failed))}"
    if done.status is None:
        missing = " ".join(sorted(names - seen)) or "none"
        what += f" in {done.seconds:.0f} s, not reached: {missing}"
    return what


def test(run, task):
    """Checks operations against the CPU reference, on all cores."""
    done, names, seen, failed = binary(run, task, os.cpu_count())
    what = counted(names, seen, failed, done)
    broken = done.status not in (0, None)
    # After a failed kernel, later tests of the same context fail too: each failure is tried alone.
    suspects = sorted(failed | (names - seen if broken else set()))[:MOST_ALONE]
    if broken and suspects:
        verdicts = alone(run, task, suspects)
        still = [name for name, good in verdicts.items() if good is False]
        what += f"; {sum(good is True for good in verdicts.values())} of them pass alone"
        what += f", {len(still)} do not: {' '.join(still)}" if still else ""
        left = sum(good is None for good in verdicts.values())
        what += f", {left} not tried alone" if left else ""
    outcome = FAILED if failed or broken else done.outcome()
    return Result(outcome, what)


def alone(run, task, names):
    """Returns whether each test passes in a process of its own; `None` if its time was over."""
    cases = words_of(task)[0]

    def one(name):
        left = task.left()
        if left is not None and left < 2:
            return name, None, ""
        limit = ALONE_ENDS if left is None else min(left, ALONE_ENDS)
        command = ["./it", "--exact", name]
        try:
            done = run.query(" ".join(command), limit, *command, PROPTEST_CASES=cases)
        except NoAnswer as error:
            return name, None, str(error)
        return name, done.returncode == 0, done.stdout + done.stderr

    verdicts = {}
    pool = ThreadPoolExecutor(min(8, os.cpu_count()))
    try:
        with open(run.file(task, "-alone.log"), "w") as log:
            for name, good, output in pool.map(one, names):
                verdicts[name] = good
                log.write(f"# {name}\n{output}\n")
                log.flush()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        run.kill_all()  # After an interrupt; otherwise all have ended.
    return verdicts


# ---- compute-sanitizer --------------------------------------------------------------------------


def sanitizer_trouble(run, task, sanitizer):
    """Returns why compute-sanitizer does not work on this machine; empty if it does."""
    check = ["./moe-kernels", "check", "--device", run.device, *PROBE]
    probe = run.call(task, sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *check)
    if probe.status in (0, 9):
        return ""
    messages = probe.find(r"={5,} +(.*\S)")
    return messages[-1][1] if messages else f"exit status {probe.status}"


def sanitize(run, task):
    """Runs a tool of compute-sanitizer on tests, or on `reduced`: a small check of all operations."""
    if run.device != "cuda":
        return Result(IMPOSSIBLE, "compute-sanitizer needs a GPU, this is the software device")
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        return Result(IMPOSSIBLE, "compute-sanitizer was not found")
    why = run.once("sanitizer", lambda: sanitizer_trouble(run, task, sanitizer))
    if why:
        return Result(IMPOSSIBLE, f"compute-sanitizer does not work: {why}")
    prefix = [sanitizer, "--tool", task.command, "--error-exitcode", "9"]
    if task.command == "memcheck":
        # Some tests make calls that the driver must reject.
        prefix += ["--report-api-errors", "no"]
    if task.words == ["reduced"]:
        check = ["./moe-kernels", "check", "--device", run.device, *REDUCED]
        done = run.call(task, *prefix, *check)
        what, failed = "all operations on small shapes", set()
    else:
        done, names, seen, failed = binary(run, task, 1, prefix)
        what = counted(names, seen, failed, done)
    found = done.find(r"(ERROR|RACECHECK) SUMMARY: .*")
    what += f", {found[-1][0]}" if found else ""
    return Result(FAILED if failed else done.outcome(), what)


def program(run, task):
    """Runs the program, such as `check` or `run --recorded fixtures`, which must exit with 0."""
    done = run.call(task, "./moe-kernels", *task.words, "--device", run.device)
    lines = [line.strip() for line in done.lines if line.strip()]
    # Tables of recorded blocks have no summary line, so their good lines are counted.
    good = sum(line.endswith(" ok") for line in lines)
    last = lines[-1] if lines else ""
    return Result(done.outcome(), f"{good} lines are ok" if good and done.status == 0 else last)
