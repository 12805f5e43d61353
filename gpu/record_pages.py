"""The pages of records: one for each, and the README's section on performance."""

from pathlib import Path

NOTHING = (
    "No GPU has run these kernels yet, so there are no figures; `gpu/bundle bundle &&\n"
    "bundle/run first` on a machine with one will make them."
)
OURS = "moe-kernels"
# Outcomes that leave nothing to be done.
FINISHED = ("ok", "FAILED", "not possible here")


def microseconds(seconds):
    value = seconds * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def extent(values, unit):
    """The lowest and the highest of some rates."""
    values = [value for value in values if value is not None]
    if not values:
        return "unknown"
    ends = dict.fromkeys(f"{value / 1e12:.4g}" for value in (min(values), max(values)))
    return f"{' to '.join(ends)} {unit}"


def percentage(value):
    return "" if value is None else f"{value:.0f} %"


def origin(record):
    """Where and when: what every figure is of."""
    device = record["device"]
    days = record["date"][:10]
    if record["until"][:10] != days:
        days += f" to {record['until'][:10]}"
    text = (
        f"{days}, commit {record['commit'][:9]},"
        f" compute capability {device['capability']}, driver for CUDA {device['driver']}."
    )
    # Each bench has measured its own, and its rooflines are made of those.
    dtypes = [ceilings["dtype"] for ceilings in record["ceilings"]]
    for dtype in dtypes[:1]:
        measured = [ceilings for ceilings in record["ceilings"] if ceilings["dtype"] == dtype]
        copy, read, dense = (
            extent([ceilings[name] for ceilings in measured], unit)
            for name, unit in (
                ("copy_bytes_per_second", "TB/s"),
                ("read_bytes_per_second", "TB/s"),
                ("dense_flops_per_second", "TFLOP/s"),
            )
        )
        text += (
            f"\nCeilings measured in the same run:"
            f" copy {copy}, read {read}, dense product in {dtype} {dense}."
        )
    return text


def partial(record):
    """What the record lacks, as a sentence; empty if it is whole."""
    missing = "; ".join(record["unfinished"])
    return f"This record is partial: {missing}." if missing else ""


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def key(row):
    """What two rows have in common that may be compared."""
    names = ("op", "boundary", "model", "tokens", "dtype", "routing")
    return tuple(row[name] for name in names)


def best_peers(record):
    """The fastest peer for each key."""
    best = {}
    for row in record["rows"]:
        if row["by"] != OURS and row["seconds"]:
            fastest = best.get(key(row))
            if not fastest or row["seconds"]["median"] < fastest["seconds"]["median"]:
                best[key(row)] = row
    return best


def ours(record):
    return [row for row in record["rows"] if row["by"] == OURS and row["seconds"]]


INTRODUCTION = """\
Times are medians in microseconds, with the 10th and the 90th percentile. The roofline is what memory
or arithmetic allow at the ceilings above. *Of dense*: 100 % is the speed of cuBLAS on as many rows,
columns and products. *Times as fast*: the time of the best peer, on the same boundary in the same
run, divided by ours."""


