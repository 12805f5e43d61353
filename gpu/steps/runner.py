"""The device, the results folder, and calls of programs with a time limit."""

import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import namedtuple
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent  # The bundle.
PAYLOAD = HERE / "payload"  # Its programs and data, unpacked.
RESULTS = HERE / "results"
OK, FAILED, STOPPED, IMPOSSIBLE = "ok", "FAILED", "stopped", "not possible here"
RUNNING = "running"  # In the results while a task runs, and after the run was killed in it.
NOT_REACHED = "not reached"
# Folders of toolkits that are not on PATH.
TOOL_FOLDERS = ["/usr/local/cuda/bin", "/opt/nvidia/nsight-compute"]
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Signals that end this program.
GRACE = 5  # Seconds between SIGTERM and SIGKILL.
DEVICE_ANSWERS = 60  # Seconds in which the driver has to report the device.

# The outcome of a task, one of the constants above, and a line of text.
Result = namedtuple("Result", "outcome what")


class NoAnswer(subprocess.SubprocessError):
    """A program did not end in time."""


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def tool(name):
    """Returns the path of a program of the CUDA toolkit, or `None`."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(TOOL_FOLDERS))


def replace(file, text):
    """Replaces a file in one step, so that no reader sees a part of it."""
    half = file.with_name(file.name + ".half")
    half.write_text(text)
    half.replace(file)


class Task:
    """A command with its arguments, its end time, and the path of its results.

    `group` is "steps" or "cells". A second attempt writes its own files beside those of the first.
    """

    def __init__(self, group, name, command, words=(), end=None, attempt=1):
        self.group, self.name, self.command, self.words = group, name, command, list(words)
        self.end, self.attempt = end, attempt
        folder = "cells/" if group == "cells" else ""
        self.path = folder + name + (f"-{attempt}" if attempt > 1 else "")
        self.calls = 0

    def left(self):
        """Returns the seconds until the end time; `None` without a limit."""
        return None if self.end is None else max(0.5, self.end - time.monotonic())


class Done:
    """A program's exit status, `None` if its time was over, and its lines."""

    def __init__(self, status, lines, seconds):
        self.status, self.lines, self.seconds = status, lines, seconds

    def find(self, pattern):
        matches = (re.search(pattern, line) for line in self.lines)
        return [match for match in matches if match]

    def last(self):
        return self.lines[-1] if self.lines else ""

    def outcome(self):
        return {0: OK, None: STOPPED}.get(self.status, FAILED)


