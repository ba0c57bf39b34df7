// The FASA ops of the CPU backend: what ggml-cpu.c dispatches to.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

void ggml_compute_forward_fasa_store (const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_fasa_select(const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_fasa_attend(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// bytes of the shared work buffer that the op needs for n_tasks threads
size_t ggml_fasa_select_work_size(const struct ggml_tensor * dst, int n_tasks);
size_t ggml_fasa_attend_work_size(const struct ggml_tensor * dst, int n_tasks);

#ifdef __cplusplus
}
#endif
