"""What to do about a text that a context has no room for."""

from __future__ import annotations

from math import ceil

from fasa_edge.runtime.fit import N_CTX_STEP
from fasa_edge.runtime.library import llama_cpp


def remedies(llm: llama_cpp.Llama, text: str, n_text: int, n_besides: int) -> list[str]:
    """Say what would fit, with numbers; a larger context only as far as the model was trained.

    Args:
        llm: the model.
        text: what the text is called, as "the prompt".
        n_text: tokens of it.
        n_besides: tokens that have to fit beside it.

    Returns:
        Imperatives, to be joined by "or".
    """
    n_ctx, n_train = llm.n_ctx(), llama_cpp.llama_model_n_ctx_train(llm.model)
    n_fits, needed = n_ctx - n_besides, n_text + n_besides
    res = []
    if 0 < n_fits < n_text:
        res += [f"shorten {text} to {n_fits} tokens", f"split it into {ceil(n_text / n_fits)} parts"]
    if needed <= n_train:
        n_ctx = ceil(needed / N_CTX_STEP) * N_CTX_STEP
        res.append(f"raise the context to {n_ctx} tokens (-c {n_ctx}): the model was trained for {n_train}")
    elif n_ctx < n_train and n_train > n_besides:
        res.append(
            f"shorten it to {n_train - n_besides} and raise the context to the {n_train} tokens that the model was "
            f"trained for (-c {n_train}), no further"
        )
    else:
        res.append(f"take a model trained for more than the {n_train} tokens of this one (n_ctx_train)")
    return res