class Run:
    """One call of `run`: the device, the time limit, and all results of the device so far."""

    def __init__(self, device, output, limit=None):
        self.device, self.output, self.failed = device, output, False
        self.start = time.monotonic()
        self.end = None if limit is None else self.start + limit
        self.known = {}
        self.running = set()  # Programs that were started and have not ended.
        self.written = False  # Whether this call has written results.

    def open(self):
        """Finds the device and reads its earlier results at this commit."""
        self.commit = (PAYLOAD / "commit").read_text().strip()
        restore(HERE / "results.tar.gz")
        about = self.describe()
        words = f"{about['name']} cuda {about['driver']}".lower()
        key = f"{short(self.commit)}-{re.sub(r'[^a-z0-9.]+', '-', words).strip('-')}"
        self.folder = RESULTS / key
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "results.json"
        if file.is_file():
            self.results = json.loads(file.read_text())
        else:
            head = {"format": 2, "commit": self.commit, "device": about}
            head |= {"machine": f"{platform.platform()}, {os.cpu_count()} threads"}
            self.results = {**head, "started": now(), "date": now(), "steps": {}, "cells": {}}

    def describe(self):
        """Returns the device that the program finds. Exits if there is none."""
        command = ["./moe-kernels", "info", "--device", self.device]
        what = f"the device ({' '.join(command)})"
        try:
            reply = self.query(what, DEVICE_ANSWERS, *command)
            why = reply.stderr.strip() if reply.returncode else None
        except NoAnswer as error:
            why = str(error)
        if why is not None:
            sys.exit(f"{why}\nMOE_DEVICE=emulator tries this bundle without a GPU.")
        text = reply.stdout.split(maxsplit=1)[1].strip()
        match = re.match(r"(.*), compute capability ([\d.]+), .* driver for CUDA ([\d.]+)", text)
        name, capability, driver = match.groups()
        return {"kind": self.device, "name": name, "capability": capability, "driver": driver}

    def reserve(self):
        """Returns the seconds that are kept for ending a program and writing the last results."""
        return min(2 * GRACE, 0.05 * (self.end - self.start))

    def left(self):
        """Returns the seconds that are left for steps; `None` without a limit."""
        return None if self.end is None else self.end - self.reserve() - time.monotonic()

    def once(self, name, query):
        """Returns the result of `query()`, which is called once for each name."""
        if name not in self.known:
            self.known[name] = query()
        return self.known[name]

    # ---- Programs ----

    def launch(self, command, stderr, environment):
        """Starts a program in a session of its own, so that its children end with it."""
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=PAYLOAD,
            env={**os.environ, "MOE_DEVICE": self.device, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.running.add(process)
        return process

    def kill(self, process):
        """Ends a program and its children. Does not wait: one that hangs in the driver survives."""
        kill(process, signal.SIGKILL)
        self.running.discard(process)

    def kill_all(self):
        """Ends all programs that are still running."""
        for process in list(self.running):
            self.kill(process)

    def call(self, task, *command, **environment):
        """Runs a program, printing its output and writing it to the task's log line by line."""
        begin = time.monotonic()
        limit = task.left()
        log_file = self.file(task, ".log")
        with open(log_file, "a" if task.calls else "w") as log:
            task.calls += 1
            words = " ".join(map(str, command))
            log.write(f"# {now()}, {self.commit}, {self.device}: {words}\n")
            log.flush()
            process = self.launch(command, subprocess.STDOUT, environment)
            lines = []
            reader = threading.Thread(
                target=copy_lines, args=(process.stdout, lines, log), daemon=True
            )
            reader.start()
            try:
                in_time = ended(process, limit)
                if not in_time:
                    kill(process, signal.SIGTERM)
                    ended(process, GRACE)
            finally:
                self.kill(process)
            # A program that hangs in the driver survives SIGKILL, so this wait has a limit.
            ended(process, GRACE)
            reader.join(GRACE)
        status = process.returncode if in_time else None
        return Done(status, lines, time.monotonic() - begin)

    def query(self, what, limit, *command, **environment):
        """Runs a short program and returns its output; raises `NoAnswer` after `limit` seconds."""
        left = self.left()
        limit = limit if left is None else max(0, min(limit, left))
        process = self.launch(command, subprocess.PIPE, environment)
        try:
            output = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"{what} does not answer within {limit:.3g} s") from None
        finally:
            self.kill(process)
        return subprocess.CompletedProcess(command, process.returncode, *output)

    def file(self, task, ending):
        """Returns the path of a task's file beside its log, such as `cells/NAME.txt`."""
        file = self.folder / (task.path + ending)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    # ---- Results ----

    def perform(self, task, function):
        """Runs a task and notes its outcome, also after an exception."""
        begin = time.monotonic()
        try:
            self.note(task, Result(RUNNING, "still running, or the run was killed here"))
            result = function(self, task)
        except KeyboardInterrupt:
            for name in ENDING:
                signal.signal(name, signal.SIG_IGN)  # Further signals are ignored.
            self.note(task, Result(STOPPED, "interrupted"), time.monotonic() - begin)
            raise
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            result = Result(FAILED, f"{type(error).__name__}: {error}")
        self.failed |= result.outcome == FAILED
        self.note(task, result, time.monotonic() - begin)
        print(f"== {task.name}: {result.outcome}: {result.what}", flush=True)
        return result

    def note(self, task, result, seconds=None):
        """Writes and packs all results, since the next step may crash the machine."""
        self.results["date"] = now()
        self.results[task.group][task.name] = {
            "outcome": result.outcome,
            "what": result.what,
            "seconds": None if seconds is None else round(seconds, 1),
            "date": now(),
            "command": " ".join([task.command, *task.words]),
            "attempts": task.attempt,
            "log": f"{task.path}.log" if task.calls else None,
        }
        self.write()

    def write(self):
        from steps.page import page

        replace(self.folder / "results.json", json.dumps(self.results, indent=1) + "\n")
        text = page(self.results, self.folder)
        replace(self.folder / "summary.md", text)
        self.output.mkdir(parents=True, exist_ok=True)
        replace(self.output / "summary.md", text)
        archive = self.output / "results.tar.gz"
        half = archive.with_name("results.tar.gz.half")
        # A write that a signal has interrupted may still have this file open: a new file is needed.
        half.unlink(missing_ok=True)
        with tarfile.open(half, "w:gz", compresslevel=6) as file:
            file.add(RESULTS, "results")
        half.replace(archive)
        self.written = True


def short(commit):
    """Returns the first digits of a commit, with its suffix `-dirty` if there is one."""
    return commit[:9] + ("-dirty" if commit.endswith("-dirty") else "")


def restore(archive):
    """Unpacks earlier results if there is an archive and no folder."""
    if not RESULTS.exists() and archive.is_file():
        with tarfile.open(archive) as file:
            extract(file, HERE)


def extract(archive, folder):
    """Unpacks inside the folder alone; Python before 3.12 may lack the check of paths."""
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    archive.extractall(folder, **safe)


def copy_lines(stream, lines, log):
    """Copies each line at once to the list, the terminal and the log."""
    for line in stream:
        lines.append(line.rstrip("\n"))
        for target in (sys.stdout, log):
            try:
                target.write(lines[-1] + "\n")  # The last line may lack its newline.
                target.flush()
            except (OSError, ValueError):  # The terminal or the log is closed.
                pass


def ended(process, limit):
    """Waits for a program and returns whether it ended in time."""
    try:
        process.wait(limit)
        return True
    except subprocess.TimeoutExpired:
        return False


def kill(process, with_signal):
    """Sends a signal to a program and its children."""
    try:
        os.killpg(process.pid, with_signal)
    except (ProcessLookupError, PermissionError):
        pass
