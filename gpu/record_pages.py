"""The page of each record, and the README's section on performance."""

from pathlib import Path

NO_RECORDS = (
    "No GPU has run these kernels yet, so there are no figures; `gpu/bundle bundle &&\n"
    "bundle/run first` on a machine with one will make them."
)
OURS = "moe-kernels"
# Outcomes after which a step or cell is not repeated.
FINISHED = ("ok", "FAILED", "not possible here")


def microseconds(seconds):
    value = seconds * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def extent(values, unit):
    """Returns the lowest and the highest of some rates."""
    values = [value for value in values if value is not None]
    if not values:
        return "unknown"
    ends = dict.fromkeys(f"{value / 1e12:.4g}" for value in (min(values), max(values)))
    return f"{' to '.join(ends)} {unit}"


def percentage(value):
    return "" if value is None else f"{value:.0f} %"


def origin(record):
    """Returns the date, commit, device and ceilings of a record."""
    device = record["device"]
    days = record["date"][:10]
    if record["until"][:10] != days:
        days += f" to {record['until'][:10]}"
    text = (
        f"{days}, commit {record['commit'][:9]},"
        f" compute capability {device['capability']}, driver for CUDA {device['driver']}."
    )
    # Each bench has measured its own ceilings, which its rooflines are computed from.
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
    """Returns a sentence on what the record lacks; empty if it is complete."""
    missing = "; ".join(record["unfinished"])
    return f"This record is partial: {missing}." if missing else ""


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def key(row):
    """Returns the values that are the same in rows that can be compared."""
    names = ("op", "boundary", "model", "tokens", "dtype", "routing")
    return tuple(row[name] for name in names)


def best_peers(record):
    """Returns the row of the fastest peer for each key."""
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
Times are medians in microseconds, with the 10th and the 90th percentile. The roofline is the least
time at the ceilings above, by memory traffic or by arithmetic. *Of dense*: 100 % is the speed of
cuBLAS on as many rows, columns and products. *Times as fast*: the time of the fastest peer, at the
same boundary in the same run, divided by ours."""


def page(record):
    """Returns the page of a record."""
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
    text += ["## Steps and cells", f"{record['machine']}.", table(["step", "outcome", ""], steps)]
    cells = [
        [name, how, (date or "")[:10], line(what)]
        for name, (how, what, date) in record["cells"].items()
    ]
    if cells:
        text.append(table(["cell", "outcome", "", ""], cells))
    return "\n\n".join(text) + "\n"


def line(what):
    """Returns text that is safe in a table cell."""
    return what.replace("|", "/")


def cells_of(row, peer):
    """Returns the cells of one of our rows."""
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
    """Returns a table of models by tokens."""
    tokens = sorted({row["tokens"] for row in rows})
    models = {}
    for row in rows:
        models.setdefault(row["model"], {})[row["tokens"]] = cell(row)
    header = ["model", *(f"T={count}" for count in tokens)]
    return table(header, ([m, *(cells.get(t, "") for t in tokens)] for m, cells in models.items()))


def section(records):
    """Returns the README's section: the newest record of each GPU.

    `records` has each record by its path below benches/record.
    """
    newest = {}
    # A record without times does not replace one with times.
    by_worth = sorted(records.items(), key=lambda item: (bool(ours(item[1])), item[1]["date"]))
    for path, record in by_worth:
        newest[record["device"]["name"]] = (path, record)
    text = []
    for name, (path, record) in sorted(newest.items()):
        link = Path(path).with_suffix(".md")
        text += [
            f"### {name}",
            f"{origin(record)}\nAll results: [{link.stem}](benches/record/{link}).",
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
                "The layer from logits, bf16, uniform routing, in microseconds (% of the roofline)."
            ]
            text += [matrix(rows, reached)]
        if compared:
            text += ["The same, times as fast as the fastest peer of the run."]
            text += [matrix(compared, faster)]
    return "\n\n".join(text) or NO_RECORDS


