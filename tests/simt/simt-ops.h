// The FASA ops in the emulator, for its ggml backend. Tensors lie in memory of the emulator.

#pragma once

struct ggml_tensor;

void simt_cuda_compute (const ggml_tensor * op);
// two ops in one launch (ggml-fasa/gpu/fasa-fuse.h): SET_ROWS and FASA_STORE, FASA_SELECT and FASA_ATTEND; false: not on this device
bool simt_cuda_compute_both(const ggml_tensor * first, const ggml_tensor * second);

void simt_metal_compute(const ggml_tensor * op);
