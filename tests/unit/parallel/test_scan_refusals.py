"""What the scan over layers cannot do is refused before anything is traced."""

import pytest

from dalle_torch.parallel.copies import CopyWeights
from dalle_torch.parallel.scan import scan_layers
from tests.tiny_pipeline import tiny_model


@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_is_refused_by_name(option):
    model = tiny_model(**{option: 0.1}).train()
    with pytest.raises(
        ValueError, match=r"use_scan=true is not for models with dropout, and this one has it in \w"
    ) as error:
        scan_layers([model.encoder, model.decoder], None, lambda tensor: (), CopyWeights(None, lambda tensor: ()))
    assert "training.use_scan to false" in str(error.value)


def test_a_model_without_dropout_is_taken():
    model = tiny_model(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0).train()
    scan_layers([model.encoder, model.decoder], None, lambda tensor: (), CopyWeights(None, lambda tensor: ()))
    assert model.encoder.run_layers is not None
