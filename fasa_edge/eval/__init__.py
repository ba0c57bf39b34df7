"""Quality of sparse decoding against dense attention, measured on the patched llama.cpp itself (``fasa-edge eval``)."""
