"""Tools named in a recipe: opened in order, refused by their place."""

import pytest

from toolmem.errors import ToolmemError
from toolmem.tools import Answer, Calculator, SqlTool, check_tools, open_toolbox


class Echo:
    """Says what it is asked, so many times."""

    name = "echo"

    def __init__(self, times: int = 1):
        self.times = times

    def accepts(self, query):
        return query.startswith("ECHO ")

    async def call(self, query):
        return Answer(query[5:] * self.times, False, 0.0)

    def close(self):
        pass


def spec(**init_args):
    return {"class_path": f"{__name__}.Echo", "init_args": init_args}


def test_default_and_own(factbase):
    with open_toolbox(None, factbase) as toolbox:
        assert [type(tool) for tool in toolbox.tools] == [SqlTool, Calculator]
        assert toolbox.call_many(["CALCULATE 2 + 3"])[0].text == "5"
        assert toolbox.call_many(["ECHO a"])[0].error
    mine = [spec(times=2), {"class_path": "toolmem.tools.SqlTool", "init_args": {"max_rows": 3}}]
    with open_toolbox(mine, factbase) as toolbox:
        assert toolbox.call_many(["ECHO ab"])[0].text == "abab"
        assert toolbox.tools[1].max_rows == 3 and toolbox.tools[1].path == factbase


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "tools is empty"),
        ([{"path": "x"}], r"tools\[0\] is .*write class_path"),
        ([{"class_path": "toolmem.tools.SqlTol"}], r"tools\[0\]: cannot import"),
        ([{"class_path": "toolmem.tools.Answer"}], "is no tool: it has no accepts"),
        ([spec(), spec(time=1)], r"tools\[1\]\.time: Echo takes no such option; it takes times"),
    ],
)
def test_refusals(specs, message, factbase):
    with pytest.raises(ToolmemError, match=message):
        open_toolbox(specs, factbase)


def test_checking_builds_nothing():
    check_tools(None)
    check_tools([{"class_path": "toolmem.tools.SqlTool", "init_args": {"path": "nowhere.duckdb"}}])
