// What ggml-cuda dispatches to.

#pragma once

#include "ggml-cuda/common.cuh"

void ggml_cuda_fasa_store (ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_fasa_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_fasa_attend(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// computes node i of the graph together with those that follow, if that is one launch; returns how many these are
int ggml_cuda_fasa_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i);

// of any of the three ops
bool ggml_cuda_fasa_supported(int device, const ggml_tensor * dst);

// GB/s of a device's memory by its data sheet
float ggml_cuda_fasa_bandwidth(int device);
