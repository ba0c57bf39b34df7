// A ggml backend with a device for each GPU language, which runs the FASA ops by the emulator and all others by the CPU
// backend, so that test-backend-ops, and models, run on it as on any GPU. GGML_BACKEND_PATH=.../fasa-simt.so loads it.

#include "simt-ops.h"
#include "simt.h"

#include "ggml-fasa/gpu/fasa-fuse.h"
#include "ggml-fasa/gpu/fasa-plan.h"
#include "ggml-fasa/metal/fasa-metal.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace {

struct language {
    const char * name;
    const char * description;
    void   (* compute)(const ggml_tensor * op);
    size_t (* extra)  (const ggml_tensor * op); // bytes behind the op's own
    bool   (* compute_both)(const ggml_tensor * first, const ggml_tensor * second); // in one launch; may be none
};

const language languages[] = {
    { "SIMT-CUDA",  "the CUDA kernels, emulated on the CPU",  simt_cuda_compute,  [](const ggml_tensor *) -> size_t { return 0; }, simt_cuda_compute_both },
    { "SIMT-METAL", "the Metal kernels, emulated on the CPU", simt_metal_compute, ggml_metal_fasa_extra, nullptr },
};
constexpr size_t n_languages = sizeof(languages)/sizeof(languages[0]);

const language & language_of(ggml_backend_dev_t dev) { return *(const language *) dev->context; }

bool is_ours(const ggml_tensor * op) {
    return op->op == GGML_OP_FASA_STORE || op->op == GGML_OP_FASA_SELECT || op->op == GGML_OP_FASA_ATTEND;
}

ggml_backend_dev_t cpu() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

//
// buffers: in memory of the CPU, which nobody is told
//

const ggml_backend_buffer_i buffer_iface = {
    /* .free_buffer     = */ [](ggml_backend_buffer_t buffer) { ggml_aligned_free(buffer->context, buffer->size); },
    /* .get_base        = */ [](ggml_backend_buffer_t buffer) { return buffer->context; },
    /* .init_tensor     = */ nullptr,
    /* .memset_tensor   = */ [](ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) { memset((char *) t->data + offset, value, size); },
    /* .set_tensor      = */ [](ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) { memcpy((char *) t->data + offset, data, size); },
    /* .get_tensor      = */ [](ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) { memcpy(data, (const char *) t->data + offset, size); },
    /* .set_tensor_2d   = */ nullptr,
    /* .get_tensor_2d   = */ nullptr,
    /* .cpy_tensor      = */ nullptr,
    /* .clear           = */ [](ggml_backend_buffer_t buffer, uint8_t value) { memset(buffer->context, value, buffer->size); },
    /* .reset           = */ nullptr,
};

const ggml_backend_buffer_type_i buffer_type_iface = {
    /* .get_name       = */ [](ggml_backend_buffer_type_t buft) { return language_of(buft->device).name; },
    /* .alloc_buffer   = */ [](ggml_backend_buffer_type_t buft, size_t size) { return ggml_backend_buffer_init(buft, buffer_iface, ggml_aligned_malloc(size), size); },
    /* .get_alignment  = */ [](ggml_backend_buffer_type_t) -> size_t { return 64; },
    /* .get_max_size   = */ nullptr,
    /* .get_alloc_size = */ nullptr,
    /* .is_host        = */ nullptr,
};

//
// graphs
//

// Ops again, their tensors in memory with guards around: what none of them writes to is read-only.
class guarded_ops {
public:
    explicit guarded_ops(const language & gpu) : gpu(gpu) {}

