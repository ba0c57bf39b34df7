// The FASA ops in the emulator, for its ggml backend.

#pragma once

struct ggml_tensor;

// tensors lie in memory of the emulator
void simt_cuda_compute(const ggml_tensor * op);
bool simt_cuda_supported(const ggml_tensor * op);
