"""``trainer.precision`` from the command line."""

import json


def test_the_command_line_trains_in_float16(tmp_path, toolmem):
    recipe = {
        "model": {
            "model": {
                "class_path": "toolmem.models.Transformer",
                "init_args": {"dim": 8, "n_layers": 1, "n_heads": 2, "max_seq_len": 128},
            },
            "optimizer": {"class_path": "toolmem.training.AdamW"},
            "schedule": {"class_path": "toolmem.training.Constant"},
        },
        "data": {
            "class_path": "toolmem.data.FactsDataModule",
            "init_args": {"people": 4, "setting": "in_weight", "batch_size": 4},
        },
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_steps": 2, "log_every_n_steps": 1,
            "limit_val_batches": 0, "precision": "16-mixed",
        },
    }  # fmt: skip
    path = tmp_path / "half.yaml"
    path.write_text(json.dumps(recipe))
    called = toolmem("fit", "--config", path, "--runs", tmp_path / "runs")
    assert called.code == 0, called.err
    header = (tmp_path / "runs" / "half" / "metrics.csv").read_text().splitlines()[0]
    assert "precision/loss_scale" in header and "precision/skipped_steps" in header
    assert "16-mixed" in (tmp_path / "runs" / "half" / "config.yaml").read_text()
