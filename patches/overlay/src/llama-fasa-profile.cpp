#include "llama-fasa-profile.h"

#include "ggml-cpp.h"
#include "llama-fasa-chooser.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <stdexcept>

const char * llama_fasa_select_name(llama_fasa_select_type select) {
    switch (select) {
        case LLAMA_FASA_SELECT_TYPE_GROUP: return "group";
        case LLAMA_FASA_SELECT_TYPE_HEAD:  return "head";
        case LLAMA_FASA_SELECT_TYPE_COUNT: break;
    }
    return nullptr;
}

static constexpr uint32_t FASA_VERSION   = 2;
static constexpr uint32_t FASA_MAX_BATCH = 64;

static constexpr uint32_t FASA_EXACT_MAX_BATCH = 16;   // without a profile that says
static constexpr uint32_t FASA_PROMPT_MASS     = 1000; // the same: all of it
static constexpr uint32_t FASA_BUDGET_CTX      = 4096; // the same

//
// geometry
//

llama_fasa_layer llama_fasa_model_layer(const llama_model & model, int32_t il) {
    const auto & hparams = model.hparams;

    // MLA caches one compressed row for all heads, recurrent layers none, shared layers read another layer's cache,
    // DFlash writes its keys outside of build_attn, where no tips are stored
    const bool has_heads = hparams.has_kv(il) && !hparams.is_recr(il) && !hparams.is_mla() && model.arch != LLM_ARCH_DFLASH;

    llama_fasa_layer layer = {};

    layer.n_head      = hparams.n_head(il);
    layer.n_head_kv   = has_heads ? hparams.n_head_kv(il) : 0;
    layer.n_embd_head = hparams.n_embd_head_k(il);
    layer.n_rot       = hparams.has_rope(il) ? hparams.n_rot(il) : 0;
    layer.rope_type   = hparams.use_alibi ? LLAMA_ROPE_TYPE_NONE : hparams.rope_type; // Baichuan 13B has the type of 7B
    layer.is_swa      = hparams.is_swa(il);

    return layer;
}

bool llama_fasa_chunk_dims(const llama_fasa_layer * layer, int32_t chunk, int32_t dims[2]) {
    // M-RoPE takes the angle of each plane from one of several positions, but turns the planes of NEOX
    const bool is_neox = layer->rope_type == LLAMA_ROPE_TYPE_NEOX || layer->rope_type == LLAMA_ROPE_TYPE_MROPE ||
                         layer->rope_type == LLAMA_ROPE_TYPE_IMROPE;

    if (!is_neox && layer->rope_type != LLAMA_ROPE_TYPE_NORM) {
        return false;
    }
    if (layer->n_rot < 0 || layer->n_rot > layer->n_embd_head || layer->n_rot % 2 != 0) {
        return false;
    }
    if (chunk < 0 || chunk >= layer->n_embd_head/2) {
        return false;
    }

    if (is_neox && chunk < layer->n_rot/2) {
        dims[0] = chunk;
        dims[1] = chunk + layer->n_rot/2;
    } else {
        dims[0] = 2*chunk;
        dims[1] = 2*chunk + 1;
    }
    return true;
}

std::string llama_fasa_model_fingerprint(const llama_model & model) {
    std::string res = format("%s rope=%d", llm_arch_name(model.arch), (int) model.hparams.rope_type);

    // runs of equal layers: <first>-<last>:<query heads>/<KV heads>x<head size>r<rotated dims>[w]
    const int32_t n_layer = model.hparams.n_layer_all;
    for (int32_t il = 0, first = 0; il < n_layer; ++il) {
        const auto describe = [&](int32_t i) {
            const auto layer = llama_fasa_model_layer(model, i);
            return format("%d/%dx%dr%d%s", layer.n_head, layer.n_head_kv, layer.n_embd_head, layer.n_rot, layer.is_swa ? "w" : "");
        };
        if (il + 1 == n_layer || describe(il + 1) != describe(first)) {
            res += format(" %d-%d:%s", first, il, describe(first).c_str());
            first = il + 1;
        }
    }

    return res;
}

