#pragma once

#include "ggml-backend.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

struct llama_context;
struct llama_model;
class  llama_kv_cache;

// What follows from the K of a llama_kv_cache and is kept beside it. The cache owns its listener, tells it which cells' K
// changed otherwise than by the graph of a batch (K-shift, stream copies, restored states), and has it catch up.
class llama_kv_cache_listener {
public:
    virtual ~llama_kv_cache_listener() = default;

    // all data became zero
    virtual void on_clear() = 0;

    // K of these cells changed, or is about to
    virtual void on_change(uint32_t stream, const std::vector<uint32_t> & cells) = 0;

    // a memory update begins: whether there is something to catch up with now; it may let some pass
    virtual bool begin_update() = 0;

    // the last part of a memory update; true: it has caught up
    virtual bool update(llama_context * lctx) = 0;

    // adds the memory that it takes
    virtual void memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & res) const = 0;
};

// of a cache that has just been made; nullptr: nobody listens
std::unique_ptr<llama_kv_cache_listener> llama_fasa_make_listener(const llama_model & model, const llama_kv_cache & kv, bool v_trans);
