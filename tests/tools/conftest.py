"""A small DuckDB file with people."""

import pytest
from people_file import write_people


@pytest.fixture(scope="session")
def factbase(tmp_path_factory):
    return write_people(tmp_path_factory.mktemp("facts") / "people.duckdb")