//
// settings
//

int64_t llama_fasa_n_fac(const llama_fasa_params & params, int64_t n_kv) {
    const double growth = params.budget_ctx ? std::sqrt(std::max(1.0, (double) n_kv/params.budget_ctx)) : 1.0;
    return std::min<int64_t>(params.budget*growth, n_kv);
}

int64_t llama_fasa_n_twice(const llama_fasa_params & params) {
    const double twice  = 2.0*params.budget;
    const double growth = params.budget_ctx ? std::max(1.0, twice/params.budget_ctx) : 1.0;
    return std::min<double>(std::ceil(twice*growth), INT32_MAX);
}

void llama_fasa_params_validate(const llama_fasa_params & params) {
    if (params.budget < 1 || params.budget > INT32_MAX) {
        throw std::runtime_error(format("fasa.budget = %u is out of range: it must be from 1 to %d", params.budget, INT32_MAX));
    }
    if (uint64_t(params.n_sink) + params.n_recent > params.budget) {
        throw std::runtime_error(format("fasa.n_sink = %u and fasa.n_recent = %u do not fit into fasa.budget = %u: raise the budget or lower them",
                params.n_sink, params.n_recent, params.budget));
    }
    const auto check_count = [](const char * key, uint32_t value) {
        if (value > INT32_MAX) {
            throw std::runtime_error(format("%s = %u is out of range: it must be from 0 to %d", key, value, INT32_MAX));
        }
    };
    check_count("fasa.budget_ctx",     params.budget_ctx);
    check_count("fasa.min_ctx",        params.min_ctx);
    check_count("fasa.n_dense_layers", params.n_dense_layers);
    if (params.max_batch < 1 || params.max_batch > FASA_MAX_BATCH) {
        throw std::runtime_error(format("fasa.max_batch = %u is out of range: it must be from 1 to %u", params.max_batch, FASA_MAX_BATCH));
    }
    if (params.prompt_mass < 1 || params.prompt_mass > FASA_PROMPT_MASS) {
        throw std::runtime_error(format("fasa.prompt_mass = %u is out of range: it must be from 1 to %u", params.prompt_mass, FASA_PROMPT_MASS));
    }
    if (!llama_fasa_select_name(params.select)) {
        throw std::runtime_error(format("fasa.select = %d is out of range: it must be from 0 to %d", (int) params.select, LLAMA_FASA_SELECT_TYPE_COUNT - 1));
    }
    if (!llama_fasa_chooser_name(params.policy)) {
        throw std::runtime_error(format("fasa.policy = %d is unknown: 0 is FASA, others take libllama-fasa-eval (llama-fasa-eval.h)", params.policy));
    }
}

//
// metadata
//

namespace {

// reads scalars from the metadata, or from the override of the same name
class fasa_reader {
public:
    fasa_reader(const gguf_context * metadata, const llama_fasa_overrides & overrides) : metadata(metadata), overrides(overrides) {}

    // of ours, whatever they are
    bool has_keys() const {
        for (int64_t i = 0; i < gguf_get_n_kv(metadata); ++i) {
            if (std::strncmp(gguf_get_key(metadata, i), "fasa.", 5) == 0) {
                return true;
            }
        }
        return false;
    }

    // whatever the state of the metadata
    bool is_ignored() {
        known.insert("fasa.version");
        const auto it = overrides.find("fasa.version");
        return it != overrides.end() && it->second.tag == LLAMA_KV_OVERRIDE_TYPE_INT && it->second.val_i64 == 0;
    }

    void read(const char * key, uint32_t & value) {
        known.insert(key);
        const int id = find(key, GGUF_TYPE_UINT32);
        value = gguf_get_val_u32(metadata, id);
        override_uint32(key, value);
    }

