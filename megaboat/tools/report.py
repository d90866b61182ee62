"""Draw a run: pictures as PNG and one offline HTML page that explains them, in the run's report folder.

example:
  megaboat report runs/quickstart
"""

import argparse
from pathlib import Path

from megaboat.errors import BadInput
from megaboat.tools.report_data import Run, read_run
from megaboat.tools.report_figures import DARK, LIGHT, all_figures
from megaboat.tools.report_page import png, write_page
from megaboat.tools.report_words import status, verdict

PAGE = "index.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, the one that holds metrics.jsonl")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to draw; default: RUN/report")


def run(args: argparse.Namespace) -> None:
    """Draw, and say in two lines what the pictures show and where they are."""
    found = read_run(args.run)
    page = write_report(found, args.out or args.run / "report")
    for note in found.notes:
        print(f"note: {note}")
    print(f"{verdict(found)} {status(found)}")
    print(f"report: {page}")


def write_report(found: Run, folder: Path) -> Path:
    """Write the PNG files and the page into `folder`; return the page. Raises BadInput where it cannot be written."""
    light, dark = all_figures(found, LIGHT), all_figures(found, DARK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in light.items():
            (folder / f"{name}.png").write_bytes(png(figure))
        write_page(found, light, dark, folder / PAGE)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written: {error.strerror}") from None
    return folder / PAGE
