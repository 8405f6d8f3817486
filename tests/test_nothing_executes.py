"""No file that toolmem reads can make it run code: what could do so is nowhere in its source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "toolmem"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Modules that make objects, and so calls, out of bytes.
UNPICKLERS = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "jsonpickle",
}
# Calls that run what they are given, or make it into objects, by their whole name.
RUNNERS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.spawnv",
    "runpy.run_path", "runpy.run_module", "code.interact", "torch.hub.load",
    "torch.utils.model_zoo.load_url", "torch.hub.load_state_dict_from_url",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all",
    "pandas.read_pickle", "pd.read_pickle", "pl_load", "torch.package.PackageImporter",
}  # fmt: skip
# Who may import what is not written in the source, and why that is no file's choice.
IMPORTERS = {
    "_lazy.py": "names of the package's own tables",
    "class_path.py": "after check_trusted",
    "cli/__init__.py": "names of the table of commands",
    "cli/functions.py": "a module that jsonargparse has imported, after its allow-list",
    "cli/inspect.py": "a name in the source",
    "analysis/page.py": "modules of toolmem.analysis alone",
    "models/flash.py": "a name in the source",
}
# Jinja outside the sandbox: the template is the package's own, and what is filled in is escaped.
OWN_TEMPLATES = {"analysis/report.py", "analysis/circuits/page.py"}
# Objects go between the processes of one run alone; torch pickles them.
BETWEEN_RANKS = {
    "data/modules/text.py": "where each rank's stream stands, plain data",
    "training/random_state.py": "each rank's random numbers",
}


def name_of(node: ast.AST) -> str:
    """``a.b.c`` of an expression that is one; else ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = name_of(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def is_true(call: ast.Call, option: str) -> bool:
    given = [keyword.value for keyword in call.keywords if keyword.arg == option]
    return bool(given) and isinstance(given[0], ast.Constant) and given[0].value is True


def findings(source: str, place: str) -> list[str]:
    """What in a source could run a file's code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        found += [f"{line}: import {m}" for m in modules if m.partition(".")[0] in UNPICKLERS]
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        last = name.rpartition(".")[2]
        if name in RUNNERS:
            found.append(f"{line}: {name}()")
        if (
            name in ("torch.load", "load")
            and place != "cli/demo.py"
            and not is_true(node, "weights_only")
        ):
            found += [f"{line}: {name}() without weights_only=True"] if name == "torch.load" else []
        if name in ("np.load", "numpy.load") and any(
            k.arg == "allow_pickle" for k in node.keywords
        ):
            found.append(f"{line}: {name}(allow_pickle)")
        if is_true(node, "shell"):
            found.append(f"{line}: {name}(shell=True)")
        if is_true(node, "trust_remote_code"):
            found.append(f"{line}: {name}(trust_remote_code=True)")
        if last == "import_module" and place not in IMPORTERS:
            found.append(f"{line}: import_module() of what is not in the source")
        objects = (
            "all_gather_object",
            "gather_object",
            "broadcast_object_list",
            "scatter_object_list",
        )
        if last in objects and place not in BETWEEN_RANKS:
            found.append(f"{line}: {last}()")
        jinja = "jinja2" in source and last in ("Environment", "NativeEnvironment")
        if jinja and place not in OWN_TEMPLATES:
            found.append(f"{line}: {name}() outside the sandbox")
    return found


def test_the_source_has_nothing_that_runs_files():
    assert len(SOURCES) > 100
    found = {}
    for path in SOURCES:
        place = path.relative_to(PACKAGE).as_posix()
        if lines := findings(path.read_text(encoding="utf-8"), place):
            found[place] = lines
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import torch\ntorch.load('x', weights_only=flag)",
        "np.load('x', allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "exec(text)",
        "os.system('true')",
        "subprocess.run(text, shell=True)",
        "importlib.import_module(name)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "import jinja2\njinja2.Environment()",
        "dist.all_gather_object(a, b)",
    ],
)
def test_the_look_finds_what_it_looks_for(source):
    assert findings(source, "somewhere.py")


def test_what_is_plain_is_not_found():
    plain = "import torch\ntorch.load(p, weights_only=True)\nmodel.eval()\nyaml.safe_load(t)\nre.compile(x)"
    assert not findings(plain, "somewhere.py")


def test_exceptions_are_still_needed():
    """An exception that nothing needs any more goes."""
    for places in (IMPORTERS, OWN_TEMPLATES, BETWEEN_RANKS):
        for place in places:
            assert findings((PACKAGE / place).read_text(encoding="utf-8"), "x.py"), place


def test_a_checkpoint_with_code_is_refused(tmp_path):
    """Written by hand with pickle, as an attacker would; ``torch.load`` must not call what is in it."""
    import os
    import pickle
    import zipfile

    import torch

    from toolmem import checkpoints
    from toolmem.errors import ToolmemError

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"state_dict": {}, "toolmem": Harm()}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Harm()))
    with zipfile.ZipFile(tmp_path / "c.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"toolmem": Harm()}))
        archive.writestr("archive/version", "3\n")
    for name in ("a.ckpt", "b.ckpt", "c.ckpt"):
        with pytest.raises(ToolmemError, match=f"{name} cannot be read as a checkpoint"):
            checkpoints.load(tmp_path / name)
    assert not (tmp_path / "harm").exists()
