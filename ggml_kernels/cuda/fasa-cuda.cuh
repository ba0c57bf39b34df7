// What ggml-cuda dispatches to.

#pragma once

#include "ggml-cuda/common.cuh"

void ggml_cuda_fasa_store (ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_fasa_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_fasa_attend(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// of any of the three ops
bool ggml_cuda_fasa_supported(int device, const ggml_tensor * dst);
