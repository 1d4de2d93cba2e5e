"""How good pictures are: measures and the networks behind them, over pictures, texts and tensors alone."""
