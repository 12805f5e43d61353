"""The summary page: steps, cells, and the times of the whole layer."""

import json

from steps.runner import NOT_REACHED, OK, short


def page(results, folder):
    device = results["device"]
    lines = [
        f"# moe-kernels {short(results['commit'])} on {device['name']}",
        "",
        f"{results['started']} to {results['date']}, compute capability {device['capability']},"
        f" driver for CUDA {device['driver']}; {results['machine']}",
        "",
        *table("step", results["steps"]),
    ]
    cells = results["cells"]
    tried = {name: cell for name, cell in cells.items() if cell["outcome"] != NOT_REACHED}
    if cells:
        good = sum(cell["outcome"] == OK for cell in cells.values())
        lines += ["", f"## Cells: {good} of {len(cells)} done", ""]
    if tried:
        lines += table("cell", tried)
    missing = [name for name in cells if name not in tried]
    if missing:
        lines += ["", f"Not reached: {', '.join(missing)}."]
    lines += ["", "## The layer", "", *layer_table(rows_of(folder))]
    lines += ["", "Details: results.json, and the log and bench.json of each step and cell."]
    return "\n".join(lines) + "\n"


def table(kind, entries):
    lines = [f"| {kind} | outcome | seconds | |", "|---|---|---|---|"]
    for name, entry in entries.items():
        seconds = "" if entry["seconds"] is None else entry["seconds"]
        what = entry["what"].replace("|", "/")
        again = f" (attempt {entry['attempts']})" if entry["attempts"] > 1 else ""
        lines.append(f"| {name} | {entry['outcome']}{again} | {seconds} | {what} |")
    return lines


def rows_of(folder):
    """Returns the rows of all benches so far, in the order of their dates."""
    parts = [json.loads(file.read_text()) for file in folder.rglob("bench.json")]
    parts.sort(key=lambda part: part["date"])
    return [row for part in parts for row in part["rows"]]


def layer_table(rows):
    """Returns a table of the layer's times in microseconds, with the percentage of the roofline."""
    lines = {}
    for row in rows:
        ours = row["by"] == "moe-kernels" and row["op"] == "layer"
        if ours and row["seconds"]:
            percent = row["percent_of_roofline"]
            reached = "" if percent is None else f" ({percent:.0f} %)"
            cells = lines.setdefault(f"{row['model']} {row['dtype']} {row['routing']}", {})
            cells[row["tokens"]] = f"{row['seconds']['median'] * 1e6:.0f}{reached}"
    if not lines:
        return ["No layer was timed."]
    tokens = sorted({count for cells in lines.values() for count in cells})
    return [
        "From logits, in microseconds (percentage of the roofline).",
        "",
        "| layer | " + " | ".join(f"T={count}" for count in tokens) + " |",
        "|---" * (len(tokens) + 1) + "|",
        *(
            f"| {layer} | " + " | ".join(cells.get(count, "") for count in tokens) + " |"
            for layer, cells in lines.items()
        ),
    ]
