// What ggml-metal calls: which ops the kernels handle, the memory that they need behind their result, and their dispatches.

#pragma once

#include "ggml-metal/ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

// of any of the three ops
bool ggml_metal_fasa_supported(const struct ggml_tensor * op);

// bytes behind the op's own, from one dispatch to the next
size_t ggml_metal_fasa_extra(const struct ggml_tensor * op);

void ggml_metal_fasa_encode(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
