"""Tables in files and in text: csv files read and written, markdown, and plain columns."""

import contextlib
import csv
import io
from pathlib import Path

from common import fail
from common.files import check_writable


def output_path(path, flag="--output"):
    """The Path of a file to be written, its folder made; where that cannot be written, the program ends with code 2."""
    check_writable(Path(path).parent, flag)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def read_rows(path):
    """The whole rows of a csv file as dictionaries; [] if it is missing.

    A file may be read while it is written, or after a machine that vanished: half a row at its end, or zeros, are left
    out.
    """
    try:
        with open(path, errors="replace", newline="") as file:
            lines = [line for line in file if line.endswith("\n") and "\0" not in line]
    except OSError:
        return []
    return list(csv.DictReader(lines))


def stored_rows(path, names, expected):
    """{setting: rows} of an earlier call's csv file, numbers as numbers; all rows of a setting are written at once.

    Args:
        path: the csv file; a missing one has no rows.
        names: of the columns that make a setting.
        expected: {column: value} that each row must have. Other rows, and a setting's second row of a seed, end the
            program with exit code 2, since they would be mixed with new ones.
    """
    found = {}
    for row in read_rows(path):
        values = {name: number(value) for name, value in row.items()}
        if not (set(names) < values.keys() and expected.items() <= values.items()):
            fail(f"--output: {path} has rows of another checkpoint or number of episodes; name another file")
        setting = tuple(values[name] for name in names)
        if any(other["seed"] == values["seed"] for other in found.get(setting, ())):
            fail(f"--output: {path} has seed {values['seed']} of {setting} twice, as of two calls at once; remove one")
        found.setdefault(setting, []).append(values)
    return found


def beside(path, suffix):
    """A path with the suffix in place of .csv or .png, or after any other name: tau_0.1 -> tau_0.1.csv."""
    name = Path(path).name
    return Path(path).with_name(name.removesuffix(".csv").removesuffix(".png") + suffix)


def number(text):
    """A csv cell as int or float, as it was if it is written again; any other text as it is."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def read_exactly(path, columns):
    """[(line number, row)] of a csv file with exactly these columns; anything else ends the program with code 2."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"{path} cannot be read: {error}")
    if reader.fieldnames != columns:
        fail(f"{path}:1: the columns are {reader.fieldnames}; expected {columns}")
    for line, row in rows:
        if None in row or None in row.values():
            fail(f"{path}:{line}: {len(columns)} values expected")
    return rows


def csv_text(rows, columns=None):
    """Dictionaries as the text of a csv file.

    Args:
        rows: dictionaries.
        columns: those that are written, in this order (default: those of the first row).
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or rows[0], lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(path, rows):
    """Writes dictionaries as a csv file; the columns are those of the first one."""
    with open(path, "w", newline="") as file:
        file.write(csv_text(rows))


def markdown(header, lines):
    """A markdown table of a header's and the lines' cells."""
    first, *rest = (f"| {' | '.join(map(str, row))} |\n" for row in [header, *lines])
    return "".join([first, "|" + "---|" * len(header) + "\n", *rest])


def aligned(rows, right=()):
    """Rows of texts as lines with columns of one width; `right`: places of columns that are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    align = lambda i, cell: cell.rjust(widths[i]) if i in right else cell.ljust(widths[i])
    return ["  ".join(align(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows]
