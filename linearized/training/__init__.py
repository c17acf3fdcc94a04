"""From text to trained parameters: corpus, tokenizer, blocks, objectives, optimizer."""
