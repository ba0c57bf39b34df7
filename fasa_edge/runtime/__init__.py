"""The patched llama.cpp: found, checked, mirrored by ctypes, and driven."""
