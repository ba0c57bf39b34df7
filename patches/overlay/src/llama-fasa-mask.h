#pragma once

struct ggml_tensor;
struct llama_ubatch;
class  llama_kv_cache;

// Fills the causal mask of a batch by ranges of cells instead of cell by cell: at 131,072 cells that takes longer than to attend
// to the chosen ones on a GPU. false: not filled, since a stream holds more than the one sequence of its tokens, or has holes.
//   mask: F16 or F32 [n_kv, n_tokens/n_stream, 1, n_stream], in host memory; as llama_kv_cache::set_input_kq_mask fills it
bool llama_fasa_set_mask(const llama_kv_cache & kv, ggml_tensor * mask, const llama_ubatch & ubatch);
