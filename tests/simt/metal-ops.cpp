// The FASA ops by the very Metal kernels, in the emulator: they are encoded by the code that encodes them for a GPU, for a
// stand-in of ggml-metal's wrapper of Metal's API.
//
// Dispatches run when a barrier comes, in any order, as a concurrent encoder may run them.

#include "simt-ops.h"
#include "simt.h"

#include "ggml-fasa/metal/fasa-metal.h"

#include "ggml-impl.h"

#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "fasa.metal" // all in one, in the build folder

#undef kernel
#undef device
#undef constant
#undef threadgroup
#undef thread

static constexpr size_t MAX_THREADGROUP_MEMORY = 32*1024;

namespace {

struct dispatch {
    const char *       name = nullptr;
    const struct entry * run = nullptr;
    std::vector<char>  bytes;
    std::map<int, char *> buffers;
    size_t             n_shared = 0;
    simt::index3       n_groups;
    unsigned           n_threads = 0;
};

// a kernel with the arguments of a dispatch: its structure, then buffers by their index, memory of the threadgroup, its place
struct entry {
    std::function<void(const dispatch &)> call;
};

template <typename A, typename... P, size_t... I>
entry make_entry(void (* function)(A &, P...), std::index_sequence<I...>) {
    using types = std::tuple<P...>;
    return { [function](const dispatch & d) {
        const unsigned i = simt::thread_index.x;
        GGML_ASSERT(d.bytes.size() == sizeof(A));
        const auto pointer = [&](int index) { return index < (int) sizeof...(I) ? d.buffers.at(index) : (char *) simt::shared_memory(); };
        A args;
        memcpy(&args, d.bytes.data(), sizeof(A));
        function(args, (std::tuple_element_t<I, types>) pointer(I + 1)...,
            metal::uint3 { simt::block_index.x, simt::block_index.y, simt::block_index.z }, i, i % simt::WARP, i / simt::WARP);
    } };
}

// all parameters but the first are pointers, but for the last four
template <typename A, typename... P>
entry make_entry(void (* function)(A &, P...)) {
    return make_entry(function, std::make_index_sequence<sizeof...(P) - 4>());
}

const std::map<std::string, entry> entries = {
    { "kernel_fasa_store",      make_entry(kernel_fasa_store) },
    { "kernel_fasa_stats",      make_entry(kernel_fasa_stats) },
    { "kernel_fasa_keys",       make_entry(kernel_fasa_keys) },
    { "kernel_fasa_mark",       make_entry(kernel_fasa_mark) },
    { "kernel_fasa_list",       make_entry(kernel_fasa_list) },
    { "kernel_fasa_split_8_1",  make_entry(kernel_fasa_split< 8, 1>) },
    { "kernel_fasa_split_8_4",  make_entry(kernel_fasa_split< 8, 4>) },
    { "kernel_fasa_split_16_1", make_entry(kernel_fasa_split<16, 1>) },
    { "kernel_fasa_split_16_4", make_entry(kernel_fasa_split<16, 4>) },
    { "kernel_fasa_split_32_1", make_entry(kernel_fasa_split<32, 1>) },
    { "kernel_fasa_split_32_4", make_entry(kernel_fasa_split<32, 4>) },
    { "kernel_fasa_combine",    make_entry(kernel_fasa_combine) },
};

void run(const dispatch & d) {
    simt::launch(d.name, d.n_groups, d.n_threads, d.n_shared, [&] { d.run->call(d); });
}

} // namespace

//
// of ggml-metal-device.h, what is used
//

struct ggml_metal_encoder {
    dispatch              next;
    std::vector<dispatch> waiting;
    std::mt19937          rng { 1 };

    void barrier() {
        std::shuffle(waiting.begin(), waiting.end(), rng);
        for (const dispatch & d : waiting) {
            run(d);
        }
        waiting.clear();
    }
};

static ggml_metal_pipeline_with_params find_pipeline(const char * name) {
    const auto found = entries.find(name);
    GGML_ASSERT(found != entries.end() && "no kernel of this name");
    ggml_metal_pipeline_with_params res = {};
    res.pipeline = (ggml_metal_pipeline_t) &*found;
    return res;
}

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t, const char *) { return {}; }

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t, const char * base, const char *, ggml_metal_cv_t) {
    return find_pipeline(base);
}

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) { return 1024; }

ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t, const ggml_tensor * t) { return { nullptr, (size_t) t->data }; }

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t enc, ggml_metal_pipeline_with_params pipeline) {
    const auto & found = *(const std::pair<const std::string, entry> *) pipeline.pipeline;
    enc->next = {};
    enc->next.name = found.first.c_str();
    enc->next.run  = &found.second;
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t enc, void * data, size_t size, int idx) {
    GGML_ASSERT(idx == 0);
    enc->next.bytes.assign((char *) data, (char *) data + size);
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t enc, ggml_metal_buffer_id buffer, int idx) {
    GGML_ASSERT(buffer.offs % 4 == 0);
    enc->next.buffers[idx] = (char *) buffer.offs;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t enc, size_t size, int idx) {
    GGML_ASSERT(idx == 0 && size % 16 == 0 && size <= MAX_THREADGROUP_MEMORY);
    enc->next.n_shared = size;
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t enc, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    GGML_ASSERT(tg0 > 0 && tg1 > 0 && tg2 == 1 && tptg1 == 1 && tptg2 == 1);
    enc->next.n_groups  = simt::index3(tg0, tg1);
    enc->next.n_threads = tptg0;
    enc->waiting.push_back(enc->next);
}

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t enc) { enc->barrier(); }

//
// for the emulator's backend
//

void simt_metal_compute(const ggml_tensor * op) {
    ggml_metal_encoder enc;
    ggml_metal_fasa_encode(nullptr, &enc, op);
    enc.barrier();
}
