"""Run notebooks in place and store their outputs, the same bytes each time.

    python book/tools/execute_notebooks.py [NOTEBOOK ...]     # default: all of notebooks/

What could differ between two runs is fixed here: metadata, cell ids (a hash of the source), times
(not recorded), the pieces that printed text arrives in (joined), progress bars (off).
"""

import hashlib
import os
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
METADATA = {
    "accelerator": "GPU",
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_METADATA = {"cellView", "mystnb", "tags"}
TIMEOUT = 600


def cell_ids(notebook) -> list[str]:
    """The id of each cell: a hash of its type and source, numbered where two are the same."""
    seen, ids = Counter(), []
    for cell in notebook["cells"]:
        text = f"{cell['cell_type']}\n{cell['source']}"
        seen[text] += 1
        ids.append(hashlib.sha256(f"{seen[text]}\n{text}".encode()).hexdigest()[:8])
    return ids


def normalize(notebook) -> None:
    """Keep what a reader or the book uses, in one fixed form."""
    notebook["metadata"] = METADATA
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    for cell, cell_id in zip(notebook["cells"], cell_ids(notebook), strict=True):
        cell["id"] = cell_id
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k in CELL_METADATA}
        if "tags" in cell["metadata"]:
            cell["metadata"]["tags"] = sorted(cell["metadata"]["tags"])
        if cell["cell_type"] == "code":
            cell["outputs"] = join_streams(cell["outputs"])


def join_streams(outputs) -> list:
    """Join text of one stream that arrived in pieces."""
    joined, streams = [], {}
    for output in outputs:
        if output["output_type"] != "stream":
            joined.append(output)
        elif output["name"] in streams:
            streams[output["name"]]["text"] += output["text"]
        else:
            streams[output["name"]] = output
            joined.append(output)
    return joined


def execute(path: Path) -> bool:
    """Run one notebook; write it if anything changed, leave it alone if a cell fails."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    start = time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        print(f"{path.name}: a cell fails, so the file stays as it was.\n{error}", file=sys.stderr)
        return False
    normalize(notebook)
    after = nbformat.writes(notebook).rstrip("\n") + "\n"
    if after != before:
        path.write_text(after, encoding="utf-8", newline="\n")
    result = "changed" if after != before else "same"
    print(f"{path.name}: {result}, {time.perf_counter() - start:.0f} s", flush=True)
    return True


def main(arguments: list[str]) -> int:
    """Run the notebooks named, or all; 1 if one fails."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # chapters store what a reader's CPU shows
    os.environ.pop("MPLBACKEND", None)
    paths = [Path(a) for a in arguments] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in paths:
        if not path.is_file():
            print(f"There is no notebook {path}.", file=sys.stderr)
            return 1
    done = [execute(path.resolve()) for path in paths]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
