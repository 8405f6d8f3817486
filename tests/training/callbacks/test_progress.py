import io

import pytest
from rich.console import Console
from training_toys import ToyData, make_module, make_trainer

from toolmem import console
from toolmem.training import Progress, Throughput


@pytest.fixture
def terminal(monkeypatch):
    def make(is_terminal):
        stream = io.StringIO()
        made = Console(file=stream, force_terminal=is_terminal, width=120, no_color=True)
        monkeypatch.setattr(console, "stderr", lambda: made)
        return stream

    return make


def fit(tmp_path, progress, steps=30):
    trainer = make_trainer(
        tmp_path, steps, enable_progress_bar=True, callbacks=[progress, Throughput()],
        log_every_n_steps=10,
    )  # fmt: skip
    trainer.fit(make_module(), ToyData())


def test_the_bar_shows_step_loss_speed_and_time(tmp_path, terminal):
    stream = terminal(True)
    fit(tmp_path, Progress())
    shown = stream.getvalue()
    assert "30/30" in shown and "loss" in shown and "tokens/s" in shown


def test_refreshes_seldom(tmp_path, terminal, monkeypatch):
    terminal(True)
    shown = []
    monkeypatch.setattr(Progress, "_show", lambda self, *args: shown.append(1))
    fit(tmp_path, Progress(refresh_s=0.0), steps=40)
    import time

    began = time.perf_counter()
    fit(tmp_path, Progress(refresh_s=60.0), steps=40)
    assert time.perf_counter() - began < 60
    assert len(shown) < 40
    assert Progress(refresh_s=0.0).refresh_s == 0.2


def test_without_a_terminal_plain_lines_are_written(tmp_path, terminal):
    stream = terminal(False)
    fit(tmp_path, Progress(line_s=0.0))
    lines = stream.getvalue().splitlines()
    assert any(line.startswith("step 30/30") and "loss" in line for line in lines)
    assert "\x1b" not in stream.getvalue()


def test_disabled_it_is_silent(tmp_path, terminal):
    stream = terminal(True)
    progress = Progress()
    progress.disable()
    fit(tmp_path, progress)
    assert stream.getvalue() == ""


def test_an_exception_takes_the_bar_down(tmp_path, terminal):
    terminal(True)
    progress = Progress()

    def broken(index):
        if index == 3:
            raise RuntimeError("broken")
        return make_batch(index)

    from training_toys import make_batch

    trainer = make_trainer(tmp_path, 9, enable_progress_bar=True, callbacks=[progress])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(make_module(), ToyData(broken))
    assert progress._bar is None