    // a copy of an op that is computed with these
    ggml_tensor * add(const ggml_tensor * op) {
        const ggml_tensor * written = written_by(op);
        if (!memory.count(written->data)) {
            move(written, written == op ? gpu.extra(op) : 0);
        }
        results.push_back(written);

        copies.push_back(*op);
        ggml_tensor & copy = copies.back();
        copy.data = memory.at(written->data)->data();
        for (int i = 0; i < GGML_MAX_SRC; ++i) {
            if (op->src[i]) {
                if (!memory.count(op->src[i]->data)) {
                    move(op->src[i], 0)->make_read_only();
                }
                copies.push_back(*op->src[i]);
                copies.back().data = memory.at(op->src[i]->data)->data();
                copy.src[i] = &copies.back();
            }
        }
        return &copy;
    }

    void finish() {
        for (const ggml_tensor * t : results) {
            memcpy(t->data, memory.at(t->data)->data(), ggml_nbytes(t));
        }
    }

private:
    static const ggml_tensor * written_by(const ggml_tensor * op) {
        return op->op == GGML_OP_FASA_STORE ? op->src[0] : op;
    }

    simt::guarded * move(const ggml_tensor * t, size_t extra) {
        auto & to = memory[t->data];
        to.reset(new simt::guarded(ggml_nbytes(t) + extra, (size_t) t->data));
        memcpy(to->data(), t->data, ggml_nbytes(t));
        return to.get();
    }

    const language & gpu;

    std::map<const void *, std::unique_ptr<simt::guarded>> memory;
    std::vector<const ggml_tensor *> results;
    std::list<ggml_tensor> copies;
};

// what was computed so far, pairs in one launch by both names: "FASA_SELECT+FASA_ATTEND"
std::map<std::string, int> n_launches;

// the node that one launch computes together with node i, as in ggml-cuda; -1: none
int other_node(const language & gpu, const ggml_cgraph * graph, int i) {
    const int store = fasa_fused_store(graph, i);
    return !gpu.compute_both ? -1 : store > i ? store : fasa_fused_attend(graph, i);
}

bool compute_both(const language & gpu, const ggml_cgraph * graph, int i, int other) {
    guarded_ops ops(gpu);
    // the later one first: it may write to what the other reads
    const ggml_tensor * second = ops.add(graph->nodes[other]);
    const ggml_tensor * first  = ops.add(graph->nodes[i]);
    if (!gpu.compute_both(first, second)) {
        return false;
    }
    ops.finish();
    n_launches[std::string(ggml_op_name(first->op)) + "+" + ggml_op_name(second->op)]++;
    return true;
}

void compute_one(const language & gpu, const ggml_tensor * op) {
    guarded_ops ops(gpu);
    gpu.compute(ops.add(op));
    ops.finish();
    n_launches[ggml_op_name(op->op)]++;
}

ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    auto *           on_cpu = (ggml_backend_t) backend->context;
    const language & gpu    = language_of(backend->device);

    for (int i = 0; i < graph->n_nodes;) {
        const int other = other_node(gpu, graph, i);
        if (other > i && compute_both(gpu, graph, i, other)) {
            i = other + 1;
            continue;
        }
        if (is_ours(graph->nodes[i])) {
            compute_one(gpu, graph->nodes[i++]);
            continue;
        }
        ggml_cgraph others = *graph;
        others.nodes   = graph->nodes + i;
        others.n_nodes = 0;
        do {
            others.n_nodes++;
            i++;
        } while (i < graph->n_nodes && !is_ours(graph->nodes[i]) && other_node(gpu, graph, i) < 0);
        const auto status = ggml_backend_graph_compute(on_cpu, &others);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    return GGML_STATUS_SUCCESS;
}

ggml_guid guid = { 'f', 'a', 's', 'a', '-', 's', 'i', 'm', 't' };

