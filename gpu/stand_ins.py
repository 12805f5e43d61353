"""Stand-ins for a bundle's programs and the CUDA toolkit, controlled by environment variables."""

import io
import sys
import tarfile

SHELL = "#!/bin/sh\n"
PYTHON = f"#!{sys.executable}\n"

# Programs of the payload.
PROGRAMS = {
    "moe-kernels": PYTHON
    + """\
import json, os, sys, time
command, *words = sys.argv[1:]
if command == "info":
    name = os.environ.get("GPU", "Invented GPU")
    time.sleep(float(os.environ.get("INFO_SLEEPS", 0)))
    print(f"cuda      {name}, compute capability 9.0, 79.1 GiB, driver for CUDA 13.0")
if command in ("check", "run"):
    print(f"{command}: all right")
if command == "bench":
    print("bench", *words, flush=True)
    output, option = words[words.index("--output") + 1], lambda name: words[words.index(name) + 1]
    model, sleeps = option("--model"), os.environ.get("BENCH_SLEEPS", "")
    os.makedirs(output, exist_ok=True)
    row = {"op": "layer", "by": "moe-kernels", "model": model, "tokens": 8, "dtype": "bf16"}
    row |= {"routing": "uniform", "seconds": {"median": 6.4e-4}, "percent_of_roofline": 81.2}
    record = {"date": "2001-02-03T04:05:06Z", "rows": [row], "complete": not sleeps}
    with open(f"{output}/bench.json", "w") as file:
        json.dump(record, file)
    if sleeps == "by itself":
        time.sleep(float(option("--time-limit")))
    elif sleeps:
        time.sleep(float(sleeps))
    sys.exit(int(os.environ.get("BENCH", 0)) if os.environ.get("MODEL", model) == model else 0)
""",
    "it": PYTHON
    + """\
import os, sys, time
names = ["route::a", "plan::b", "large::c"]
skipped = [sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "--skip"]
names = [name for name in names if not any(word in name for word in skipped)]
if "--list" in sys.argv:
    time.sleep(float(os.environ.get("LIST_SLEEPS", 0)))
    print(*(f"{name}: test" for name in names), sep="\\n")
    sys.exit()
alone = "--exact" in sys.argv
names = [name for name in names if not alone or name in sys.argv]
bad, crash = os.environ.get("BAD", "").split(), os.environ.get("CRASH")
bad += [] if alone else os.environ.get("BAD_TOGETHER", "").split()
print("cases", os.environ["PROPTEST_CASES"], flush=True)
for name in names:
    if name == crash:
        os.abort()
    print(f"test {name} ... ", end="", flush=True)
    time.sleep(float(os.environ.get("SLOW", 0)))
    print("FAILED" if name in bad else "ok", flush=True)
sys.exit(101 if set(bad) & set(names) else 0)
""",
    "golden": SHELL
    + 'echo "case 1" > $3; sleep ${GOLDEN_SLEEPS:-0}; echo "107 cases, 0 differ"; exit ${GOLDEN:-0}\n',
    "tune-variants": SHELL + "echo variants\n",
}
TOOLKIT = {
    "nvcc": SHELL,
    "nvidia-smi": SHELL + "echo an invented driver\n",
    "compute-sanitizer": PYTHON
    + """\
import os, subprocess, sys
how = os.environ.get("SANITIZER")
if how == "broken":
    print("========= Error: Target application terminated")
    sys.exit(255)
begin = next(i for i, word in enumerate(sys.argv) if word.startswith("./"))
status = subprocess.run(sys.argv[begin:]).returncode
found = how == "finds" and "racecheck" in sys.argv
print(f"========= ERROR SUMMARY: {3 * found} errors")
sys.exit(9 if found else status)
""",
    "ncu": PYTHON
    + """\
import os, sys, time
if "--import" in sys.argv:
    time.sleep(float(os.environ.get("IMPORT_SLEEPS", 0)))
if "--csv" in sys.argv:
    print('"Kernel Name","dram__bytes_read.sum","unimportant"\\n"","byte",""\\n"moe_x","1024","1"')
elif "--import" in sys.argv:
    print("the details")
elif "NCU" in os.environ:
    print(os.environ["NCU"])
    sys.exit(1)
else:
    open(sys.argv[sys.argv.index("--export") + 1], "w").close()
""",
}


def write_payload(file, commit):
    """Writes an archive like that of a bundle."""
    texts = {**PROGRAMS, "commit": commit + "\n", "cases/cases.txt": ""}
    with tarfile.open(file, "w:xz") as archive:
        for name, text in texts.items():
            data = text.encode()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755
            archive.addfile(member, io.BytesIO(data))


def write_toolkit(folder):
    folder.mkdir()
    for name, text in TOOLKIT.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
