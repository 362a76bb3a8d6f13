"""Text to token ids and back: the tokenizer of a corpus, and faster libraries that give the same ids."""
