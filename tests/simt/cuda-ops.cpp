// The FASA ops by the very CUDA kernels, in the emulator.

#include "simt-ops.h"

#include "ggml-fasa/cuda/fasa-kernels.cuh"

#include <list>

int4 fasa_shared[(simt::MAX_SHARED + simt::CANARY)/sizeof(int4)];

// devices of different sizes, so that lists of cells are split in different ways; the same for the same shapes
static int32_t n_cores_for(const ggml_tensor * op) {
    static constexpr int32_t N_CORES[] = { 1, 3, 132 };
    return N_CORES[(op->src[1]->ne[2] + op->ne[1] + op->ne[2]) % 3];
}

struct simt_launcher {
    const char * name;
    int32_t      n_cores;

    std::list<simt::guarded> allocated;

    void * alloc(size_t size) {
        allocated.emplace_back(size);
        return allocated.back().data();
    }

    template <typename... T, typename... U>
    void launch(void (*kernel)(T...), dim3 grid, size_t shared, U... args) {
        simt::launch(name, grid, FASA_THREADS, fasa_shared, shared, [&] { kernel((T) args...); });
    }
};

void simt_cuda_compute(const ggml_tensor * op) {
    simt_launcher launcher { ggml_op_name(op->op), n_cores_for(op), {} };
    switch (op->op) {
        case GGML_OP_FASA_STORE:  fasa_launch_store (launcher, op); break;
        case GGML_OP_FASA_SELECT: fasa_launch_select(launcher, op); break;
        case GGML_OP_FASA_ATTEND: fasa_launch_attend(launcher, op); break;
        default: GGML_ABORT("no FASA op");
    }
}
