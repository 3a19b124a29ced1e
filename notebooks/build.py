"""Executes the notebooks in place, and leaves out what changes from run to run.

python -m notebooks.build [NAME ...]
"""

from __future__ import annotations

import os
import pathlib
import sys

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent
KEPT = ("kernelspec", "language_info")
VIEW = "application/vnd.jupyter.widget-view+json"  # shows nothing without its kernel


def execute(path: pathlib.Path) -> None:
    """Runs every cell in a fresh kernel; the file is written when all went well."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # without notes of how long XLA compiled
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    notebook.metadata = {name: notebook.metadata[name] for name in KEPT}
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
        cell.metadata = {}
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(VIEW, None)
    nbformat.write(notebook, path)


def main() -> None:
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    for name in names:
        print(name, flush=True)
        execute(FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
