"""What a file may have imported: nothing of an untrusted package runs, whatever the file looks like."""

from __future__ import annotations

import sys

import pytest

import toolmem
from toolmem import class_path, models
from toolmem.class_path import allowed_packages, construct, import_class, only_packages, path_of
from toolmem.errors import ToolmemError

MODULE = """
import pathlib
pathlib.Path(__file__).with_suffix(".ran").touch()

class Made:
    def __init__(self, width: int = 1):
        self.width = width

def function(): ...
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A package that nothing trusts; it leaves a file when it runs."""
    (tmp_path / "stranger.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(class_path, "_allowed", ())
    yield lambda: (tmp_path / "stranger.ran").exists()
    sys.modules.pop("stranger", None)


def test_an_untrusted_package_is_not_imported(stranger):
    for name in ("stranger.Made", "stranger.deep.Made", "stranger.function", ".stranger.Made"):
        with pytest.raises(ToolmemError, match=r"model\.model: .* is not imported"):
            import_class(name, "model.model")
    with pytest.raises(ToolmemError, match=r"allow it: --allow_packages stranger \(in Python"):
        construct("stranger.Made", {}, {}, "key")
    assert not stranger() and "stranger" not in sys.modules


def test_an_allowed_package_is(stranger):
    toolmem.allow_packages("other", "stranger")
    assert construct("stranger.Made", {"width": 3}, {}, "key").width == 3
    assert stranger() and allowed_packages() == ("other", "stranger")


def test_what_the_program_has_imported_itself_is_taken(stranger):
    import stranger as own

    assert import_class("stranger.Made", "key") is own.Made
    with only_packages([]), pytest.raises(ToolmemError, match=r"allow_packages stranger$"):
        import_class("stranger.Made", "key")
    with only_packages(["stranger"]):
        assert import_class("stranger.Made", "key") is own.Made
    assert allowed_packages() == ()


def test_a_class_is_looked_at_before_it_is_called():
    """``subprocess`` is imported by now: its classes are still not of the kind."""
    import subprocess  # noqa: F401
    from unittest.mock import patch

    with patch("subprocess.Popen.__init__") as started:
        for kind in (models.LanguageModel, dict):
            with pytest.raises(ToolmemError, match=r"subprocess\.Popen is not a "):
                construct("subprocess.Popen", {"args": ["true"]}, {}, "key", kind)
    assert not started.called
    for path in ("os.system", "toolmem.class_path.construct", "torch.relu"):
        with pytest.raises(ToolmemError, match="is not a class"):
            import_class(path, "key")


def test_a_trusted_module_lends_no_others_classes():
    with only_packages([]):
        for path in ("toolmem.files.Path", "toolmem.data.text.documents.Any", "torch.os.PathLike"):
            with pytest.raises(ToolmemError):
                import_class(path, "key")
        assert import_class("toolmem.models.Hybrid", "key", models.LanguageModel) is models.Hybrid


def test_names_of_packages():
    for name in ("", "a.b", "a b", "../a", "jsonargparse"):
        with pytest.raises(ToolmemError, match="is not the name of a package"):
            toolmem.allow_packages(name)


def test_paths_of_classes():
    assert path_of(models.Transformer) == "toolmem.models.Transformer"
    assert path_of(ToolmemError) == "toolmem.ToolmemError"