    void override_uint32(const char * key, uint32_t & value) {
        known.insert(key);
        if (const auto * ovrd = find_override(key, LLAMA_KV_OVERRIDE_TYPE_INT, "int")) {
            if (ovrd->val_i64 < 0 || ovrd->val_i64 > INT32_MAX) {
                throw std::runtime_error(format("override %s = %lld is out of range: it must be from 0 to %d",
                        key, (long long) ovrd->val_i64, INT32_MAX));
            }
            value = ovrd->val_i64;
        }
    }

    void read(const char * key, bool & value) {
        value = gguf_get_val_bool(metadata, find(key, GGUF_TYPE_BOOL));
        override_bool(key, value);
    }

    // a setting that came later than the version: files may lack it
    void read_optional(const char * key, bool & value) {
        if (gguf_find_key(metadata, key) >= 0) {
            return read(key, value);
        }
        override_bool(key, value);
    }

    void read_optional(const char * key, uint32_t & value) {
        if (gguf_find_key(metadata, key) >= 0) {
            return read(key, value);
        }
        override_uint32(key, value);
    }

    void override_bool(const char * key, bool & value) {
        known.insert(key);
        if (const auto * ovrd = find_override(key, LLAMA_KV_OVERRIDE_TYPE_BOOL, "bool")) {
            value = ovrd->val_bool;
        }
    }

    // one of the names that name_of gives, which ends with nullptr
    template <typename T>
    void read_name(const char * key, T & value, const char * (*name_of)(T)) {
        if (gguf_find_key(metadata, key) >= 0) {
            value = find_name(key, str(key), name_of);
        }
        override_name(key, value, name_of);
    }

    template <typename T>
    void override_name(const char * key, T & value, const char * (*name_of)(T)) {
        known.insert(key);
        if (const auto * ovrd = find_override(key, LLAMA_KV_OVERRIDE_TYPE_STR, "str")) {
            value = find_name(key, ovrd->val_str, name_of);
        }
    }

    // who chooses: all but FASA are of a library that may not be there
    void override_policy(const char * key, int32_t & value) {
        const auto it = overrides.find(key);
        if (it != overrides.end() && !llama_fasa_chooser_name(1) && it->second.tag == LLAMA_KV_OVERRIDE_TYPE_STR && it->second.val_str != std::string("fasa")) {
            known.insert(key);
            lines += format("%s: other policies than fasa take libllama-fasa-eval, which is not loaded (llama-fasa-eval.h)\n", key);
            return;
        }
        override_name(key, value, llama_fasa_chooser_name);
    }

    // what only tools read: it cannot be overridden
    void require(const char * key, gguf_type type) const {
        find(key, type);
    }

    // likewise, a share that files may lack
    void check_share(const char * key) const {
        if (gguf_find_key(metadata, key) < 0) {
            return;
        }
        const float value = gguf_get_val_f32(metadata, find(key, GGUF_TYPE_FLOAT32));
        if (!(value >= 0.0f && value <= 1.0f)) {
            throw std::runtime_error(format("%s = %g is out of range: it must be from 0 to 1", key, value));
        }
    }

    std::string str(const char * key) const {
        return gguf_get_val_str(metadata, find(key, GGUF_TYPE_STRING));
    }

    template <typename T>
    std::vector<T> array(const char * key, gguf_type type) const {
        const int id = find(key, GGUF_TYPE_ARRAY);
        if (gguf_get_arr_type(metadata, id) != type) {
            throw std::runtime_error(format("%s is not an array of %s: convert the model again", key, gguf_type_name(type)));
        }
        const auto * data = (const T *) gguf_get_arr_data(metadata, id);
        return { data, data + gguf_get_arr_n(metadata, id) };
    }

    // overrides that nothing has read, or not as they were meant
    std::string report(const char * reason = "no such setting") {
        for (const auto & [key, ovrd] : overrides) {
            if (key.rfind("fasa.", 0) == 0 && known.find(key) == known.end()) {
                lines += key + ": " + reason + "\n";
            }
        }
        return lines;
    }

private:
    template <typename T>
    static T find_name(const char * key, const std::string & name, const char * (*name_of)(T)) {
        std::string names;
        for (int i = 0; name_of((T) i); ++i) {
            if (name == name_of((T) i)) {
                return (T) i;
            }
            names += (i > 0 ? ", " : "") + std::string(name_of((T) i));
        }
        throw std::runtime_error(format("%s = '%s' is unknown: choose from %s", key, name.c_str(), names.c_str()));
    }

