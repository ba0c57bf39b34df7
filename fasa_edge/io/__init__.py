"""Files: GGUF headers and copies, texts, figures, and outputs that are whole or not there."""
