import math

import pytest

from toolmem.errors import ToolmemError
from toolmem.evaluation.curves import point_path, read_points, write_point


def test_points_are_joined_by_step_and_a_file_keeps_what_others_found(tmp_path):
    write_point(tmp_path, 100, {"arc_easy/accuracy": 0.1 + 0.2})
    write_point(tmp_path, 20, {"recall, exact": 1, "loss": math.inf})
    write_point(tmp_path, 100, {"kl/mean": 2.5})
    (tmp_path / "evaluations" / "recall_step_20.jsonl").write_text("{}")
    (tmp_path / "evaluations" / ".30.csv.x.part").write_text("half")
    found = read_points(tmp_path)
    assert list(found) == [20, 100]
    assert found[20] == {"recall, exact": 1.0, "loss": math.inf}
    assert found[100] == {"arc_easy/accuracy": 0.1 + 0.2, "kl/mean": 2.5}


def test_other_columns_may_stand_beside(tmp_path):
    path = point_path(tmp_path, 7)
    path.parent.mkdir()
    path.write_text("metric,low,value,high\na/b,0.1,0.2,0.3\n")
    assert read_points(tmp_path) == {7: {"a/b": 0.2}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,age\nAnn,3\n", "no file of an evaluation"),
        ("metric,value\na,1\nb,x\n", "line 3.*'x'"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, words):
    path = point_path(tmp_path, 7)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ToolmemError, match=rf"7\.csv.*{words}"):
        read_points(tmp_path)