    int find(const char * key, gguf_type type) const {
        const int id = gguf_find_key(metadata, key);
        if (id < 0) {
            throw std::runtime_error(format("%s is missing: convert the model again", key));
        }
        if (gguf_get_kv_type(metadata, id) != type) {
            throw std::runtime_error(format("%s has type %s, expected %s: convert the model again",
                    key, gguf_type_name(gguf_get_kv_type(metadata, id)), gguf_type_name(type)));
        }
        return id;
    }

    const llama_model_kv_override * find_override(const char * key, llama_model_kv_override_type type, const char * type_name) {
        const auto it = overrides.find(key);
        if (it == overrides.end()) {
            return nullptr;
        }
        if (it->second.tag != type) {
            lines += format("%s: must be of type %s\n", key, type_name);
            return nullptr;
        }
        return &it->second;
    }

    const gguf_context         * metadata;
    const llama_fasa_overrides & overrides;

    std::set<std::string> known;
    std::string           lines;
};

} // namespace

// the dims of the first n_tip of n_chunk ranked chunks of each KV head
static std::vector<int32_t> fasa_read_dims(const int32_t * chunks, int32_t n_chunk, uint32_t n_tip, const llama_fasa_layer & layer, int32_t il) {
    std::vector<int32_t> res;

    for (int32_t ih = 0; ih < layer.n_head_kv; ++ih, chunks += n_chunk) {
        std::vector<bool> seen(n_chunk, false);

        for (int32_t rank = 0; rank < n_chunk; ++rank) {
            const int32_t chunk = chunks[rank];

            int32_t dims[2];
            if (!llama_fasa_chunk_dims(&layer, chunk, dims) || seen[chunk]) {
                throw std::runtime_error(format("fasa.chunks: layer %d, KV head %d lists chunk %d, which is out of range or listed before: "
                        "convert the model again", il, ih, chunk));
            }
            seen[chunk] = true;

            if (rank < (int32_t) n_tip) {
                res.insert(res.end(), { dims[0], dims[1] });
            }
        }
    }

    return res;
}

// centres and steps of the same dims; of the ranked chunks two centres and a step each
static std::vector<float> fasa_read_ranges(const float * centres, const float * steps, int32_t n_chunk, uint32_t n_tip, int32_t n_head_kv) {
    std::vector<float> res;

    for (int32_t ih = 0; ih < n_head_kv; ++ih, centres += 2*n_chunk, steps += n_chunk) {
        res.insert(res.end(), centres, centres + 2*n_tip);
        for (uint32_t rank = 0; rank < n_tip; ++rank) {
            res.insert(res.end(), 2, steps[rank]);
        }
    }

    return res;
}

