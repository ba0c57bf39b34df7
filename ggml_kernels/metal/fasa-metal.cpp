#include "fasa-metal.h"

#include "../gpu/fasa-plan.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <cstdio>
#include <initializer_list>

// Metal does not tell how many cores a GPU has: 8 to 80. The same everywhere makes results the same, too.
static constexpr int32_t FASA_METAL_BLOCKS = 64;

// a thread has 128 registers
static constexpr int32_t FASA_METAL_TILE = 4;

// where the memory behind an op's own begins
static size_t fasa_extra_offset(const ggml_tensor * op) {
    return GGML_PAD(ggml_nbytes(op), 32);
}

static ggml_metal_buffer_id fasa_buffer_of(const ggml_tensor * t) {
    const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
}

// one op, dispatch by dispatch
struct fasa_metal_encoder {
    ggml_metal_library_t lib;
    ggml_metal_encoder_t enc;
    const ggml_tensor  * op;

    // what an op does not have is never read, but something must be bound
    ggml_metal_buffer_id src(int i) const { return fasa_buffer_of(op->src[i] ? op->src[i] : op->src[0]); }
    ggml_metal_buffer_id dst()      const { return fasa_buffer_of(op); }

    ggml_metal_buffer_id extra() const {
        ggml_metal_buffer_id res = dst();
        res.offs += fasa_extra_offset(op);
        return res;
    }

    template <typename T>
    void dispatch(const char * name, T args, std::initializer_list<ggml_metal_buffer_id> buffers, int n_x, int n_y, size_t n_shared) {
        ggml_metal_pipeline_with_params pipeline = ggml_metal_library_get_pipeline(lib, name);
        if (!pipeline.pipeline) {
            pipeline = ggml_metal_library_compile_pipeline(lib, name, name, nullptr);
        }
        if (!pipeline.pipeline) {
            GGML_ABORT("the Metal library has no %s", name);
        }
        GGML_ASSERT(ggml_metal_pipeline_max_theads_per_threadgroup(pipeline) >= FASA_THREADS);

        ggml_metal_encoder_set_pipeline(enc, pipeline);
        ggml_metal_encoder_set_bytes(enc, &args, sizeof(args), 0);

        int i = 1;
        for (const ggml_metal_buffer_id & buffer : buffers) {
            ggml_metal_encoder_set_buffer(enc, buffer, i++);
        }
        ggml_metal_encoder_set_threadgroup_memory_size(enc, GGML_PAD(std::max<size_t>(n_shared, 16), 16), 0);
        ggml_metal_encoder_dispatch_threadgroups(enc, n_x, n_y, 1, FASA_THREADS, 1, 1);
    }

    void barrier() { ggml_metal_encoder_memory_barrier(enc); }
};

static void fasa_encode_store(fasa_metal_encoder & e) {
    const fasa_store_plan plan(e.op);
    e.dispatch("kernel_fasa_store", plan.args, { e.src(0), e.src(1), e.src(2), e.src(4), e.src(3) }, plan.n_blocks, 1, 0);
}

static void fasa_encode_select(fasa_metal_encoder & e) {
    fasa_select_plan plan(e.op);
    do {
        const int n_parts = plan.args.n_parts;
        const int n_rows  = plan.args.n_rows;
        if (plan.args.row0 > 0) {
            e.barrier();
        }
        e.dispatch("kernel_fasa_stats", plan.args, { e.src(0), e.src(1), e.src(2), e.src(5), e.src(3), e.extra() }, n_parts, n_rows, plan.shared_stats);
        e.barrier();
        e.dispatch("kernel_fasa_keys", plan.args, { e.src(0), e.src(1), e.src(2), e.src(5), e.src(3), e.extra(), e.src(4) }, n_parts, n_rows, plan.shared_keys);
        e.barrier();
        e.dispatch("kernel_fasa_mark", plan.args, { e.extra() }, n_parts, n_rows, plan.shared_mark);
        e.barrier();
        e.dispatch("kernel_fasa_list", plan.args, { e.extra(), e.dst() }, 1, n_rows, plan.shared_mark);
    } while (plan.next());
}

static void fasa_encode_attend(fasa_metal_encoder & e) {
    const fasa_attend_plan plan(e.op, FASA_METAL_BLOCKS, FASA_METAL_TILE);

    char name[64];
    snprintf(name, sizeof(name), "kernel_fasa_split_%d_%d", plan.n_lanes, plan.args.n_tile);

    e.dispatch(name, plan.args, { e.src(0), e.src(1), e.src(2), e.src(3), e.src(4), e.extra() }, plan.args.n_splits, plan.n_units, plan.shared_split);
    e.barrier();
    e.dispatch("kernel_fasa_combine", plan.args, { e.extra(), e.src(5), e.dst() }, 1, plan.n_lists, plan.shared_combine);
}

void ggml_metal_fasa_encode(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const ggml_tensor * op) {
    fasa_metal_encoder e = { lib, enc, op };
    switch (op->op) {
        case GGML_OP_FASA_STORE:  fasa_encode_store (e); break;
        case GGML_OP_FASA_SELECT: fasa_encode_select(e); break;
        case GGML_OP_FASA_ATTEND: fasa_encode_attend(e); break;
        default: GGML_ABORT("not a FASA op");
    }
}

bool ggml_metal_fasa_supported(const ggml_tensor * op) {
    return fasa_supported(op);
}

size_t ggml_metal_fasa_extra(const ggml_tensor * op) {
    const size_t padding = fasa_extra_offset(op) - ggml_nbytes(op);
    switch (op->op) {
        case GGML_OP_FASA_SELECT: return padding + fasa_select_plan(op).memory;
        case GGML_OP_FASA_ATTEND: return padding + fasa_attend_plan(op, FASA_METAL_BLOCKS, FASA_METAL_TILE).memory;
        default:                  return 0;
    }
}
