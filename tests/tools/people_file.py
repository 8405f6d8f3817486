"""A small DuckDB file with people, made by hand."""

import duckdb

PEOPLE = [
    ("Ann Smith", "12 March 1987", "France", "Oslo, Norway", "baker"),
    ("Bob O'Neil", "1 May 1950", "Japan", "Lima", "sailor"),
    ("Cé Zoë", "28 December 2000", "Chile", "New York", "poet"),
    *((f"Person {i}", f"{i % 28 + 1} June {1950 + i % 51}", "Peru", f"City {i}", f"job {i % 7}")
      for i in range(2000)),
]  # fmt: skip
COLUMNS = ("name", "birth_date", "birth_place", "current_address", "occupation")


def write_people(path, rows=PEOPLE, columns=COLUMNS, fingerprint="abc123"):
    with duckdb.connect(str(path)) as connection:
        kinds = ", ".join('"' + column.replace('"', '""') + '" VARCHAR' for column in columns)
        connection.execute(f"CREATE TABLE people ({kinds})")
        marks = ", ".join(["unnest(?::VARCHAR[])"] * len(columns))
        values = [list(column) for column in zip(*rows, strict=True)]
        connection.execute(f"INSERT INTO people SELECT {marks}", values)
        connection.execute("CREATE TABLE meta (key VARCHAR, value VARCHAR)")
        connection.execute("INSERT INTO meta VALUES ('fingerprint', ?)", [fingerprint])
    return path