std::shared_ptr<const llama_fasa_profile> llama_fasa_profile::load(const gguf_context * metadata, const llama_fasa_overrides & overrides, const llama_model & model) {
    fasa_reader reader(metadata, overrides);

    auto res = std::make_shared<llama_fasa_profile>();

    if (reader.is_ignored() || !reader.has_keys()) {
        res->has_chunks = false;
        res->dims.resize(model.hparams.n_layer_all);
        res->ranges.resize(model.hparams.n_layer_all);
        res->params.budget      = 1; // none is used, but all settings are valid ones
        res->params.budget_ctx  = FASA_BUDGET_CTX;
        res->params.max_batch   = FASA_EXACT_MAX_BATCH;
        res->params.prompt_mass = FASA_PROMPT_MASS;
        reader.override_bool("fasa.exact", res->params.exact);

        if (!reader.is_ignored()) { // else a profile may come from another file, and they are for that
            res->override_report = reader.report("there is no FASA profile");
        }
        if (!res->override_report.empty()) {
            LLAMA_LOG_WARN("%s: overrides without effect:\n%s", __func__, res->override_report.c_str());
        }
        return res->params.exact ? res : nullptr;
    }

    uint32_t version;
    reader.read("fasa.version", version);
    if (version != FASA_VERSION) {
        throw std::runtime_error(format("fasa.version = %u is not supported, this library reads version %u: convert the model again, or ignore the profile with --override-kv fasa.version=int:0", version, FASA_VERSION));
    }

    const std::string fingerprint = llama_fasa_model_fingerprint(model);
    if (reader.str("fasa.fingerprint") != fingerprint) {
        throw std::runtime_error(format("the FASA profile was made for another model: fasa.fingerprint is '%s', this model is '%s'; convert it, or ignore the profile with --override-kv fasa.version=int:0",
                reader.str("fasa.fingerprint").c_str(), fingerprint.c_str()));
    }

    auto & params = res->params;
    reader.read("fasa.enabled",        params.enabled);
    reader.read_optional("fasa.exact", params.exact);
    reader.read("fasa.budget",         params.budget);
    params.budget_ctx = FASA_BUDGET_CTX;
    reader.read_optional("fasa.budget_ctx", params.budget_ctx);
    reader.read("fasa.n_sink",         params.n_sink);
    reader.read("fasa.n_recent",       params.n_recent);
    reader.read("fasa.min_ctx",        params.min_ctx);
    reader.read("fasa.max_batch",      params.max_batch);
    reader.read("fasa.n_tip",          params.n_tip);
    reader.read("fasa.n_dense_layers", params.n_dense_layers);
    reader.read_name("fasa.select",    params.select, llama_fasa_select_name);
    params.prompt_mass = FASA_PROMPT_MASS;
    reader.read_optional("fasa.prompt_mass", params.prompt_mass);
    reader.override_policy("fasa.policy", params.policy);
    llama_fasa_params_validate(params);

    reader.require("fasa.calibration.text",      GGUF_TYPE_STRING);
    reader.require("fasa.calibration.tokens",    GGUF_TYPE_UINT32);
    reader.require("fasa.calibration.context",   GGUF_TYPE_UINT32);
    reader.require("fasa.calibration.top_k",     GGUF_TYPE_UINT32);
    reader.require("fasa.calibration.objective", GGUF_TYPE_STRING);
    reader.require("fasa.calibration.tool",      GGUF_TYPE_STRING);
    reader.check_share("fasa.calibration.clipped");

    const auto head_count_kv = reader.array<int32_t>("fasa.head_count_kv", GGUF_TYPE_INT32);
    const auto chunk_count   = reader.array<int32_t>("fasa.chunk_count",   GGUF_TYPE_INT32);
    const auto chunks        = reader.array<int32_t>("fasa.chunks",        GGUF_TYPE_INT32);
    const auto agreement     = reader.array<float>  ("fasa.agreement",     GGUF_TYPE_FLOAT32);
    const auto centres       = reader.array<float>  ("fasa.tip.centre",    GGUF_TYPE_FLOAT32);
    const auto steps         = reader.array<float>  ("fasa.tip.step",      GGUF_TYPE_FLOAT32);

    const int32_t n_layer = model.hparams.n_layer_all;
    if ((int32_t) head_count_kv.size() != n_layer || (int32_t) chunk_count.size() != n_layer) {
        throw std::runtime_error(format("fasa.head_count_kv has %zu entries and fasa.chunk_count %zu, the model has %d layers: convert the model again",
                head_count_kv.size(), chunk_count.size(), n_layer));
    }

    size_t offset = 0;
    for (int32_t il = 0; il < n_layer; ++il) {
        const auto    layer   = llama_fasa_model_layer(model, il);
        const int32_t n_chunk = chunk_count[il];

        res->layers.push_back(layer);

        if (head_count_kv[il] == 0) {
            if (n_chunk != 0) {
                throw std::runtime_error(format("fasa.chunk_count = %d of layer %d, whose fasa.head_count_kv is 0, must be 0: convert the model again", n_chunk, il));
            }
            res->dims.emplace_back();
            continue;
        }
        if (head_count_kv[il] != layer.n_head_kv || n_chunk != layer.n_embd_head/2) {
            throw std::runtime_error(format("fasa.head_count_kv = %d and fasa.chunk_count = %d of layer %d: the model has %d KV heads of %d chunks, convert it again",
                    head_count_kv[il], n_chunk, il, layer.n_head_kv, layer.n_embd_head/2));
        }
        if (params.n_tip < 1 || params.n_tip > (uint32_t) n_chunk) {
            throw std::runtime_error(format("fasa.n_tip = %u is out of range: a head of layer %d has %d chunks, choose 1 to %d", params.n_tip, il, n_chunk, n_chunk));
        }

        const size_t n = (size_t) layer.n_head_kv*n_chunk;
        if (chunks.size() - offset < n) {
            throw std::runtime_error(format("fasa.chunks has %zu entries, layer %d needs more: convert the model again", chunks.size(), il));
        }
        res->dims.push_back(fasa_read_dims(chunks.data() + offset, n_chunk, params.n_tip, layer, il));
        offset += n;
    }
    if (offset == 0) {
        throw std::runtime_error("fasa.head_count_kv is 0 in all layers, so none has chunks: convert the model again");
    }
    if (offset != chunks.size()) {
        throw std::runtime_error(format("fasa.chunks has %zu entries, expected %zu: convert the model again", chunks.size(), offset));
    }
    const auto check_values = [](const char * key, const std::vector<float> & values, size_t n, bool is_signed) {
        if (values.size() != n) {
            throw std::runtime_error(format("%s has %zu entries, expected %zu: convert the model again", key, values.size(), n));
        }
        if (!std::all_of(values.begin(), values.end(), [&](float value) { return std::isfinite(value) && (is_signed || value >= 0.0f); })) {
            throw std::runtime_error(format("%s holds a value that is %snot finite: convert the model again", key, is_signed ? "" : "negative or "));
        }
    };
    check_values("fasa.agreement",  agreement, chunks.size(),   true); // for tools only, but damage here tells of damage elsewhere
    check_values("fasa.tip.centre", centres,   2*chunks.size(), true);
    check_values("fasa.tip.step",   steps,     chunks.size(),   false);

    offset = 0;
    for (int32_t il = 0; il < n_layer; ++il) {
        res->ranges.push_back(fasa_read_ranges(centres.data() + 2*offset, steps.data() + offset, chunk_count[il], params.n_tip, head_count_kv[il]));
        offset += (size_t) head_count_kv[il]*chunk_count[il];
    }

    res->override_report = reader.report();
    if (!res->override_report.empty()) {
        LLAMA_LOG_WARN("%s: overrides without effect:\n%s", __func__, res->override_report.c_str());
    }

    return res;
}

std::shared_ptr<const llama_fasa_profile> llama_fasa_profile_of(const llama_model & model) {
    return std::atomic_load(&model.fasa);
}

bool llama_fasa_model_load_profile(llama_model * model, const char * path, const llama_model_kv_override * overrides) {
    try {
        const gguf_context_ptr metadata(gguf_init_from_file(path, { /*.no_alloc =*/ true, /*.ctx =*/ nullptr }));
        if (!metadata) {
            throw std::runtime_error("cannot be read as GGUF: make it again with `fasa-edge convert --profile`");
        }

        llama_fasa_overrides by_key;
        for (const auto * ovrd = overrides; ovrd && ovrd->key[0]; ++ovrd) {
            by_key.insert({ ovrd->key, *ovrd });
        }
        by_key.erase("fasa.version"); // concerns the model's own metadata

        auto profile = llama_fasa_profile::load(metadata.get(), by_key, *model);
        if (!profile || !profile->has_chunks) {
            throw std::runtime_error("holds no FASA profile: make one with `fasa-edge convert --profile`");
        }
        std::atomic_store(&model->fasa, std::shared_ptr<const llama_fasa_profile>(std::move(profile)));
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s: %s\n", __func__, path, err.what());
        return false;
    }
    return true;
}