const ggml_backend_i backend_iface = {
    /* .get_name             = */ [](ggml_backend_t backend) { return language_of(backend->device).name; },
    /* .free                 = */ [](ggml_backend_t backend) { ggml_backend_free((ggml_backend_t) backend->context); delete backend; },
    /* .set_tensor_async     = */ nullptr,
    /* .get_tensor_async     = */ nullptr,
    /* .set_tensor_2d_async  = */ nullptr,
    /* .get_tensor_2d_async  = */ nullptr,
    /* .cpy_tensor_async     = */ nullptr,
    /* .synchronize          = */ nullptr,
    /* .graph_plan_create    = */ nullptr,
    /* .graph_plan_free      = */ nullptr,
    /* .graph_plan_update    = */ nullptr,
    /* .graph_plan_compute   = */ nullptr,
    /* .graph_compute        = */ compute,
    /* .event_record         = */ nullptr,
    /* .event_wait           = */ nullptr,
    /* .graph_optimize       = */ nullptr,
};

//
// devices
//

struct simt_device : ggml_backend_device {
    ggml_backend_buffer_type buffer_type;
};

void get_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    ggml_backend_dev_memory(cpu(), free, total);
}

void get_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name        = language_of(dev).name;
    props->description = language_of(dev).description;
    props->type        = GGML_BACKEND_DEVICE_TYPE_GPU;
    get_memory(dev, &props->memory_free, &props->memory_total);
}

const ggml_backend_device_i device_iface = {
    /* .get_name             = */ [](ggml_backend_dev_t dev) { return language_of(dev).name; },
    /* .get_description      = */ [](ggml_backend_dev_t dev) { return language_of(dev).description; },
    /* .get_memory           = */ get_memory,
    /* .get_type             = */ [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; },
    /* .get_props            = */ get_props,
    /* .init_backend         = */ [](ggml_backend_dev_t dev, const char *) { return new ggml_backend { &guid, backend_iface, dev, ggml_backend_dev_init(cpu(), nullptr) }; },
    /* .get_buffer_type      = */ [](ggml_backend_dev_t dev) { return &((simt_device *) dev)->buffer_type; },
    /* .get_host_buffer_type = */ nullptr,
    /* .buffer_from_host_ptr = */ nullptr,
    /* .supports_op          = */ [](ggml_backend_dev_t, const ggml_tensor * op) { return is_ours(op) ? fasa_supported(op) : ggml_backend_dev_supports_op(cpu(), op); },
    /* .supports_buft        = */ [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) { return buft == &((simt_device *) dev)->buffer_type; },
    /* .offload_op           = */ nullptr,
    /* .event_new            = */ nullptr,
    /* .event_free           = */ nullptr,
    /* .event_synchronize    = */ nullptr,
};

simt_device devices[n_languages];

// all devices, or the one that is wanted: FASA_SIMT_DEVICE=SIMT-METAL
std::vector<ggml_backend_dev_t> offered;

const ggml_backend_reg_i reg_iface = {
    /* .get_name         = */ [](ggml_backend_reg_t) { return "SIMT"; },
    /* .get_device_count = */ [](ggml_backend_reg_t) { return offered.size(); },
    /* .get_device       = */ [](ggml_backend_reg_t, size_t i) { return offered[i]; },
    /* .get_proc_address = */ [](ggml_backend_reg_t, const char *) -> void * { return nullptr; },
};

ggml_backend_reg reg = { GGML_BACKEND_API_VERSION, reg_iface, nullptr };

} // namespace

// how many times the devices have computed a FASA op, or two ops in one launch, for tests
extern "C" int simt_launches(const char * name) { return n_launches[name]; }

extern "C" { GGML_BACKEND_API ggml_backend_reg_t ggml_backend_init(void); }

ggml_backend_reg_t ggml_backend_init(void) {
    offered.clear();
    for (size_t i = 0; i < n_languages; ++i) {
        devices[i].iface       = device_iface;
        devices[i].reg         = &reg;
        devices[i].context     = (void *) &languages[i];
        devices[i].buffer_type = { buffer_type_iface, &devices[i], nullptr };

        const char * wanted = getenv("FASA_SIMT_DEVICE");
        if (!wanted || strcmp(wanted, languages[i].name) == 0) {
            offered.push_back(&devices[i]);
        }
    }
    return &reg;
}
