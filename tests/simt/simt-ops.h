// The FASA ops in the emulator, for its ggml backend. Tensors lie in memory of the emulator.

#pragma once

struct ggml_tensor;

void simt_cuda_compute (const ggml_tensor * op);
void simt_metal_compute(const ggml_tensor * op);
