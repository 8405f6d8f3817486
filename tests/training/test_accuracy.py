"""The share of right answers in validation, where the data asks for it."""

import pytest
import torch
from training_toys import ToyData, make_batch, make_module, make_trainer, tiny

from toolmem.data import MADDataModule
from toolmem.models import Transformer
from toolmem.training import AdamW, Constant


class Asking(ToyData):
    wants_accuracy = True


def test_accuracy_counts_every_asked_token_once(tmp_path):
    model = tiny()
    module = make_module(model)
    (measured,) = make_trainer(tmp_path).validate(module, Asking(), verbose=False)
    right = asked = 0
    with torch.no_grad():
        for index in range(1000, 1003):
            batch = make_batch(index)
            for row in range(len(batch.tokens)):
                answers = model(batch.tokens[row : row + 1])[0].argmax(-1)
                for place in batch.loss_mask[row].nonzero().flatten():
                    right += int(answers[place] == batch.targets[row, place])
                    asked += 1
    assert measured["val/accuracy"] == pytest.approx(right / asked)
    assert set(make_trainer(tmp_path).validate(module, ToyData(), verbose=False)[0]) == {"val/loss"}


def test_a_dictionary_is_memorised(tmp_path):
    data = MADDataModule("memorization", vocab_size=33, seq_len=32, batch_size=16, val_batches=4)
    torch.manual_seed(0)
    model = Transformer(33, 16, 1, 2, max_seq_len=32)
    module = make_module(model, optimizer=AdamW(lr=1e-2), schedule=Constant())
    trainer = make_trainer(tmp_path, 120, val_check_interval=120)
    trainer.fit(module, data)
    assert module.reported["val/accuracy"][0] == 120
    assert module.reported["val/accuracy"][1] > 0.98
