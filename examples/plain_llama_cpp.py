"""A program written for llama_cpp, unchanged but for its first import, which switches FASA on.

    python examples/plain_llama_cpp.py MODEL-fasa.gguf "The capital of France is"

The model must be annotated (`fasa-edge convert`), and flash attention on. Without the line, it runs as ever wherever
llama-cpp-python has a library of its own: stock llama.cpp takes the annotated model, too.
"""

import sys

import fasa_edge  # noqa: F401  the one line, above llama_cpp

import llama_cpp

llm = llama_cpp.Llama(sys.argv[1], n_ctx=4096, flash_attn=True, verbose=False)
for chunk in llm(sys.argv[2], max_tokens=64, temperature=0.0, stream=True):
    print(chunk["choices"][0]["text"], end="", flush=True)
print()