def page(record):
    """The record for people."""
    text = [f"# {record['device']['name']}", origin(record)]
    if partial(record):
        text.append(partial(record))
    text.append(INTRODUCTION if ours(record) else "No time was measured.")
    header = ["model", "T", "type", "routing", "router", "ours", "launch", "roofline", "of roofline"]
    header += ["of dense", "best peer", "times as fast"]
    peers = best_peers(record)
    groups = {}
    for row in ours(record):
        groups.setdefault(f"## {row['op']}: {row['boundary']}", []).append(row)
    for title, rows in groups.items():
        text += [title, table(header, (cells_of(row, peers.get(key(row))) for row in rows))]
    shapes = {}
    for row in ours(record):
        shapes[row["model"]] = [
            row["hidden"],
            row["intermediate"],
            row["num_experts"],
            row["top_k"],
        ]
    shapes = ([model, *sizes] for model, sizes in shapes.items())
    if ours(record):
        text += ["## Shapes", table(["model", "H", "I", "E", "K"], shapes)]
    others = [row for row in record["rows"] if row["by"] != OURS]
    present = {f"- {row['by']}: {row['version']}" for row in others if row["seconds"]}
    absent = {f"- {row['by']}: {row['note']}" for row in others if not row["seconds"]}
    if others:
        text += ["## Peers", "\n".join([*sorted(present), *sorted(absent - present)])]
    steps = [[name, how, line(what)] for name, (how, what) in record["steps"].items()]
    text += ["## The whole run", f"{record['machine']}.", table(["step", "outcome", ""], steps)]
    cells = [
        [name, how, (date or "")[:10], line(what)]
        for name, (how, what, date) in record["cells"].items()
    ]
    if cells:
        text.append(table(["cell", "outcome", "", ""], cells))
    return "\n\n".join(text) + "\n"


def line(what):
    """Text that does not break a table."""
    return what.replace("|", "/")


def cells_of(row, peer):
    """A row of ours as a line of the page."""
    times, roofline, dense = row["seconds"], row["roofline_seconds"], row["dense"]
    low, median, high = (microseconds(times[name]) for name in ("p10", "median", "p90"))
    named = [row[name] for name in ("model", "tokens", "dtype", "routing", "router")]
    return [
        *named,
        f"{median} ({low} to {high})",
        f"{row['launch']}, {row['cache']}",
        "" if roofline is None else f"{microseconds(roofline)} ({row['bound']})",
        percentage(row["percent_of_roofline"]),
        percentage(dense and dense["percent"]),
        f"{peer['by']}, {microseconds(peer['seconds']['median'])}" if peer else "",
        times_as_fast(row, peer),
    ]


def times_as_fast(row, peer):
    return f"{peer['seconds']['median'] / row['seconds']['median']:.2f}" if peer else ""


def matrix(rows, cell):
    """A table of models by tokens."""
    tokens = sorted({row["tokens"] for row in rows})
    models = {}
    for row in rows:
        models.setdefault(row["model"], {})[row["tokens"]] = cell(row)
    header = ["model", *(f"T={count}" for count in tokens)]
    return table(header, ([m, *(cells.get(t, "") for t in tokens)] for m, cells in models.items()))


def section(records):
    """The README's part: the newest record of each GPU. `records`: by path below benches/record."""
    newest = {}
    # One that was stopped before it had any times does not take the place of one that has some.
    by_worth = sorted(records.items(), key=lambda item: (bool(ours(item[1])), item[1]["date"]))
    for path, record in by_worth:
        newest[record["device"]["name"]] = (path, record)
    text = []
    for name, (path, record) in sorted(newest.items()):
        link = Path(path).with_suffix(".md")
        text += [
            f"### {name}",
            f"{origin(record)}\nAll of it: [{link.stem}](benches/record/{link}).",
        ]
        if partial(record):
            text.append(partial(record))
        if not ours(record):
            text.append("No time was measured.")
        chosen = ("layer", "bf16", "uniform")
        rows = [r for r in ours(record) if (r["op"], r["dtype"], r["routing"]) == chosen]
        peers = best_peers(record)
        compared = [row for row in rows if key(row) in peers]

        def reached(row):
            percent = percentage(row["percent_of_roofline"])
            return microseconds(row["seconds"]["median"]) + (f" ({percent})" if percent else "")

        def faster(row):
            peer = peers[key(row)]
            return f"{times_as_fast(row, peer)} {peer['by']}"

        if rows:
            text += [
                "The layer from logits, bf16, uniform routing, in microseconds (of the roofline)."
            ]
            text += [matrix(rows, reached)]
        if compared:
            text += ["The same, times as fast as the best peer of the run."]
            text += [matrix(compared, faster)]
    return "\n\n".join(text) or NOTHING


