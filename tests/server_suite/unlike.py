"""What of upstream's tests of llama-server cannot be had with the models at hand, by name; `make docs` lists both."""

EXCLUDED: dict[str, str] = {
    "test_rerank.py::test_rerank": "the document that a trained model finds most relevant",
    "test_rerank.py::test_rerank_tei_format": "the document that a trained model finds most relevant",
    "test_basic.py::test_no_ui": "the web UI, which is not built",
    "test_security.py::test_access_static_assets_without_api_key": "the web UI, which is not built",
    "test_mcp_servers.py::test_mcp_tool_timeout": "half a second, in which Python must start, on a machine at work",
    "test_proxy.py::test_mcp_proxy": "a site on the internet, example.com",
}
"""Not run: name, and what is missing. A name stands for all parameters, or for those with what is in its brackets."""

TEXTS: tuple[str, ...] = (
    "test_basic.py::test_load_split_model",
    "test_chat_completion.py::test_chat_completion",
    "test_chat_completion.py::test_chat_completion_stream",
    "test_chat_completion.py::test_chat_completion_with_openai_library",
    "test_compat_oai_responses.py::test_responses_stream_with_openai_library",
    "test_compat_oai_responses.py::test_responses_with_openai_library",
    "test_completion.py::test_completion",
    "test_completion.py::test_completion_stream",
    "test_completion.py::test_completion_stream_with_openai_library",
    "test_completion.py::test_completion_with_openai_library",
    "test_infill.py::test_infill_with_input_extra",
    "test_infill.py::test_infill_without_input_extra",
    "test_lora.py::test_lora",
    "test_lora.py::test_lora_per_request",
    "test_slot_save.py::test_slot_erase",
    "test_slot_save.py::test_slot_save_restore",
    "test_speculative.py::test_multi_requests_parallel",
    "test_vision_api.py::test_vision_chat_completion",
    "test_vision_api.py::test_vision_completion",
)
"""Run, but what the model writes is any text, in place of one that only upstream's weights write."""
